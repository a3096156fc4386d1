#ifndef LONGFILL_PARALLEL_PEER_MEMORY_H_
#define LONGFILL_PARALLEL_PEER_MEMORY_H_

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/api/backend.h"
#include "kernels/api/peer_access.h"
#include "kernels/base/memory.h"
#include "kernels/base/status.h"
#include "parallel/communicator.h"

namespace longfill {

// Which ranks of a group are on one host.
class PeerHosts {
 public:
  PeerHosts() : PeerHosts(std::vector<int>()) {}      // nobody asked: there is one
  explicit PeerHosts(std::vector<int> host_of_rank);  // any number of the host of each rank
  // Collective over `group`. FailedPrecondition on all ranks where a device lends no memory to peers.
  static absl::StatusOr<PeerHosts> Find(Communicator& group, Backend& backend);

  int num_hosts() const { return static_cast<int>(ranks_.size()); }  // numbered as their first ranks ascend
  const std::vector<int>& RanksOf(int host) const { return ranks_[static_cast<size_t>(host)]; }  // ascending
  int HostOf(int rank) const { return places_[static_cast<size_t>(rank)].host; }
  int LocalOf(int rank) const { return places_[static_cast<size_t>(rank)].local; }  // place among RanksOf
  // OK where there is one host, or every one has as many ranks, and more than one; FailedPrecondition with
  // the numbers.
  absl::Status CheckAlike() const;

 private:
  struct Place {
    int host = 0;
    int local = 0;
  };
  std::vector<Place> places_;            // of each rank
  std::vector<std::vector<int>> ranks_;  // of each host
};

// The same buffers of every rank of a group, where this one reads them. When a peer writes and frees its own
// is for the caller to know.
class PeerMemory {
 public:
  // Collective over `group`. `buffers`: this rank's, of access.memory(), as many on every rank; empty ones
  // too. `access` outlives the result. FailedPrecondition on all ranks, naming one and its reason, where it
  // cannot read a peer's; leaves the group usable, and then no rank has
  // a buffer of another open.
  static absl::StatusOr<std::unique_ptr<PeerMemory>> Open(Communicator& group, PeerAccess& access,
                                                          std::span<const Buffer* const> buffers);
  // Of addresses that need no opening: [member][buffer].
  PeerMemory(PeerAccess& access, std::vector<std::vector<const void*>> places)
      : access_(access), places_(std::move(places)) {}
  ~PeerMemory();  // this rank does not read any more
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  PeerAccess& access() const { return access_; }
  const void* At(int member, size_t buffer) const { return places_[static_cast<size_t>(member)][buffer]; }

 private:
  absl::Status OpenAll(std::span<const std::string> handles, size_t num_buffers, int own,
                       std::span<const Buffer* const> buffers);

  PeerAccess& access_;
  std::vector<std::vector<const void*>> places_;
  std::vector<const void*> opened_;
};

// Collective over `group`: whether every rank reads what its peers wrote, tried with a word. The errors of
// Open, or Internal where a word is wrong.
absl::Status TryPeerMemory(Communicator& group, Backend& backend);

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_PEER_MEMORY_H_
