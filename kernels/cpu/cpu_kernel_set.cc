#include "kernels/cpu/cpu_kernel_set.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/last_query.h"
#include "kernels/cpu/selection.h"
#include "kernels/cpu/selection_simd.h"

namespace longfill {
namespace {

class CpuKernelSet final : public KernelSet {
 public:
  CpuKernelSet(ThreadPool& pool, MemoryResource& memory)
      : pool_(pool),
        memory_(memory),
        name_(absl::StrCat("cpu ", InstructionSet(), ", ", pool.num_threads(), " threads")),
        tile_keys_(static_cast<size_t>(pool.num_threads())) {}

  std::string_view name() const override { return name_; }
  DeviceKind device() const override { return DeviceKind::kCpu; }
  MemoryResource& memory() override { return memory_; }

  absl::Status Embed(const EmbedParams& params, Stream&) override { return CpuEmbed(params, pool_); }
  absl::Status RmsNorm(const RmsNormParams& params, Stream&) override { return CpuRmsNorm(params, pool_); }
  int64_t GemmWorkspaceBytes(int64_t /*max_rows*/, int64_t max_in_width,
                             int64_t /*max_out_width*/) const override {
    return CpuGemmWorkspaceBytes(max_in_width, pool_.num_threads());
  }
  absl::Status Gemm(const GemmParams& params, Workspace workspace, Stream&) override {
    return CpuGemm(params, workspace, pool_);
  }
  absl::Status GatedActivation(const GatedActivationParams& params, Stream&) override {
    return CpuGatedActivation(params, pool_);
  }
  absl::Status Rotary(const RotaryParams& params, Stream&) override { return CpuRotary(params, pool_); }

  int64_t AttentionWorkspaceBytes(int64_t head_dim) const override {
    return CpuAttentionWorkspaceBytes(head_dim, pool_.num_threads());
  }
  absl::Status Attention(const AttentionParams& params, Workspace workspace, Stream&) override {
    return CpuAttention(params, workspace, pool_, tile_keys_);
  }

  int64_t LastQueryWorkspaceBytes(int64_t head_dim) const override {
    return CpuLastQueryWorkspaceBytes(head_dim, pool_.num_threads());
  }
  absl::Status LastQueryRowMax(const LastQueryParams& params, float* row_max, Workspace workspace,
                               Stream&) override {
    return CpuLastQueryRowMax(params, row_max, workspace, pool_);
  }
  absl::Status LastQueryRowSum(const LastQueryParams& params, const float* row_max, uint64_t* row_sum,
                               Workspace workspace, Stream&) override {
    return CpuLastQueryRowSum(params, row_max, row_sum, workspace, pool_);
  }
  absl::Status LastQueryScore(const LastQueryParams& params, const float* row_max, const uint64_t* row_sum,
                              const LastQueryScores& scores, Workspace workspace, Stream&) override {
    return CpuLastQueryScore(params, row_max, row_sum, scores, workspace, pool_);
  }
  absl::Status SelectionHistogram(const SelectionHistogramParams& params, Stream&) override {
    return CpuSelectionHistogram(params, pool_);
  }
  absl::Status Pool(const PoolParams& params, Stream&) override { return CpuPool(params, pool_); }
  absl::Status SelectBlocks(const SelectBlocksParams& params, Stream&) override {
    return CpuSelectBlocks(params, memory_, pool_);
  }

 private:
  ThreadPool& pool_;
  MemoryResource& memory_;
  const std::string name_;
  TileKeysOfWorkers tile_keys_;
};

}  // namespace

std::unique_ptr<KernelSet> CreateCpuKernelSet(ThreadPool& pool, MemoryResource& memory) {
  return std::make_unique<CpuKernelSet>(pool, memory);
}

}  // namespace longfill
