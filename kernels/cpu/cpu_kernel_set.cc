#include "kernels/cpu/cpu_kernel_set.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/block_lists.h"
#include "kernels/cpu/block_selection.h"
#include "kernels/cpu/block_selection_simd.h"
#include "kernels/cpu/copy.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/index.h"
#include "kernels/cpu/last_query.h"
#include "kernels/cpu/selection.h"
#include "kernels/cpu/share_selection.h"

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
  DType compute_dtype() const override { return DType::kFloat32; }
  MemoryResource& memory() override { return memory_; }
  int64_t preferred_rows() const override { return 2048; }

  absl::Status CopyIn(void* to, const void* host, int64_t bytes, Stream&) override {
    return CpuCopy(to, host, bytes, pool_);
  }
  absl::Status CopyOut(void* host, const void* from, int64_t bytes, Stream&) override {
    return CpuCopy(host, from, bytes, pool_);
  }
  absl::Status Copy2D(const Copy2DParams& params, Stream&) override { return CpuCopy2D(params, pool_); }
  absl::Status Zero(void* data, int64_t bytes, Stream&) override { return CpuZero(data, bytes, pool_); }
  absl::Status FillRandom(const FillRandomParams& params, Stream&) override {
    return CpuFillRandom(params, pool_);
  }

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

  int64_t AttentionWorkspaceBytes(const AttentionBounds& bounds) const override {
    return CpuAttentionWorkspaceBytes(bounds.head_dim, pool_.num_threads());
  }
  absl::Status Attention(const AttentionParams& params, Workspace workspace, Stream&) override {
    return CpuAttention(params, workspace, pool_, tile_keys_);
  }

  int64_t LastQueryWorkspaceBytes(int64_t /*num_heads*/, int64_t /*num_keys*/,
                                  int64_t head_dim) const override {
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
  absl::Status JoinScores(const JoinScoresParams& params, Stream&) override {
    return CpuJoinScores(params, pool_);
  }
  absl::Status SelectionStart(std::span<const int64_t> budgets, SelectionCut* cuts, Stream&) override {
    return CpuSelectionStart(budgets, cuts);
  }
  absl::Status SelectionHistogram(const SelectionLists& lists, int pass, const SelectionCut* cuts,
                                  uint64_t* histogram, Stream&) override {
    return CpuSelectionHistogram(lists, pass, cuts, histogram, pool_);
  }
  absl::Status SelectionAdvance(int64_t num_lists, int pass, const uint64_t* histogram, SelectionCut* cuts,
                                Stream&) override {
    return CpuSelectionAdvance(num_lists, pass, histogram, cuts);
  }
  absl::Status SelectionMark(const SelectionLists& lists, const SelectionCut* cuts, uint64_t* bits,
                             int64_t words_per_list, Stream&) override {
    return CpuSelectionMark(lists, cuts, bits, words_per_list, pool_);
  }
  int64_t BuildIndexWorkspaceBytes(int64_t /*num_heads*/, int64_t /*words_per_list*/) const override {
    return 0;
  }
  absl::Status BuildIndex(const BuildIndexParams& params, Workspace, Stream&) override {
    return CpuBuildIndex(params, pool_);
  }
  int64_t CountPairsWorkspaceBytes(int64_t /*num_heads*/, int64_t /*num_tokens*/) const override { return 0; }
  absl::Status CountPairs(const CountPairsParams& params, Workspace, Stream&) override {
    return CpuCountPairs(params, pool_);
  }
  absl::Status Pool(const PoolParams& params, Stream&) override { return CpuPool(params, pool_); }
  int64_t SelectBlocksWorkspaceBytes(int64_t num_row_blocks, int64_t num_key_blocks,
                                     int64_t head_dim) const override {
    return CpuSelectBlocksWorkspaceBytes(num_row_blocks, num_key_blocks, head_dim, pool_.num_threads());
  }
  absl::Status SelectBlocks(const SelectBlocksParams& params, Workspace workspace, Stream&) override {
    return CpuSelectBlocks(params, workspace, pool_);
  }
  absl::Status Representatives(const RepresentativesParams& params, Stream&) override {
    return CpuRepresentatives(params, pool_);
  }
  absl::Status CoarseRepresentatives(const CoarseRepresentativesParams& params, Stream&) override {
    return CpuCoarseRepresentatives(params, pool_);
  }
  int64_t ShareSelectionWorkspaceBytes(const ShareSelectionBounds& bounds) const override {
    return CpuShareSelectionWorkspaceBytes(bounds, pool_.num_threads());
  }
  absl::Status SelectByShare(const ShareSelectionParams& params, Workspace workspace, Stream&) override {
    return CpuSelectByShare(params, workspace, pool_);
  }
  int64_t BuildBlockListsWorkspaceBytes(int64_t /*num_heads*/, int64_t /*num_row_blocks*/) const override {
    return 0;
  }
  absl::Status BuildBlockLists(const BuildBlockListsParams& params, Workspace, Stream&) override {
    return CpuBuildBlockLists(params, pool_);
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
