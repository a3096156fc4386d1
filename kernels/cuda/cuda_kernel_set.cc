#include "kernels/cuda/cuda_kernel_set.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/attention/attention.h"
#include "kernels/cuda/copy.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/cuda_stream.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/hopper/attention.h"
#include "kernels/cuda/index/block_lists.h"
#include "kernels/cuda/index/build_index.h"
#include "kernels/cuda/index/count_pairs.h"
#include "kernels/cuda/index/join_scores.h"
#include "kernels/cuda/index/last_query.h"
#include "kernels/cuda/index/pool.h"
#include "kernels/cuda/index/representatives.h"
#include "kernels/cuda/index/select_blocks.h"
#include "kernels/cuda/index/selection.h"
#include "kernels/cuda/index/share_selection.h"

namespace longfill {
namespace {

// Chooses the device for the calling thread and passes the call on.
class CudaKernelSet final : public KernelSet {
 public:
  CudaKernelSet(const DeviceLimits& limits, DType compute_dtype, MemoryResource& memory,
                std::unique_ptr<CudaGemm> gemm)
      : limits_(limits),
        compute_dtype_(compute_dtype),
        memory_(memory),
        gemm_(std::move(gemm)),
        name_(absl::StrCat("cuda sm_", limits.compute_capability, " ", std::string(DTypeName(compute_dtype)),
                           ", device ", limits.device)) {}

  std::string_view name() const override { return name_; }
  DeviceKind device() const override { return DeviceKind::kCuda; }
  DType compute_dtype() const override { return compute_dtype_; }
  MemoryResource& memory() override { return memory_; }
  int64_t preferred_rows() const override { return 16384; }

  absl::Status CopyIn(void* to, const void* host, int64_t bytes, Stream& stream) override {
    return On(stream, [&](cudaStream_t) { return CudaCopyIn(to, host, bytes, stream); });
  }
  absl::Status CopyOut(void* host, const void* from, int64_t bytes, Stream& stream) override {
    return On(stream, [&](cudaStream_t cuda) { return CudaCopyOut(host, from, bytes, cuda); });
  }
  absl::Status Copy2D(const Copy2DParams& params, Stream& stream) override {
    return On(stream, [&](cudaStream_t cuda) { return CudaCopy2D(params, cuda); });
  }
  absl::Status Zero(void* data, int64_t bytes, Stream& stream) override {
    return On(stream, [&](cudaStream_t cuda) { return CudaZero(data, bytes, cuda); });
  }
  absl::Status FillRandom(const FillRandomParams& params, Stream& stream) override {
    return On(stream, [&](cudaStream_t cuda) { return CudaFillRandom(params, limits_, cuda); });
  }

  absl::Status Embed(const EmbedParams& params, Stream& stream) override {
    return On(stream, [&](cudaStream_t cuda) { return CudaEmbed(params, compute_dtype_, limits_, cuda); });
  }
  absl::Status RmsNorm(const RmsNormParams& params, Stream& stream) override {
    return On(stream, [&](cudaStream_t cuda) { return CudaRmsNorm(params, compute_dtype_, limits_, cuda); });
  }
  int64_t GemmWorkspaceBytes(int64_t /*max_rows*/, int64_t /*max_in_width*/,
                             int64_t /*max_out_width*/) const override {
    return CudaGemm::WorkspaceBytes();
  }
  absl::Status Gemm(const GemmParams& params, Workspace workspace, Stream& stream) override {
    return On(stream, [&](cudaStream_t cuda) { return gemm_->Run(params, workspace, cuda); });
  }
  absl::Status GatedActivation(const GatedActivationParams& params, Stream& stream) override {
    return On(stream,
              [&](cudaStream_t cuda) { return CudaGatedActivation(params, compute_dtype_, limits_, cuda); });
  }
  absl::Status Rotary(const RotaryParams& params, Stream& stream) override {
    return On(stream, [&](cudaStream_t cuda) { return CudaRotary(params, compute_dtype_, limits_, cuda); });
  }

  int64_t AttentionWorkspaceBytes(const AttentionBounds& bounds) const override {
    return std::max(CudaAttentionWorkspaceBytes(bounds), HopperAttentionWorkspaceBytes(bounds));
  }
  absl::Status Attention(const AttentionParams& params, Workspace workspace, Stream& stream) override {
    return On(stream, [&](cudaStream_t cuda) {
      const HopperHeads heads = SplitHopperHeads(params, limits_);
      LF_RETURN_IF_ERROR(HopperAttention(params, heads.served, workspace, compute_dtype_, limits_, cuda));
      return CudaAttention(params, heads.others, workspace, compute_dtype_, limits_, cuda);
    });
  }

