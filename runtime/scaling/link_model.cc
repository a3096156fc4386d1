#include "runtime/scaling/link_model.h"

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace longfill {
namespace {

constexpr double kGiga = 1e9;
constexpr double kMicro = 1e-6;
constexpr int kAllInOneNode = 1 << 20;  // ranks

// Members of a group in each node that has some.
std::map<int, int> MembersByNode(std::span<const int> members, const LinkRates& links) {
  std::map<int, int> by_node;
  for (const int rank : members) ++by_node[links.NodeOf(rank)];
  return by_node;
}

// The part of an exchange among `n` that each does in a ring's reduction: 2 (n - 1) / n.
double ReduceShare(int n) { return 2.0 * (n - 1) / n; }

LinkBytes GatherBytes(const ExchangeCall& call, std::span<const int> members, int me,
                      const LinkRates& links) {
  const int node = links.NodeOf(members[me]);
  double all = 0, in_node = 0;
  int members_in_node = 0;
  for (size_t m = 0; m < members.size(); ++m) {
    const auto piece = static_cast<double>(call.sent[m]);
    all += piece;
    if (links.NodeOf(members[m]) != node) continue;
    in_node += piece;
    ++members_in_node;
  }
  const double network = (all - in_node) / members_in_node;
  return {.node = all - static_cast<double>(call.sent[me]) - network, .network = network};
}

LinkBytes ReduceBytes(int64_t bytes, std::span<const int> members, int me, const LinkRates& links) {
  const std::map<int, int> by_node = MembersByNode(members, links);
  const int in_node = by_node.at(links.NodeOf(members[me]));
  const auto all = static_cast<double>(bytes);
  return {.node = ReduceShare(in_node) * all,
          .network = ReduceShare(static_cast<int>(by_node.size())) * all / in_node};
}

LinkBytes BroadcastBytes(int64_t bytes, std::span<const int> members, int me, const LinkRates& links) {
  const std::map<int, int> by_node = MembersByNode(members, links);
  const auto all = static_cast<double>(bytes);
  return {.node = by_node.at(links.NodeOf(members[me])) > 1 ? all : 0,
          .network = by_node.size() > 1 ? all : 0};
}

LinkBytes AllToAllBytes(const ExchangeCall& call, std::span<const int> members, int me,
                        const LinkRates& links) {
  LinkBytes sent, received;
  for (size_t m = 0; m < members.size(); ++m) {
    if (static_cast<int>(m) == me) continue;
    const bool same_node = links.NodeOf(members[m]) == links.NodeOf(members[me]);
    (same_node ? sent.node : sent.network) += static_cast<double>(call.sent[m]);
    (same_node ? received.node : received.network) += static_cast<double>(call.received[m]);
  }
  return {.node = std::max(sent.node, received.node), .network = std::max(sent.network, received.network)};
}

}  // namespace

LinkRates LinkRates::Instant() {
  constexpr double kEndless = std::numeric_limits<double>::infinity();
  return {.node_gbs = kEndless, .network_gbs = kEndless, .node_latency_us = 0, .network_latency_us = 0};
}

absl::Status Validate(const LinkRates& links) {
  const auto bad = [](const char* field, double value, const char* expected) {
    return absl::InvalidArgumentError(absl::StrCat("links: ", field, " is ", value, ", not ", expected));
  };
  if (!(links.node_gbs > 0)) return bad("node_gbs", links.node_gbs, "above 0");
  if (!(links.network_gbs > 0)) return bad("network_gbs", links.network_gbs, "above 0");
  if (!(links.node_latency_us >= 0)) return bad("node_latency_us", links.node_latency_us, "0 or more");
  if (!(links.network_latency_us >= 0))
    return bad("network_latency_us", links.network_latency_us, "0 or more");
  if (links.ranks_per_node < 1) return bad("ranks_per_node", links.ranks_per_node, "1 or more");
  return absl::OkStatus();
}

absl::StatusOr<LinkRates> ParseLinks(std::string_view text) {
  LinkRates links;
  if (text == "400g") return links;
  if (text == "nvlink") {
    links.ranks_per_node = kAllInOneNode;
    return links;
  }
  const std::vector<std::string> fields = absl::StrSplit(absl::string_view(text.data(), text.size()), ',');
  const bool numbers = fields.size() == 3 && absl::SimpleAtod(fields[0], &links.node_gbs) &&
                       absl::SimpleAtod(fields[1], &links.network_gbs) &&
                       absl::SimpleAtoi(fields[2], &links.ranks_per_node);
  if (!numbers) {
    return absl::InvalidArgumentError(absl::StrCat(
        "links \"", std::string(text), "\" are not nvlink, 400g or NODE_GBS,NETWORK_GBS,RANKS_PER_NODE"));
  }
  LF_RETURN_IF_ERROR(Validate(links));
  return links;
}

std::string ToString(const LinkRates& links) {
  if (links.ranks_per_node == kAllInOneNode) return absl::StrCat(links.node_gbs, " GB/s between all ranks");
  return absl::StrCat(links.node_gbs, " GB/s in nodes of ", links.ranks_per_node, ", ", links.network_gbs,
                      " GB/s between them");
}

const char* ToString(ExchangeKind kind) {
  switch (kind) {
    case ExchangeKind::kAllGather:
      return "all-gather";
    case ExchangeKind::kAllReduce:
      return "all-reduce";
    case ExchangeKind::kBroadcast:
      return "broadcast";
    case ExchangeKind::kAllToAll:
      return "all-to-all";
    case ExchangeKind::kBarrier:
      return "barrier";
  }
  return "exchange";
}

LinkBytes BytesOnLinks(const ExchangeCall& call, std::span<const int> members, int me,
                       const LinkRates& links) {
  switch (call.kind) {
    case ExchangeKind::kAllGather:
      return GatherBytes(call, members, me, links);
    case ExchangeKind::kAllReduce:
      return ReduceBytes(call.bytes, members, me, links);
    case ExchangeKind::kBroadcast:
      return BroadcastBytes(call.bytes, members, me, links);
    case ExchangeKind::kAllToAll:
      return AllToAllBytes(call, members, me, links);
    case ExchangeKind::kBarrier:
      return {};
  }
  return {};
}

double ExchangeSeconds(std::span<const LinkBytes> bytes, std::span<const int> members,
                       const LinkRates& links) {
  if (members.size() < 2) return 0;
  const bool in_one_node = std::ranges::all_of(
      members, [&](int rank) { return links.NodeOf(rank) == links.NodeOf(members.front()); });
  const double latency = kMicro * (in_one_node ? links.node_latency_us : links.network_latency_us);
  double slowest = 0;
  for (const LinkBytes& on : bytes) {
    slowest =
        std::max({slowest, on.node / (kGiga * links.node_gbs), on.network / (kGiga * links.network_gbs)});
  }
  return latency + slowest;
}

}  // namespace longfill
