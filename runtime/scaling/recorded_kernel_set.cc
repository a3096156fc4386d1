#include "runtime/scaling/recorded_backend.h"

namespace longfill {
namespace {

class RecordedKernelSet final : public KernelSet {
 public:
  RecordedKernelSet(KernelSet& device, StepRecorder& recorder) : device_(device), recorder_(recorder) {}

  std::string_view name() const override { return device_.name(); }
  DeviceKind device() const override { return device_.device(); }
  DType compute_dtype() const override { return device_.compute_dtype(); }
  MemoryResource& memory() override { return device_.memory(); }
  int64_t preferred_rows() const override { return device_.preferred_rows(); }
  absl::Status CopyIn(void* to, const void* host, int64_t bytes, Stream& stream) override {
    return Run(WorkPart::kCopy, stream, [&](Stream& on) { return device_.CopyIn(to, host, bytes, on); });
  }
  absl::Status CopyOut(void* host, const void* from, int64_t bytes, Stream& stream) override {
    return Run(WorkPart::kCopy, stream, [&](Stream& on) { return device_.CopyOut(host, from, bytes, on); });
  }
  absl::Status Copy2D(const Copy2DParams& params, Stream& stream) override {
    return Run(WorkPart::kCopy, stream, [&](Stream& on) { return device_.Copy2D(params, on); });
  }
  absl::Status Zero(void* data, int64_t bytes, Stream& stream) override {
    return Run(WorkPart::kCopy, stream, [&](Stream& on) { return device_.Zero(data, bytes, on); });
  }
  absl::Status FillRandom(const FillRandomParams& params, Stream& stream) override {
    return Run(WorkPart::kOther, stream, [&](Stream& on) { return device_.FillRandom(params, on); });
  }
  absl::Status Embed(const EmbedParams& params, Stream& stream) override {
    return Run(WorkPart::kOther, stream, [&](Stream& on) { return device_.Embed(params, on); });
  }
  absl::Status RmsNorm(const RmsNormParams& params, Stream& stream) override {
    return Run(WorkPart::kOther, stream, [&](Stream& on) { return device_.RmsNorm(params, on); });
  }
  int64_t GemmWorkspaceBytes(int64_t max_rows, int64_t max_in_width, int64_t max_out_width) const override {
    return device_.GemmWorkspaceBytes(max_rows, max_in_width, max_out_width);
  }
  absl::Status Gemm(const GemmParams& params, Workspace workspace, Stream& stream) override {
    return Run(WorkPart::kGemm, stream, [&](Stream& on) { return device_.Gemm(params, workspace, on); });
  }
  absl::Status GatedActivation(const GatedActivationParams& params, Stream& stream) override {
    return Run(WorkPart::kOther, stream, [&](Stream& on) { return device_.GatedActivation(params, on); });
  }
  absl::Status Rotary(const RotaryParams& params, Stream& stream) override {
    return Run(WorkPart::kOther, stream, [&](Stream& on) { return device_.Rotary(params, on); });
  }
  int64_t AttentionWorkspaceBytes(const AttentionBounds& bounds) const override {
    return device_.AttentionWorkspaceBytes(bounds);
  }
  absl::Status Attention(const AttentionParams& params, Workspace workspace, Stream& stream) override {
    return Run(WorkPart::kAttention, stream,
               [&](Stream& on) { return device_.Attention(params, workspace, on); });
  }
  int64_t LastQueryWorkspaceBytes(int64_t num_heads, int64_t num_keys, int64_t head_dim) const override {
    return device_.LastQueryWorkspaceBytes(num_heads, num_keys, head_dim);
  }
  absl::Status LastQueryRowMax(const LastQueryParams& params, float* row_max, Workspace workspace,
                               Stream& stream) override {
    return Run(WorkPart::kIndex, stream,
               [&](Stream& on) { return device_.LastQueryRowMax(params, row_max, workspace, on); });
  }
  absl::Status LastQueryRowSum(const LastQueryParams& params, const float* row_max, uint64_t* row_sum,
                               Workspace workspace, Stream& stream) override {
    return Run(WorkPart::kIndex, stream,
               [&](Stream& on) { return device_.LastQueryRowSum(params, row_max, row_sum, workspace, on); });
  }
  absl::Status LastQueryScore(const LastQueryParams& params, const float* row_max, const uint64_t* row_sum,
                              const LastQueryScores& scores, Workspace workspace, Stream& stream) override {
    return Run(WorkPart::kIndex, stream, [&](Stream& on) {
      return device_.LastQueryScore(params, row_max, row_sum, scores, workspace, on);
    });
  }
  absl::Status JoinScores(const JoinScoresParams& params, Stream& stream) override {
    return Run(WorkPart::kIndex, stream, [&](Stream& on) { return device_.JoinScores(params, on); });
  }
  absl::Status SelectionStart(std::span<const int64_t> budgets, SelectionCut* cuts, Stream& stream) override {
    return Run(WorkPart::kIndex, stream,
               [&](Stream& on) { return device_.SelectionStart(budgets, cuts, on); });
  }
  absl::Status SelectionHistogram(const SelectionLists& lists, int pass, const SelectionCut* cuts,
                                  uint64_t* histogram, Stream& stream) override {
    return Run(WorkPart::kIndex, stream,
               [&](Stream& on) { return device_.SelectionHistogram(lists, pass, cuts, histogram, on); });
  }
  absl::Status SelectionAdvance(int64_t num_lists, int pass, const uint64_t* histogram, SelectionCut* cuts,
                                Stream& stream) override {
    return Run(WorkPart::kIndex, stream,
               [&](Stream& on) { return device_.SelectionAdvance(num_lists, pass, histogram, cuts, on); });
  }
  absl::Status SelectionMark(const SelectionLists& lists, const SelectionCut* cuts, uint64_t* bits,
                             int64_t words_per_list, Stream& stream) override {
    return Run(WorkPart::kIndex, stream,
               [&](Stream& on) { return device_.SelectionMark(lists, cuts, bits, words_per_list, on); });
  }
  int64_t BuildIndexWorkspaceBytes(int64_t num_heads, int64_t words_per_list) const override {
    return device_.BuildIndexWorkspaceBytes(num_heads, words_per_list);
  }
  absl::Status BuildIndex(const BuildIndexParams& params, Workspace workspace, Stream& stream) override {
    return Run(WorkPart::kIndex, stream,
               [&](Stream& on) { return device_.BuildIndex(params, workspace, on); });
  }
  int64_t CountPairsWorkspaceBytes(int64_t num_heads, int64_t num_tokens) const override {
    return device_.CountPairsWorkspaceBytes(num_heads, num_tokens);
  }
  absl::Status CountPairs(const CountPairsParams& params, Workspace workspace, Stream& stream) override {
    return Run(WorkPart::kIndex, stream,
               [&](Stream& on) { return device_.CountPairs(params, workspace, on); });
  }
  absl::Status Pool(const PoolParams& params, Stream& stream) override {
    return Run(WorkPart::kIndex, stream, [&](Stream& on) { return device_.Pool(params, on); });
  }
  int64_t SelectBlocksWorkspaceBytes(int64_t num_row_blocks, int64_t num_key_blocks,
                                     int64_t head_dim) const override {
    return device_.SelectBlocksWorkspaceBytes(num_row_blocks, num_key_blocks, head_dim);
  }
  absl::Status SelectBlocks(const SelectBlocksParams& params, Workspace workspace, Stream& stream) override {
    return Run(WorkPart::kIndex, stream,
               [&](Stream& on) { return device_.SelectBlocks(params, workspace, on); });
  }
  absl::Status Representatives(const RepresentativesParams& params, Stream& stream) override {
    return Run(WorkPart::kIndex, stream, [&](Stream& on) { return device_.Representatives(params, on); });
  }
  absl::Status CoarseRepresentatives(const CoarseRepresentativesParams& params, Stream& stream) override {
    return Run(WorkPart::kIndex, stream,
               [&](Stream& on) { return device_.CoarseRepresentatives(params, on); });
  }
  int64_t ShareSelectionWorkspaceBytes(const ShareSelectionBounds& bounds) const override {
    return device_.ShareSelectionWorkspaceBytes(bounds);
  }
  absl::Status SelectByShare(const ShareSelectionParams& params, Workspace workspace,
                             Stream& stream) override {
    return Run(WorkPart::kIndex, stream,
               [&](Stream& on) { return device_.SelectByShare(params, workspace, on); });
  }
  int64_t BuildBlockListsWorkspaceBytes(int64_t num_heads, int64_t num_row_blocks) const override {
    return device_.BuildBlockListsWorkspaceBytes(num_heads, num_row_blocks);
  }
  absl::Status BuildBlockLists(const BuildBlockListsParams& params, Workspace workspace,
                               Stream& stream) override {
    return Run(WorkPart::kIndex, stream,
               [&](Stream& on) { return device_.BuildBlockLists(params, workspace, on); });
  }

 private:
  template <typename Body>
  absl::Status Run(WorkPart part, Stream& stream, const Body& body) {
    auto* recorded = dynamic_cast<RecordedStream*>(&stream);
    if (recorded == nullptr) {
      return absl::InvalidArgumentError("a recorded kernel is given a stream that nobody records");
    }
    Stream& on = recorded->of_device();
    return recorder_.Work(part, recorded->number(), on, [&] { return body(on); });
  }

  KernelSet& device_;
  StepRecorder& recorder_;
};

}  // namespace

std::unique_ptr<KernelSet> RecordKernels(KernelSet& device, StepRecorder& recorder) {
  return std::make_unique<RecordedKernelSet>(device, recorder);
}

}  // namespace longfill
