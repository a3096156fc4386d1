#include "parallel/peer_memory.h"

#include <cstdint>
#include <map>

#include "absl/strings/str_cat.h"

namespace longfill {
namespace {

absl::Status LendsNothing(const Backend& backend) {
  return absl::FailedPreconditionError(backend.facts().name + " lends no memory to peers");
}

}  // namespace

PeerHosts::PeerHosts(std::vector<int> host_of_rank) : ranks_(host_of_rank.empty() ? 1 : 0) {
  std::map<int, int> numbers;
  for (size_t rank = 0; rank < host_of_rank.size(); ++rank) {
    const auto [found, is_new] = numbers.try_emplace(host_of_rank[rank], num_hosts());
    if (is_new) ranks_.emplace_back();
    std::vector<int>& ranks = ranks_[static_cast<size_t>(found->second)];
    places_.push_back({found->second, static_cast<int>(ranks.size())});
    ranks.push_back(static_cast<int>(rank));
  }
}

absl::StatusOr<PeerHosts> PeerHosts::Find(Communicator& group, Backend& backend) {
  CpuStream host;
  PeerAccess* const access = backend.peers();
  absl::StatusOr<std::string> name =
      access != nullptr ? access->Host() : absl::StatusOr<std::string>(LendsNothing(backend));
  LF_RETURN_IF_ERROR(AgreeOnStatus(group, name.status(), host));
  LF_ASSIGN_OR_RETURN(const std::vector<std::string> all, AllGatherStrings(group, *name, host));
  std::map<std::string, int> numbers;
  std::vector<int> host_of_rank(all.size());
  for (size_t rank = 0; rank < all.size(); ++rank) {
    host_of_rank[rank] = numbers.try_emplace(all[rank], static_cast<int>(numbers.size())).first->second;
  }
  return PeerHosts(std::move(host_of_rank));
}

absl::Status PeerHosts::CheckAlike() const {
  std::string counts;
  bool alike = true;
  for (const std::vector<int>& ranks : ranks_) {
    absl::StrAppend(&counts, counts.empty() ? "" : ", ", ranks.size());
    alike = alike && ranks.size() == ranks_[0].size() && ranks.size() > 1;
  }
  if (alike || num_hosts() == 1) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      "the hosts have ", counts, " ranks, of which every one would need as many, and more than one"));
}

absl::StatusOr<std::unique_ptr<PeerMemory>> PeerMemory::Open(Communicator& group, PeerAccess& access,
                                                             std::span<const Buffer* const> buffers) {
  CpuStream host;
  absl::Status mine;
  std::vector<std::string> handles;  // of this rank's buffers, then of all ranks'
  for (const Buffer* buffer : buffers) {
    absl::StatusOr<std::string> handle = access.Handle(*buffer);
    mine.Update(handle.status());
    handles.push_back(handle.ok() ? *std::move(handle) : std::string());
  }
  LF_RETURN_IF_ERROR(AgreeOnStatus(group, mine, host));
  std::vector<std::string> all(static_cast<size_t>(group.size()) * buffers.size());
  for (size_t b = 0; b < buffers.size(); ++b) {
    LF_ASSIGN_OR_RETURN(std::vector<std::string> of_ranks, AllGatherStrings(group, handles[b], host));
    for (size_t m = 0; m < of_ranks.size(); ++m) all[m * buffers.size() + b] = std::move(of_ranks[m]);
  }
  auto peers = std::make_unique<PeerMemory>(access, std::vector<std::vector<const void*>>());
  absl::Status opened =
      AgreeOnStatus(group, peers->OpenAll(all, buffers.size(), group.rank(), buffers), host);
  if (opened.ok()) return peers;
  peers.reset();
  LF_RETURN_IF_ERROR(AgreeOnStatus(group, absl::OkStatus(), host));  // nobody has this rank's buffers open
  return opened;
}

absl::Status PeerMemory::OpenAll(std::span<const std::string> handles, size_t num_buffers, int own,
                                 std::span<const Buffer* const> buffers) {
  const size_t size = handles.size() / num_buffers;
  for (size_t m = 0; m < size; ++m) {
    places_.emplace_back();
    for (size_t b = 0; b < num_buffers; ++b) {
      if (static_cast<int>(m) == own) {
        places_.back().push_back(buffers[b]->data());
        continue;
      }
      absl::StatusOr<const void*> place = access_.Open(handles[m * num_buffers + b]);
      if (!place.ok()) return Annotate(place.status(), absl::StrCat("of rank ", m));
      places_.back().push_back(*place);
      opened_.push_back(*place);
    }
  }
  return absl::OkStatus();
}

PeerMemory::~PeerMemory() {
  // An error is one of a lost device, which whoever uses it reports.
  for (const void* opened : opened_) access_.Close(opened).IgnoreError();
}

absl::Status TryPeerMemory(Communicator& group, Backend& backend) {
  CpuStream host;
  PeerAccess* const access = backend.peers();
  LF_RETURN_IF_ERROR(
      AgreeOnStatus(group, access != nullptr ? absl::OkStatus() : LendsNothing(backend), host));
  const int64_t word = group.rank();
  constexpr auto kBytes = static_cast<int64_t>(sizeof(word));
  Buffer own, received;
  const auto write = [&]() -> absl::Status {
    LF_ASSIGN_OR_RETURN(own, access->memory().Allocate(kBytes, "a word for peers"));
    LF_ASSIGN_OR_RETURN(received, backend.memory().Allocate(kBytes * group.size(), "words of peers"));
    LF_RETURN_IF_ERROR(backend.kernels().CopyIn(own.data(), &word, kBytes, backend.stream()));
    return backend.stream().Sync();
  };
  LF_RETURN_IF_ERROR(AgreeOnStatus(group, write(), host));
  const Buffer* const buffers[] = {&own};
  LF_ASSIGN_OR_RETURN(std::unique_ptr<PeerMemory> peers, PeerMemory::Open(group, *access, buffers));
  const auto read = [&]() -> absl::Status {
    std::vector<int64_t> words(static_cast<size_t>(group.size()));
    for (int m = 0; m < group.size(); ++m) {
      LF_RETURN_IF_ERROR(access->Copy({.to = received.as<int64_t>() + m,
                                       .to_pitch = kBytes,
                                       .from = peers->At(m, 0),
                                       .from_pitch = kBytes,
                                       .row_bytes = kBytes,
                                       .rows = 1},
                                      backend.stream()));
    }
    LF_RETURN_IF_ERROR(backend.stream().Sync());
    LF_RETURN_IF_ERROR(
        backend.kernels().CopyOut(words.data(), received.data(), received.size_bytes(), backend.stream()));
    LF_RETURN_IF_ERROR(backend.stream().Sync());
    for (int m = 0; m < group.size(); ++m) {
      if (words[static_cast<size_t>(m)] != m) {
        return absl::InternalError(absl::StrCat("read ", words[static_cast<size_t>(m)], " of rank ", m));
      }
    }
    return absl::OkStatus();
  };
  const absl::Status readable = read();
  peers.reset();
  return AgreeOnStatus(group, readable, host);  // after which nobody reads this rank's word
}

}  // namespace longfill
