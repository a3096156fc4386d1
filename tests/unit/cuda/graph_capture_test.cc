// Every operation can be captured in a graph and replayed; what the host gave it is in the graph by value.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "kernels/api/backend.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/cuda_stream.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

constexpr int64_t kRows = 40, kWidth = 256, kHeads = 4, kHeadDim = 64;
constexpr int64_t kTokens = 1024, kKvHeads = 2, kCapacity = 256, kWords = kTokens / 64, kOutliers = 4,
                  kSamples = 8, kCoarse = 3;

class GraphCaptureTest : public ::testing::Test {
 protected:
  void SetUp() override {
    absl::StatusOr<std::unique_ptr<Backend>> backend = CreateCudaBackend({});
    if (!backend.ok()) GTEST_SKIP() << backend.status().message();
    backend_ = *std::move(backend);
  }

  Buffer Array(int64_t bytes) {
    absl::StatusOr<Buffer> buffer = backend_->memory().Allocate(bytes, "a test array");
    EXPECT_THAT(buffer, IsOk());
    return buffer.ok() ? *std::move(buffer) : Buffer();
  }
  Buffer RandomArray(int64_t count, uint64_t seed) {
    Buffer buffer = Array(count * 2);
    Fill(buffer, count, seed);
    return buffer;
  }
  void Fill(const Buffer& buffer, int64_t count, uint64_t seed) {
    LF_EXPECT_OK(kernels().FillRandom(
        {.out = buffer.data(), .dtype = DType::kBFloat16, .count = count, .stddev = 1, .seed = seed},
        stream()));
  }
  std::vector<uint8_t> Download(const Buffer& from) {
    std::vector<uint8_t> bytes(static_cast<size_t>(from.size_bytes()));
    LF_EXPECT_OK(kernels().CopyOut(bytes.data(), from.data(), from.size_bytes(), stream()));
    LF_EXPECT_OK(stream().Sync());
    return bytes;
  }

