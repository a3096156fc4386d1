#ifndef LONGFILL_RUNTIME_SCALING_RECORDED_COMMUNICATOR_H_
#define LONGFILL_RUNTIME_SCALING_RECORDED_COMMUNICATOR_H_

// A rank of a mesh without its peers: what it calls is written down, and nothing moves.

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "parallel/communicator.h"
#include "parallel/mesh.h"
#include "parallel/peer_memory.h"
#include "runtime/scaling/link_traffic.h"
#include "runtime/scaling/recorded_backend.h"

namespace longfill {

// The groups of the ranks of one mesh, which run one after the other. What a rank cannot learn without its
// peers is here: into which groups the world is split, and what reductions give, namely the values of the
// first rank that came to each, so that all ranks go on from equal ones as they do in a real group.
class MeshGroups {
 public:
  // The world, and the splits that ParallelAttention::Create makes of it with these hosts, in their order.
  explicit MeshGroups(const Mesh& mesh, const PeerHosts& hosts = PeerHosts());

  // Schedule::groups; the first is the world.
  const std::vector<std::vector<int>>& members() const { return members_; }
  // The group of `rank` after the world's split number `split` with these arguments. Internal: it is not one
  // that was foreseen.
  absl::StatusOr<int> GroupOfSplit(size_t split, int rank, int color, int key) const;
  // Of reduction `number` of a group; empty until a rank has come to it.
  std::vector<std::byte>& Reduced(int group, int64_t number) { return reduced_[{group, number}]; }

 private:
  struct Split {
    std::vector<int> colors, keys;  // of each rank
    std::vector<int> groups;        // of each rank, numbers in members_
  };
  void AddSplit(std::vector<int> colors, std::vector<int> keys);

  std::vector<std::vector<int>> members_;
  std::vector<Split> splits_;
  std::map<std::pair<int, int64_t>, std::vector<std::byte>> reduced_;
};

// What the communicators of one rank share.
class RecordedRank {
 public:
  // All outlive the result. `traffic`: what copies beside the work what exchanges beside the main stream
  // would bring; nullptr: nothing does.
  RecordedRank(MeshGroups& groups, int rank, RecordedBackend& backend, LinkTraffic* traffic)
      : groups_(groups), rank_(rank), backend_(backend), traffic_(traffic) {}

  // The rank's communicator of the world; the result does not outlive this. Of its calls
  // - those with a CpuStream leave values as they are, as if the peers had equal ones; gathers and
  // all-to-alls of
  //   such values are Unimplemented;
  // - those with a stream of the backend put this rank's own piece into its place. Pieces of peers are
  // written when
  //   a buffer is first used after a reduction on the host, which is where ranks agree that memory is there:
  //   they are what this rank sends (random numbers of the compute dtype where that is nothing), so that
  //   kernels work on values like those of a real group; after that they stay.
  std::unique_ptr<Communicator> World();

 private:
  friend class RecordedCommunicator;
  MeshGroups& groups_;
  const int rank_;
  RecordedBackend& backend_;
  LinkTraffic* const traffic_;
  std::map<const void*, int64_t> filled_bytes_;  // of receive buffers, since the last reduction on the host
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_SCALING_RECORDED_COMMUNICATOR_H_
