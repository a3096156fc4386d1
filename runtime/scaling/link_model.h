#ifndef LONGFILL_RUNTIME_SCALING_LINK_MODEL_H_
#define LONGFILL_RUNTIME_SCALING_LINK_MODEL_H_

// How long an exchange between ranks takes on links of stated rates. Pure arithmetic.

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/status.h"

namespace longfill {

// Ranks [n * ranks_per_node, (n + 1) * ranks_per_node) are node n. Each rank has one link inside its node and
// one to other nodes, both full duplex; what a node's network carries is shared by its ranks' links.
struct LinkRates {
  double node_gbs = 350;           // 10^9 bytes a second, of one rank in each direction
  double network_gbs = 45;         // likewise, between nodes
  double node_latency_us = 20;     // of a call whose members are in one node
  double network_latency_us = 40;  // of one whose members are not
  int ranks_per_node = 8;

  int NodeOf(int rank) const { return rank / ranks_per_node; }
  static LinkRates Instant();  // exchanges take no time; ranks still wait for each other
};

// InvalidArgument naming the field: rates not above 0, latencies below 0, ranks_per_node below 1.
absl::Status Validate(const LinkRates& links);

// "nvlink": the default rates in one node of all ranks. "400g": nodes of 8 with 400 Gb/s a rank between them,
// the default. Or NODE_GBS,NETWORK_GBS,RANKS_PER_NODE with the default latencies. InvalidArgument naming the
// text.
absl::StatusOr<LinkRates> ParseLinks(std::string_view text);
std::string ToString(const LinkRates& links);  // in words, for reports

enum class ExchangeKind : uint8_t { kAllGather, kAllReduce, kBroadcast, kAllToAll, kBarrier };
const char* ToString(ExchangeKind kind);

// One member's part of one call of a Communicator, with the bytes that the caller gave.
struct ExchangeCall {
  ExchangeKind kind = ExchangeKind::kBarrier;
  int64_t bytes = 0;  // of an all-reduce or a broadcast
  // All-gather: sent[m] is the piece of member m, equal on all members. All-to-all: to and from each member.
  std::vector<int64_t> sent, received;
};

// What one rank's links carry in the direction that carries more.
struct LinkBytes {
  double node = 0;
  double network = 0;
};

// Of the member `me` of `members` (ranks of the world):
//   all-gather   a ring in each node, to which each of a node's members brings an equal part of what other
//                nodes have
//   all-reduce   a ring: 2 (n - 1) / n of the bytes in a node of n members, and 2 (m - 1) / m of 1 / n of
//                them between m nodes
//   broadcast    all bytes, on each kind of link that the group needs
//   all-to-all   each piece on the link between its two ranks
// A member's piece for itself moves nowhere.
LinkBytes BytesOnLinks(const ExchangeCall& call, std::span<const int> members, int me,
                       const LinkRates& links);

// Of a call with one entry of `bytes` for each member: its latency and the slowest link's transfer. Links of
// one rank work at the same time (pieces are pipelined). A group of one takes no time.
double ExchangeSeconds(std::span<const LinkBytes> bytes, std::span<const int> members,
                       const LinkRates& links);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_SCALING_LINK_MODEL_H_
