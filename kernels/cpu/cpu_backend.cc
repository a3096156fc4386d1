#include "absl/strings/str_cat.h"
#include "kernels/api/backend.h"
#include "kernels/base/thread_pool.h"
#include "kernels/cpu/block_selection_simd.h"
#include "kernels/cpu/cpu_kernel_set.h"

namespace longfill {
namespace {

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(int num_threads)
      : facts_{.name = absl::StrCat("CPU (", InstructionSet(), ", ", num_threads, " threads)")},
        pool_(num_threads),
        kernels_(CreateCpuKernelSet(pool_, memory_)) {}

  const DeviceFacts& facts() const override { return facts_; }
  KernelSet& kernels() override { return *kernels_; }
  MemoryResource& memory() override { return memory_; }
  MemoryResource& host_memory() override { return memory_; }
  Stream& stream() override { return stream_; }
  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override { return std::make_unique<CpuStream>(); }
  absl::StatusOr<std::unique_ptr<Event>> NewEvent() override { return std::make_unique<CpuEvent>(); }
  absl::StatusOr<int64_t> FreeMemoryBytes() override { return 0; }
  absl::Status Health() override { return absl::OkStatus(); }

 private:
  const DeviceFacts facts_;
  CpuMemoryResource memory_;
  ThreadPool pool_;
  const std::unique_ptr<KernelSet> kernels_;
  CpuStream stream_;
};

}  // namespace

std::unique_ptr<Backend> CreateCpuBackend(int num_threads) {
  return std::make_unique<CpuBackend>(num_threads);
}

}  // namespace longfill
