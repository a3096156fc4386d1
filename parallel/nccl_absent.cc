// Stands in for nccl_communicator.cc in a build without NCCL.

#include "parallel/nccl_communicator.h"

namespace longfill {
namespace {

absl::Status Absent() {
  return absl::UnimplementedError(
      "this build has no NCCL: build with LONGFILL_CUDA=ON where nccl.h and libnccl 2.28 or newer are found "
      "(LONGFILL_NCCL=ON says what is missing)");
}

}  // namespace

absl::StatusOr<int> NcclVersionCode(Backend&) { return Absent(); }
int NcclHeaderVersionCode() { return 0; }
std::string NcclVersionText(int) { return "none"; }

absl::StatusOr<std::unique_ptr<Communicator>> CreateNcclCommunicator(Communicator&, Backend&,
                                                                     const NcclOptions&) {
  return Absent();
}

}  // namespace longfill
