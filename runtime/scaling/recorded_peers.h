#ifndef LONGFILL_RUNTIME_SCALING_RECORDED_PEERS_H_
#define LONGFILL_RUNTIME_SCALING_RECORDED_PEERS_H_

#include <cstdint>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/api/peer_access.h"
#include "kernels/base/memory.h"
#include "parallel/peer_memory.h"
#include "runtime/scaling/link_traffic.h"
#include "runtime/scaling/recorded_backend.h"

namespace longfill {

// Keys and values of peers that are not there: reading them is written down, and `traffic`, if there is any,
// copies as much beside the work. A place in which they land is filled with random numbers once.
class RecordedPeers final : public PeerAccess {
 public:
  // `members`: the ranks that read one another's memory, this one among them. The others outlive the result.
  RecordedPeers(std::vector<int> members, int rank, RecordedBackend& backend, LinkTraffic* traffic);

  // Of this rank's `own` buffers, of at most `bytes` on any rank.
  absl::StatusOr<std::unique_ptr<PeerMemory>> Open(std::span<const Buffer* const> own, int64_t bytes);

  MemoryResource& memory() override { return backend_.memory(); }
  absl::StatusOr<std::string> Host() override { return std::string(); }
  absl::StatusOr<std::string> Handle(const Buffer& buffer) override;
  absl::StatusOr<const void*> Open(std::string_view handle) override;
  absl::Status Close(const void*) override { return absl::OkStatus(); }
  absl::Status Copy(const Copy2DParams& params, Stream& stream) override;

 private:
  bool IsOfPeer(const void* data) const;

  const int rank_;
  RecordedBackend& backend_;
  LinkTraffic* const traffic_;
  std::vector<int> members_;
  Buffer peer_;  // what stands for any buffer of any peer
  std::set<const void*> filled_;
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_SCALING_RECORDED_PEERS_H_