  int64_t LastQueryWorkspaceBytes(int64_t num_heads, int64_t num_keys, int64_t head_dim) const override {
    return CudaLastQueryWorkspaceBytes(num_heads, num_keys, head_dim);
  }
  absl::Status LastQueryRowMax(const LastQueryParams& params, float* row_max, Workspace workspace,
                               Stream& stream) override {
    return On(stream, [&](cudaStream_t cuda) {
      return CudaLastQueryRowMax(params, row_max, workspace, compute_dtype_, limits_, cuda);
    });
  }
  absl::Status LastQueryRowSum(const LastQueryParams& params, const float* row_max, uint64_t* row_sum,
                               Workspace workspace, Stream& stream) override {
    return On(stream, [&](cudaStream_t cuda) {
      return CudaLastQueryRowSum(params, row_max, row_sum, workspace, compute_dtype_, limits_, cuda);
    });
  }
  absl::Status LastQueryScore(const LastQueryParams& params, const float* row_max, const uint64_t* row_sum,
                              const LastQueryScores& scores, Workspace workspace, Stream& stream) override {
    return On(stream, [&](cudaStream_t cuda) {
      return CudaLastQueryScore(params, row_max, row_sum, scores, workspace, compute_dtype_, limits_, cuda);
    });
  }
  absl::Status JoinScores(const JoinScoresParams& params, Stream& stream) override {
    return On(stream, [&](cudaStream_t cuda) { return CudaJoinScores(params, limits_, cuda); });
  }
  absl::Status SelectionStart(std::span<const int64_t> budgets, SelectionCut* cuts, Stream& stream) override {
    return On(stream, [&](cudaStream_t cuda) { return CudaSelectionStart(budgets, cuts, cuda); });
  }
  absl::Status SelectionHistogram(const SelectionLists& lists, int pass, const SelectionCut* cuts,
                                  uint64_t* histogram, Stream& stream) override {
    return On(stream, [&](cudaStream_t cuda) {
      return CudaSelectionHistogram(lists, pass, cuts, histogram, limits_, cuda);
    });
  }
  absl::Status SelectionAdvance(int64_t num_lists, int pass, const uint64_t* histogram, SelectionCut* cuts,
                                Stream& stream) override {
    return On(stream, [&](cudaStream_t cuda) {
      return CudaSelectionAdvance(num_lists, pass, histogram, cuts, cuda);
    });
  }
  absl::Status SelectionMark(const SelectionLists& lists, const SelectionCut* cuts, uint64_t* bits,
                             int64_t words_per_list, Stream& stream) override {
    return On(stream, [&](cudaStream_t cuda) {
      return CudaSelectionMark(lists, cuts, bits, words_per_list, limits_, cuda);
    });
  }
  int64_t BuildIndexWorkspaceBytes(int64_t num_heads, int64_t words_per_list) const override {
    return CudaBuildIndexWorkspaceBytes(num_heads, words_per_list);
  }
  absl::Status BuildIndex(const BuildIndexParams& params, Workspace workspace, Stream& stream) override {
    return On(stream, [&](cudaStream_t cuda) { return CudaBuildIndex(params, workspace, cuda); });
  }
  int64_t CountPairsWorkspaceBytes(int64_t num_heads, int64_t num_tokens) const override {
    return CudaCountPairsWorkspaceBytes(num_heads, num_tokens);
  }
  absl::Status CountPairs(const CountPairsParams& params, Workspace workspace, Stream& stream) override {
    return On(stream, [&](cudaStream_t cuda) { return CudaCountPairs(params, workspace, limits_, cuda); });
  }

  absl::Status Pool(const PoolParams& params, Stream& stream) override {
    return On(stream, [&](cudaStream_t cuda) { return CudaPool(params, compute_dtype_, cuda); });
  }
  int64_t SelectBlocksWorkspaceBytes(int64_t num_row_blocks, int64_t num_key_blocks,
                                     int64_t head_dim) const override {
    return CudaSelectBlocksWorkspaceBytes(num_row_blocks, num_key_blocks, head_dim);
  }
  absl::Status SelectBlocks(const SelectBlocksParams& params, Workspace workspace, Stream& stream) override {
    return On(stream, [&](cudaStream_t cuda) { return CudaSelectBlocks(params, workspace, limits_, cuda); });
  }

  absl::Status Representatives(const RepresentativesParams& params, Stream& stream) override {
    return On(stream, [&](cudaStream_t cuda) { return CudaRepresentatives(params, compute_dtype_, cuda); });
  }
  absl::Status CoarseRepresentatives(const CoarseRepresentativesParams& params, Stream& stream) override {
    return On(stream,
              [&](cudaStream_t cuda) { return CudaCoarseRepresentatives(params, compute_dtype_, cuda); });
  }
  int64_t ShareSelectionWorkspaceBytes(const ShareSelectionBounds& bounds) const override {
    return CudaShareSelectionWorkspaceBytes(bounds, limits_);
  }
  absl::Status SelectByShare(const ShareSelectionParams& params, Workspace workspace,
                             Stream& stream) override {
    return On(stream, [&](cudaStream_t cuda) {
      return CudaSelectByShare(params, workspace, compute_dtype_, limits_, cuda);
    });
  }
  int64_t BuildBlockListsWorkspaceBytes(int64_t num_heads, int64_t num_row_blocks) const override {
    return CudaBuildBlockListsWorkspaceBytes(num_heads, num_row_blocks);
  }
  absl::Status BuildBlockLists(const BuildBlockListsParams& params, Workspace workspace,
                               Stream& stream) override {
    return On(stream,
              [&](cudaStream_t cuda) { return CudaBuildBlockLists(params, workspace, limits_, cuda); });
  }

 private:
  template <typename Operation>
  absl::Status On(Stream& stream, const Operation& operation) {
    LF_ASSIGN_OR_RETURN(const cudaStream_t cuda_stream, CudaStreamOf(stream));
    LF_RETURN_IF_ERROR(UseDevice(limits_.device));
    return operation(cuda_stream);
  }

  const DeviceLimits limits_;
  const DType compute_dtype_;
  MemoryResource& memory_;
  const std::unique_ptr<CudaGemm> gemm_;
  const std::string name_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<KernelSet>> CreateCudaKernelSet(const DeviceLimits& limits,
                                                               DType compute_dtype, MemoryResource& memory) {
  LF_ASSIGN_OR_RETURN(std::unique_ptr<CudaGemm> gemm, CudaGemm::Create(limits.device, compute_dtype));
  return std::make_unique<CudaKernelSet>(limits, compute_dtype, memory, std::move(gemm));
}

}  // namespace longfill
