#include <map>
#include <mutex>

#include "tests/multirank/nccl_ranks.h"
#include "tests/testing/fake_nccl.h"

namespace longfill {

absl::StatusOr<std::shared_ptr<Backend>> NcclRankBackend(int) {
  return std::shared_ptr<Backend>(CreateFakeGpu());
}

absl::Status CheckNcclRanks(int size) {
  return size <= 6 ? absl::OkStatus() : absl::UnavailableError("six threads are enough here");
}

NcclOptions NcclTestOptions() { return {.timeout = std::chrono::seconds(60)}; }

}  // namespace longfill
