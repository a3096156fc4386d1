#ifndef LONGFILL_RUNTIME_ENGINE_DEVICE_COMMUNICATOR_H_
#define LONGFILL_RUNTIME_ENGINE_DEVICE_COMMUNICATOR_H_

// How ranks exchange memory of their devices.

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "kernels/api/backend.h"
#include "kernels/base/status.h"
#include "parallel/communicator.h"
#include "parallel/nccl_communicator.h"

namespace longfill {

enum class CommunicatorKind : uint8_t {
  kAuto,    // NCCL where every rank has a GPU of its own, else staged
  kNccl,    // from GPU to GPU
  kStaged,  // through page-locked host memory and the communicator of the group
};

// Keys and values that are gathered over the sequence (ParallelAttentionParams::peers), between GPUs.
enum class PeerCopies : uint8_t {
  kAuto,  // by copy engines where every rank can read every other's memory, else as everything else
  kOn,    // by copy engines, or an error; nothing for a rank alone
  kOff,
};

struct DeviceCommunicatorOptions {
  CommunicatorKind kind = CommunicatorKind::kAuto;
  PeerCopies peer_copies = PeerCopies::kAuto;
  NcclOptions nccl;
};

// What a rank tells the others before they choose.
struct RankDevice {
  std::string id;        // DeviceFacts::id; empty: the CPU
  int nccl_version = 0;  // NcclVersionCode; 0: it has none
};

struct CommunicatorChoice {
  CommunicatorKind kind = CommunicatorKind::kStaged;  // never kAuto
  std::string reason;                                 // in words, for logs
};

// A function of what all ranks know, so that they choose alike. FailedPrecondition naming ranks and GPU, or
// what is missing, where NCCL is asked for and cannot be used.
absl::StatusOr<CommunicatorChoice> ChooseCommunicator(const DeviceCommunicatorOptions& options,
                                                      std::span<const RankDevice> ranks);

// ParallelAttentionOptions::ctas_beside_exchange on `backend`'s GPU where NCCL exchanges: what its kernels
// leave.
int CtasBesideNccl(const Backend& backend, const NcclOptions& nccl);

// Collective over `world`: a communicator for memory of `backend`'s device. An error of NCCL aborts `world`.
absl::StatusOr<std::unique_ptr<Communicator>> CreateDeviceCommunicator(const CommunicatorChoice& choice,
                                                                       const NcclOptions& nccl,
                                                                       Communicator& world, Backend& backend);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_ENGINE_DEVICE_COMMUNICATOR_H_