  // `out` after a direct run, and after a replay of the captured run over wiped memory.
  void ExpectReplayEqual(const Buffer& out, const std::function<absl::Status()>& run) {
    LF_ASSERT_OK(kernels().Zero(out.data(), out.size_bytes(), stream()));
    LF_ASSERT_OK(run());
    const std::vector<uint8_t> want = Download(out);
    LF_ASSERT_OK_AND_ASSIGN(const cudaStream_t cuda_stream, CudaStreamOf(stream()));
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    LF_ASSERT_OK(CudaStatus(cudaStreamBeginCapture(cuda_stream, cudaStreamCaptureModeThreadLocal),
                            "cudaStreamBeginCapture"));
    const absl::Status captured = run();
    LF_ASSERT_OK(CudaStatus(cudaStreamEndCapture(cuda_stream, &graph), "cudaStreamEndCapture"));
    LF_ASSERT_OK(captured);
    LF_ASSERT_OK(CudaStatus(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate"));
    LF_ASSERT_OK(kernels().Zero(out.data(), out.size_bytes(), stream()));
    LF_ASSERT_OK(CudaStatus(cudaGraphLaunch(executable, cuda_stream), "cudaGraphLaunch"));
    EXPECT_TRUE(Download(out) == want);
    EXPECT_NE(want, std::vector<uint8_t>(want.size())) << "the run has written nothing";
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
  }

  KernelSet& kernels() { return backend_->kernels(); }
  Stream& stream() { return backend_->stream(); }
  std::unique_ptr<Backend> backend_;
};

TEST_F(GraphCaptureTest, CopiesAndFills) {
  const Buffer out = Array(kRows * kWidth * 2);
  const Buffer from = RandomArray(kRows * kWidth, 1);
  ExpectReplayEqual(out, [&] {
    return kernels().Copy2D({out.data(), kWidth * 2, from.data(), kWidth * 2, 128, kRows}, stream());
  });
  ExpectReplayEqual(out, [&] {
    return kernels().FillRandom(
        {.out = out.data(), .dtype = DType::kBFloat16, .count = kRows * kWidth, .seed = 2}, stream());
  });
  // The host array is gone when the graph runs.
  ExpectReplayEqual(out, [&] {
    const std::vector<uint8_t> host(static_cast<size_t>(out.size_bytes()), 5);
    return kernels().CopyIn(out.data(), host.data(), out.size_bytes(), stream());
  });
  ExpectReplayEqual(out, [&] {
    LF_RETURN_IF_ERROR(kernels().Zero(out.data(), 64, stream()));
    return kernels().Copy2D({out.as<char>() + 64, 0, from.data(), 0, 64, 1}, stream());
  });
}

TEST_F(GraphCaptureTest, LinearParts) {
  const Buffer x = RandomArray(kRows * kWidth, 1);
  const Buffer weight = RandomArray(kWidth * kWidth, 2);
  const Buffer bias = RandomArray(kWidth, 3);
  const Buffer norm = Array(kWidth * 4);
  LF_ASSERT_OK(kernels().FillRandom({.out = norm.data(), .count = kWidth, .stddev = 1, .seed = 4}, stream()));
  const Buffer ids = Array(kRows * 4);
  LF_ASSERT_OK(kernels().Zero(ids.data(), kRows * 4, stream()));
  const Buffer out = Array(kRows * kWidth * 2);
  const int64_t workspace_bytes = kernels().GemmWorkspaceBytes(kRows, kWidth, kWidth);
  const Buffer workspace = Array(workspace_bytes);
  const std::vector<double> inv_freq(kHeadDim / 2, 0.01);

  ExpectReplayEqual(out, [&] {
    return kernels().Embed(
        {ids.as<int32_t>(), kRows, weight.data(), DType::kBFloat16, kWidth, kWidth, out.data()}, stream());
  });
  ExpectReplayEqual(out, [&] {
    return kernels().RmsNorm({x.data(), norm.as<float>(), 1e-5F, kRows, kWidth, out.data()}, stream());
  });
  ExpectReplayEqual(out, [&] {
    GemmParams params;
    params.x = x.data();
    params.x_stride = params.in_width = params.out_width = params.out_stride = kWidth;
    params.weight = weight.data();
    params.bias = bias.data();
    params.weight_dtype = params.out_dtype = DType::kBFloat16;
    params.num_rows = kRows;
    params.out = out.data();
    return kernels().Gemm(params, {workspace.data(), workspace_bytes}, stream());
  });
  ExpectReplayEqual(out, [&] {
    return kernels().GatedActivation(
        {x.data(), x.data(), kWidth, Activation::kSilu, kRows, kWidth, out.data()}, stream());
  });
  ExpectReplayEqual(out, [&] {
    return kernels().Rotary({.x = x.data(),
                             .x_stride = kWidth,
                             .inv_freq = inv_freq,
                             .rotary_dim = kHeadDim,
                             .positions = PositionMap::Contiguous(1000),
                             .num_rows = kRows,
                             .num_heads = kHeads,
                             .head_dim = kHeadDim,
                             .out = out.data(),
                             .head_stride = kRows * kHeadDim},
                            stream());
  });
}

// The selection of a layer and its attention, in one graph: nothing in between needs the host.
class LayerGraphTest : public GraphCaptureTest {
 protected:
  void SetUp() override {
    GraphCaptureTest::SetUp();
    if (IsSkipped()) return;
    q_ = RandomArray(kHeads * kTokens * kHeadDim, 1);
    k_ = RandomArray(kKvHeads * kTokens * kHeadDim, 2);
    v_ = RandomArray(kKvHeads * kTokens * kHeadDim, 3);
    out_ = Array(kHeads * kTokens * kHeadDim * 2);
    row_max_ = Array(kHeads * kMaxSelectingQueries * 4);
    row_sum_ = Array(kHeads * kMaxSelectingQueries * 8);
    slash_ = Array(kHeads * (kTokens / kSelectionBlock) * kDiagonalWindow * 4);
    scores_ = Array(2 * kHeads * kTokens * 4);
    cuts_ = Array(2 * kHeads * static_cast<int64_t>(sizeof(SelectionCut)));
    histogram_ = Array(2 * kHeads * kSelectionBins * 8);
    bits_ = Array(2 * kHeads * kWords * 8);
    columns_ = Array(kHeads * kCapacity * 4);
    distances_ = Array(kHeads * kCapacity * 4);
    runs_ = Array(kHeads * kCapacity * static_cast<int64_t>(sizeof(DistanceRun)));
    counts_ = Array(kHeads * static_cast<int64_t>(sizeof(IndexCounts)));
    pairs_ = Array(kHeads * static_cast<int64_t>(sizeof(PairCounts)));
    representatives_ = Array(NumRepresentatives(kSamples, kOutliers) * kWords * kHeadDim * 2);
    coarse_ = Array(NumRepresentatives(kSamples, kCoarse) * (kWords / kCoarseBlocks) * kHeadDim * 2);
    row_offsets_ = Array(kHeads * (kWords + 1) * 8);
    key_blocks_ = Array(kHeads * kWords * (kWords + 1) / 2 * 4);
    num_entries_ = Array(8);
    bounds_ = {.num_q_heads = kHeads, .num_q_rows = kTokens, .head_dim = kHeadDim};
    workspace_ = Array(std::max({kernels().LastQueryWorkspaceBytes(kHeads, kTokens, kHeadDim),
                                 kernels().BuildIndexWorkspaceBytes(kHeads, kWords),
                                 kernels().CountPairsWorkspaceBytes(kHeads, kTokens),
                                 kernels().ShareSelectionWorkspaceBytes(
                                     {.num_heads = kHeads / kKvHeads,
                                      .num_rows = kTokens,
                                      .num_representatives = NumRepresentatives(kSamples, kOutliers),
                                      .num_key_blocks = kWords,
                                      .head_dim = kHeadDim,
                                      .num_coarse = kCoarse,
                                      .num_samples = kSamples,
                                      .fp8 = true}),
                                 kernels().BuildBlockListsWorkspaceBytes(kHeads / kKvHeads, kWords),
                                 kernels().AttentionWorkspaceBytes(bounds_)}));
  }

  Workspace workspace() { return {workspace_.data(), workspace_.size_bytes()}; }
  absl::Status Score();
  absl::Status Select();
  absl::Status Build(std::vector<IndexView>* indices);
  absl::Status Attend(const std::vector<IndexView>& indices);
  absl::Status SelectShares(const BlockShare& pattern, std::vector<IndexView>* indices);
  absl::Status ShareLayer(const BlockShare& pattern) {
    std::vector<IndexView> indices;
    LF_RETURN_IF_ERROR(SelectShares(pattern, &indices));
    return Attend(indices);
  }
  absl::Status Layer() {
    LF_RETURN_IF_ERROR(Score());
    LF_RETURN_IF_ERROR(Select());
    std::vector<IndexView> indices;
    LF_RETURN_IF_ERROR(Build(&indices));
    return Attend(indices);
  }

  AttentionBounds bounds_;
  Buffer q_, k_, v_, out_, row_max_, row_sum_, slash_, scores_, cuts_, histogram_, bits_;
  Buffer columns_, distances_, runs_, counts_, pairs_, workspace_;
  Buffer representatives_, coarse_, row_offsets_, key_blocks_, num_entries_;
};

absl::Status LayerGraphTest::Score() {
  const std::vector<int32_t> heads = {0, 1, 2, 3};
  const int64_t first_query = kTokens - kMaxSelectingQueries;
  LastQueryParams params;
  params.q = {Advance(q_.data(), first_query * kHeadDim, DType::kBFloat16), kTokens * kHeadDim, kHeadDim};
  params.num_queries = kMaxSelectingQueries;
  params.first_query_position = first_query;
  params.k = {k_.data(), kTokens * kHeadDim, kHeadDim};
  params.num_keys = kTokens;
  params.heads = heads;
  params.num_q_heads = kHeads;
  params.num_kv_heads = kKvHeads;
  params.head_dim = kHeadDim;
  params.scale = 0.125F;
  auto* row_max = row_max_.as<float>();
  auto* row_sum = row_sum_.as<uint64_t>();
  LF_RETURN_IF_ERROR(kernels().LastQueryRowMax(params, row_max, workspace(), stream()));
  LF_RETURN_IF_ERROR(kernels().LastQueryRowSum(params, row_max, row_sum, workspace(), stream()));
  // Vertical scores are lists 0, 2, 4, ..., slash scores come between them.
  LF_RETURN_IF_ERROR(kernels().LastQueryScore(params, row_max, row_sum,
                                              {scores_.as<float>(), 2 * kTokens, slash_.as<float>()},
                                              workspace(), stream()));
  return kernels().JoinScores({.slash = slash_.as<float>(),
                               .num_heads = kHeads,
                               .num_keys = kTokens,
                               .last_query = kTokens - 1,
                               .forced_keys = 30,
                               .forced_distances = 100,
                               .scores = scores_.as<float>(),
                               .score_stride = kTokens},
                              stream());
}

absl::Status LayerGraphTest::Select() {
  const std::vector<int64_t> budgets = {40, 120, 50, 130, 60, 140, 70, 150};
  const SelectionLists lists = {.scores = scores_.as<float>(),
                                .list_stride = kTokens,
                                .num_entries = kTokens,
                                .num_lists = 2 * kHeads,
                                .last_query = kTokens - 1};
  auto* cuts = cuts_.as<SelectionCut>();
  LF_RETURN_IF_ERROR(kernels().SelectionStart(budgets, cuts, stream()));
  for (int pass = 0; pass < kSelectionPasses; ++pass) {
    LF_RETURN_IF_ERROR(kernels().SelectionHistogram(lists, pass, cuts, histogram_.as<uint64_t>(), stream()));
    LF_RETURN_IF_ERROR(
        kernels().SelectionAdvance(2 * kHeads, pass, histogram_.as<uint64_t>(), cuts, stream()));
  }
  LF_RETURN_IF_ERROR(kernels().Zero(bits_.data(), bits_.size_bytes(), stream()));
  return kernels().SelectionMark(lists, cuts, bits_.as<uint64_t>(), kWords, stream());
}

absl::Status LayerGraphTest::Build(std::vector<IndexView>* indices) {
  std::vector<IndexBuffers> buffers;
  for (int64_t h = 0; h < kHeads; ++h) {
    buffers.push_back({columns_.as<int32_t>() + h * kCapacity, distances_.as<int32_t>() + h * kCapacity,
                       runs_.as<DistanceRun>() + h * kCapacity, counts_.as<IndexCounts>() + h, kCapacity,
                       kCapacity, kCapacity});
    indices->push_back({.columns = buffers.back().columns,
                        .distances = buffers.back().distances,
                        .runs = buffers.back().runs,
                        .counts = buffers.back().counts});
  }
  LF_RETURN_IF_ERROR(kernels().BuildIndex(
      {.bits = bits_.as<uint64_t>(), .words_per_list = kWords, .out = buffers}, workspace(), stream()));
  return kernels().CountPairs({.indices = *indices, .num_tokens = kTokens, .counts = pairs_.as<PairCounts>()},
                              workspace(), stream());
}

absl::Status LayerGraphTest::Attend(const std::vector<IndexView>& indices) {
  const AttentionSequence sequence = {.q_end = kTokens,
                                      .k_end = kTokens,
                                      .num_tokens = kTokens,
                                      .key_range_end = kTokens,
                                      .indices = indices};
  AttentionParams params;
  params.q = {q_.data(), kTokens * kHeadDim, kHeadDim};
  params.k = {k_.data(), kTokens * kHeadDim, kHeadDim};
  params.v = {v_.data(), kTokens * kHeadDim, kHeadDim};
  params.out = {out_.data(), kTokens * kHeadDim, kHeadDim};
  params.num_q_heads = kHeads;
  params.num_kv_heads = kKvHeads;
  params.head_dim = kHeadDim;
  params.scale = 0.125F;
  params.sequences = {&sequence, 1};
  return kernels().Attention(params, workspace(), stream());
}

// 64 tokens are a block, and as many blocks a word of bits: row blocks and key blocks number kWords, and a
// row of bits is one word.
absl::Status LayerGraphTest::SelectShares(const BlockShare& pattern, std::vector<IndexView>* indices) {
  const int64_t num_representatives = NumRepresentatives(pattern.samples, pattern.outliers);
  constexpr int64_t kGroup = kHeads / kKvHeads;
  LF_RETURN_IF_ERROR(kernels().Zero(num_entries_.data(), 8, stream()));
  for (int64_t kv_head = 0; kv_head < kKvHeads; ++kv_head) {
    const int64_t first_head = kv_head * kGroup;
    LF_RETURN_IF_ERROR(kernels().Representatives(
        {.k = {Advance(k_.data(), kv_head * kTokens * kHeadDim, DType::kBFloat16), 0, kHeadDim},
         .num_heads = 1,
         .num_keys = kTokens,
         .head_dim = kHeadDim,
         .num_outliers = pattern.outliers,
         .num_samples = pattern.samples,
         .out = representatives_.data()},
        stream()));
    if (pattern.coarse > 0) {
      LF_RETURN_IF_ERROR(kernels().CoarseRepresentatives({.representatives = representatives_.data(),
                                                          .num_representatives = num_representatives,
                                                          .num_samples = pattern.samples,
                                                          .num_key_blocks = kWords,
                                                          .head_dim = kHeadDim,
                                                          .num_coarse = pattern.coarse,
                                                          .out = coarse_.data()},
                                                         stream()));
    }
    const std::vector<float> min_share = {0.1F, 0.3F};
    LF_RETURN_IF_ERROR(
        kernels().SelectByShare({.q = {Advance(q_.data(), first_head * kTokens * kHeadDim, DType::kBFloat16),
                                       kTokens * kHeadDim, kHeadDim},
                                 .num_heads = kGroup,
                                 .num_rows = kTokens,
                                 .representatives = representatives_.data(),
                                 .num_representatives = num_representatives,
                                 .num_samples = pattern.samples,
                                 .own_k = Advance(k_.data(), kv_head * kTokens * kHeadDim, DType::kBFloat16),
                                 .own_k_row_stride = kHeadDim,
                                 .num_key_blocks = kWords,
                                 .coarse = coarse_.data(),
                                 .num_coarse = pattern.coarse,
                                 .fp8 = pattern.fp8,
                                 .head_dim = kHeadDim,
                                 .scale = 0.125F,
                                 .min_share = min_share,
                                 .bits = bits_.as<uint64_t>(),
                                 .words_per_row = 1},
                                workspace(), stream()));
    LF_RETURN_IF_ERROR(
        kernels().BuildBlockLists({.bits = bits_.as<uint64_t>(),
                                   .words_per_row = 1,
                                   .num_heads = kGroup,
                                   .num_row_blocks = kWords,
                                   .row_offsets = row_offsets_.as<int64_t>() + first_head * (kWords + 1),
                                   .row_offsets_stride = kWords + 1,
                                   .key_blocks = key_blocks_.as<int32_t>(),
                                   .capacity = key_blocks_.size_bytes() / 4,
                                   .num_entries = num_entries_.as<int64_t>()},
                                  workspace(), stream()));
  }
  for (int64_t h = 0; h < kHeads; ++h) {
    indices->push_back({.form = IndexView::Form::kBlockList,
                        .row_offsets = row_offsets_.as<int64_t>() + h * (kWords + 1),
                        .key_blocks = key_blocks_.as<int32_t>()});
  }
  return kernels().CountPairs({.indices = *indices, .num_tokens = kTokens, .counts = pairs_.as<PairCounts>()},
                              workspace(), stream());
}

TEST_F(LayerGraphTest, ShareSelectionAndAttention) {
  for (const BlockShare& pattern :
       {BlockShare{kOutliers, 0.1, kSamples}, BlockShare{kOutliers, 0.1, 0, kCoarse},
        BlockShare{kOutliers, 0.1, kSamples, kCoarse}, BlockShare{kOutliers, 0.1, kSamples, 0, true},
        BlockShare{kOutliers, 0.1, kSamples, kCoarse, true}}) {
    SCOPED_TRACE(ToString(pattern));
    ExpectReplayEqual(out_, [&] { return ShareLayer(pattern); });
    ExpectReplayEqual(pairs_, [&] { return ShareLayer(pattern); });
    ExpectReplayEqual(num_entries_, [&] { return ShareLayer(pattern); });
  }
}

TEST_F(LayerGraphTest, SelectionAndAttention) {
  ExpectReplayEqual(out_, [&] { return Layer(); });
  ExpectReplayEqual(pairs_, [&] { return Layer(); });
}

}  // namespace
}  // namespace longfill
