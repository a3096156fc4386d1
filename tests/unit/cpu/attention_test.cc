#include <numeric>
#include <optional>

#include "kernels/cpu/oracle/oracle.h"
#include "kernels/sparse/coverage.h"
#include "tests/testing/host_index.h"
#include "tests/unit/cpu/cpu_test_util.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

struct Head {
  SparseIndex index;
  oracle::Mask mask;
};

std::vector<int32_t> RandomPicks(int64_t below, int64_t count, uint32_t seed) {
  std::vector<int32_t> all(static_cast<size_t>(below));
  std::iota(all.begin(), all.end(), 0);
  std::shuffle(all.begin(), all.end(), std::mt19937(seed));
  all.resize(static_cast<size_t>(std::min(below, count)));
  return all;
}

Head DenseHead(int64_t n) { return {MakeDenseIndex(), oracle::DenseMask(n)}; }
Head AShapeHead(int64_t n, AShape pattern) {
  return {MakeAShapeIndex(pattern), oracle::AShapeMask(pattern, n)};
}
Head VerticalSlashHead(int64_t n, int64_t columns, int64_t distances, Coverage coverage, uint32_t seed) {
  std::vector<int32_t> c = RandomPicks(n, columns, seed);
  std::vector<int32_t> d = RandomPicks(n, distances, seed + 1);
  if (std::find(d.begin(), d.end(), 0) == d.end()) d.push_back(0);
  oracle::Mask mask = coverage == Coverage::kTiles ? oracle::TilesMask(c, d, n) : oracle::ParityMask(c, d, n);
  return {MakeVerticalSlashIndex(std::move(c), std::move(d), coverage), std::move(mask)};
}
// Without the diagonal block, so that some rows may have no key.
Head BlockHead(int64_t n, int64_t per_row, uint32_t seed) {
  const int64_t row_blocks = (n + kRowBlock - 1) / kRowBlock;
  BlockListIndex index;
  index.row_offsets.push_back(0);
  std::vector<std::vector<int32_t>> blocks;
  for (int64_t m = 0; m < row_blocks; ++m) {
    std::vector<int32_t> picks =
        RandomPicks(m + 1, m % 3 == 2 ? 0 : per_row, seed + static_cast<uint32_t>(m));
    std::sort(picks.begin(), picks.end());
    index.key_blocks.insert(index.key_blocks.end(), picks.begin(), picks.end());
    index.row_offsets.push_back(static_cast<int64_t>(index.key_blocks.size()));
    blocks.push_back(std::move(picks));
  }
  return {index, oracle::BlockMask(blocks, n)};
}

PackedIndices Pack(const std::vector<Head>& heads) {
  std::vector<SparseIndex> indices;
  indices.reserve(heads.size());
  for (const Head& head : heads) indices.push_back(head.index);
  return PackedIndices(indices);
}

// A whole prompt: inputs, indices and what the oracle makes of them.
struct Prompt {
  Prompt(int64_t n, int64_t q_heads, int64_t kv_heads, int64_t dim, std::vector<Head> kinds, uint32_t seed)
      : num_tokens(n),
        num_q_heads(q_heads),
        num_kv_heads(kv_heads),
        head_dim(dim),
        heads(std::move(kinds)),
        packed(Pack(heads)),
        indices(packed.Views(packed.data())),
        q(RandomFloats(q_heads * n * dim, seed)),
        k(RandomFloats(kv_heads * n * dim, seed + 1)),
        v(RandomFloats(kv_heads * n * dim, seed + 2)),
        scale(1.0 / std::sqrt(static_cast<double>(dim))) {
    for (const Head& head : heads) {
      masks.push_back(&head.mask);
      pairs += head.mask.CountPairs();
    }
    oracle::AttentionInput input{q.data(), k.data(), v.data(), q_heads, kv_heads, n, n, dim, scale};
    want = oracle::Attention(input, masks);
    const oracle::AttentionOutput<float> naive = oracle::NaiveFloatAttention(input, masks);
    tolerance = 2 * MaxError(naive.out, want.out) + 1e-6;
    lse_tolerance = 2 * MaxError(naive.lse, want.lse) + 2e-6;
  }
  // The entries of [num_q_heads, num_tokens, width] at the positions of a map.
  template <typename T>
  std::vector<T> Rows(const std::vector<T>& all, int64_t width, const PositionMap& map, int64_t rows) const {
    std::vector<T> result;
    for (int64_t h = 0; h < num_q_heads; ++h) {
      for (int64_t r = 0; r < rows; ++r) {
        const auto from = all.begin() + (h * num_tokens + map.Position(r)) * width;
        result.insert(result.end(), from, from + width);
      }
    }
    return result;
  }

  int64_t num_tokens, num_q_heads, num_kv_heads, head_dim;
  std::vector<Head> heads;
  PackedIndices packed;
  std::vector<IndexView> indices;
  std::vector<float> q, k, v;
  double scale;
  std::vector<const oracle::Mask*> masks;
  int64_t pairs = 0;
  oracle::AttentionOutput<double> want;
  double tolerance = 0, lse_tolerance = 0;
};

struct Result {
  std::vector<float> out, lse;
  int64_t covered = 0, computed = 0;
};

struct Piece {
  PositionMap map = PositionMap::Contiguous(0);
  int64_t rows = 0;
  int64_t key_begin = 0, key_end = 0;  // positions
  std::optional<Result> earlier;       // merged with
  bool want_lse = true;
};

Workspace AttentionWorkspace(CpuBackend& backend, int64_t head_dim) {
  return backend.WorkspaceOf(backend.kernels().AttentionWorkspaceBytes({.head_dim = head_dim}));
}

Result RunAttention(CpuBackend& backend, const Prompt& prompt, const Piece& piece) {
  const std::vector<float> q = prompt.Rows(prompt.q, prompt.head_dim, piece.map, piece.rows);
  const StridedHeads q_view(q.data(), prompt.num_q_heads, piece.rows, prompt.head_dim);
  // K and V hold the positions from key_begin to key_end only.
  const int64_t keys = piece.key_end - piece.key_begin;
  std::vector<float> k, v;
  for (int64_t h = 0; h < prompt.num_kv_heads; ++h) {
    const int64_t from = (h * prompt.num_tokens + piece.key_begin) * prompt.head_dim;
    k.insert(k.end(), prompt.k.begin() + from, prompt.k.begin() + from + keys * prompt.head_dim);
    v.insert(v.end(), prompt.v.begin() + from, prompt.v.begin() + from + keys * prompt.head_dim);
  }
  const StridedHeads k_view(k.data(), prompt.num_kv_heads, keys, prompt.head_dim, 1, 2);
  const StridedHeads v_view(v.data(), prompt.num_kv_heads, keys, prompt.head_dim, 2, 9);
  StridedHeads out_view(piece.earlier ? piece.earlier->out.data() : nullptr, prompt.num_q_heads, piece.rows,
                        prompt.head_dim, 4, 7);
  Result result;
  result.lse = piece.earlier
                   ? piece.earlier->lse
                   : std::vector<float>(static_cast<size_t>(prompt.num_q_heads * piece.rows), 77.0F);

  AttentionSequence sequence;
  sequence.q_end = piece.rows;
  sequence.k_end = keys;
  sequence.key_first = piece.key_begin;
  sequence.q_positions = piece.map;
  sequence.num_tokens = prompt.num_tokens;
  sequence.key_range_begin = piece.key_begin;
  sequence.key_range_end = piece.key_end;
  sequence.indices = prompt.indices;
  AttentionParams params;
  params.q = q_view.view();
  params.k = k_view.view();
  params.v = v_view.view();
  params.out = out_view.mutable_view();
  params.lse = piece.want_lse ? result.lse.data() : nullptr;
  params.lse_head_stride = piece.rows;
  params.num_q_heads = prompt.num_q_heads;
  params.num_kv_heads = prompt.num_kv_heads;
  params.head_dim = prompt.head_dim;
  params.scale = static_cast<float>(prompt.scale);
  params.merge = piece.earlier.has_value();
  params.sequences = {&sequence, 1};
  int64_t covered = 1000;  // counts are added to what is there
  int64_t computed = 2000;
  params.covered_pairs = &covered;
  params.computed_pairs = &computed;
  EXPECT_THAT(
      backend.kernels().Attention(params, AttentionWorkspace(backend, prompt.head_dim), backend.stream()),
      IsOk());
  result.covered = covered - 1000;
  result.computed = computed - 2000;
  EXPECT_TRUE(out_view.GapsUntouched()) << "bytes outside of the output rows were written";
  for (int64_t h = 0; h < prompt.num_q_heads; ++h) {
    for (int64_t r = 0; r < piece.rows; ++r) {
      for (int64_t i = 0; i < prompt.head_dim; ++i) result.out.push_back(out_view.At(h, r, i));
    }
  }
  return result;
}

Piece Whole(const Prompt& prompt) {
  return {PositionMap::Contiguous(0), prompt.num_tokens, 0, prompt.num_tokens, std::nullopt};
}

void ExpectMatches(const Prompt& prompt, const Piece& piece, const Result& got) {
  EXPECT_TRUE(
      Near(got.out, prompt.Rows(prompt.want.out, prompt.head_dim, piece.map, piece.rows), prompt.tolerance));
  EXPECT_TRUE(Near(got.lse, prompt.Rows(prompt.want.lse, 1, piece.map, piece.rows), prompt.lse_tolerance));
}

std::vector<Head> OneOfEach(int64_t n, uint32_t seed) {
  std::vector<Head> heads;
  heads.push_back(DenseHead(n));
  heads.push_back(AShapeHead(n, {7, 70}));
  heads.push_back(VerticalSlashHead(n, n / 8 + 1, n / 16 + 1, Coverage::kTiles, seed));
  heads.push_back(VerticalSlashHead(n, n / 8 + 1, n / 16 + 1, Coverage::kParity, seed + 7));
  heads.push_back(BlockHead(n, 2, seed + 9));
  heads.push_back(AShapeHead(n, {0, 1}));
  heads.push_back(VerticalSlashHead(n, n, 1, Coverage::kTiles, seed + 11));
  return heads;
}

class AttentionTest : public TargetTest {};
LF_INSTANTIATE_TARGETS(AttentionTest);

TEST_P(AttentionTest, EqualsTheOracleForEveryPatternAndEdgeLength) {
  CpuBackend backend(1);
  for (int64_t n : {1, 2, 63, 64, 65, 127, 128, 129, 193, 331}) {
    SCOPED_TRACE(n);
    const Prompt prompt(n, 7, 1, 32, OneOfEach(n, static_cast<uint32_t>(n)), static_cast<uint32_t>(n));
    const Result got = RunAttention(backend, prompt, Whole(prompt));
    ExpectMatches(prompt, Whole(prompt), got);
    EXPECT_EQ(got.covered, prompt.pairs);
    EXPECT_GE(got.computed, got.covered);
  }
}

TEST_P(AttentionTest, EqualsTheOracleForEveryHeadDimAndGroupSize) {
  CpuBackend backend(2);
  for (int64_t dim : {8, 32, 64, 72, 80, 96, 128, 256}) {
    for (int64_t group : {1, 4}) {
      SCOPED_TRACE(testing::Message() << "head_dim " << dim << " group " << group);
      const int64_t n = 150;
      std::vector<Head> heads;
      for (int64_t h = 0; h < 2 * group; ++h) {
        heads.push_back(h % 2 == 0 ? DenseHead(n)
                                   : VerticalSlashHead(n, 9, 5, Coverage::kTiles, static_cast<uint32_t>(h)));
      }
      const Prompt prompt(n, 2 * group, 2, dim, std::move(heads), static_cast<uint32_t>(dim + group));
      ExpectMatches(prompt, Whole(prompt), RunAttention(backend, prompt, Whole(prompt)));
    }
  }
}

TEST_P(AttentionTest, EqualsTheOracleUnderEveryPositionMap) {
  CpuBackend backend(1);
  const int64_t n = 331;
  const Prompt prompt(n, 7, 7, 16, OneOfEach(n, 3), 5);
  for (const PositionMap& map :
       {PositionMap::Contiguous(0), PositionMap::Contiguous(50), PositionMap::Contiguous(64),
        PositionMap{0, 128, 256}, PositionMap{128, 128, 256}, PositionMap{3, 5, 11}, PositionMap{17, 1, 70},
        PositionMap{60, 8, 200}, PositionMap{64, 64, 128, -64, 128}, PositionMap{0, 64, 192, 128, 64},
        PositionMap{2, 5, 11, -6, 7}}) {
    for (int64_t rows : {int64_t{1}, int64_t{40}, n}) {
      Piece piece{map, std::min(rows, map.RowsBelow(n)), 0, n, std::nullopt};
      SCOPED_TRACE(testing::Message() << ToString(map) << ", rows " << piece.rows);
      ExpectMatches(prompt, piece, RunAttention(backend, prompt, piece));
    }
  }
}

TEST_P(AttentionTest, RowsHaveTheSameBitsInEveryChunkAndOnEveryThreadCount) {
  const int64_t n = 331;
  const Prompt prompt(n, 7, 1, 32, OneOfEach(n, 4), 6);
  CpuBackend one(1);
  const Result whole = RunAttention(one, prompt, Whole(prompt));
  for (int threads : {2, 3}) {
    CpuBackend backend(threads);
    const Result got = RunAttention(backend, prompt, Whole(prompt));
    EXPECT_TRUE(SameBits(got.out, whole.out)) << threads << " threads";
    EXPECT_TRUE(SameBits(got.lse, whole.lse)) << threads << " threads";
    EXPECT_EQ(got.covered, whole.covered);
    EXPECT_EQ(got.computed, whole.computed);
  }
  // A chunk sees the keys up to its own end only.
  for (int64_t begin = 0; begin < n; begin += 75) {
    const int64_t end = std::min(n, begin + 75);
    Piece piece{PositionMap::Contiguous(begin), end - begin, 0, end, std::nullopt};
    const Result got = RunAttention(one, prompt, piece);
    EXPECT_TRUE(SameBits(got.out, prompt.Rows(whole.out, prompt.head_dim, piece.map, piece.rows))) << begin;
    EXPECT_TRUE(SameBits(got.lse, prompt.Rows(whole.lse, 1, piece.map, piece.rows))) << begin;
  }
}

TEST_P(AttentionTest, KeyRangesMergedEqualTheWhole) {
  CpuBackend backend(2);
  const int64_t n = 331;
  const Prompt prompt(n, 7, 1, 32, OneOfEach(n, 5), 7);
  for (const std::vector<int64_t>& cuts :
       {std::vector<int64_t>{0, 1, 331}, {0, 64, 65, 200, 331}, {0, 331}}) {
    Piece piece = Whole(prompt);
    int64_t covered = 0;
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      // Later keys first: the order of merges must not matter.
      piece.key_begin = cuts[cuts.size() - 2 - i];
      piece.key_end = cuts[cuts.size() - 1 - i];
      Result result = RunAttention(backend, prompt, piece);
      covered += result.covered;
      piece.earlier = std::move(result);
    }
    ExpectMatches(prompt, piece, *piece.earlier);
    EXPECT_EQ(covered, prompt.pairs);
  }
}

TEST_P(AttentionTest, RowsWithoutKeysGiveZeroAndMergeKeepsEarlierBits) {
  CpuBackend backend(1);
  const int64_t n = 200;
  std::vector<Head> heads;
  heads.push_back(DenseHead(n));
  heads.push_back(BlockHead(n, 1, 3));
  const Prompt prompt(n, 2, 1, 64, std::move(heads), 8);
  Piece piece = Whole(prompt);
  piece.key_begin = piece.key_end = 100;  // no keys at all
  const Result none = RunAttention(backend, prompt, piece);
  for (float value : none.out) ASSERT_EQ(value, 0.0F);
  for (float value : none.lse) ASSERT_EQ(value, -kTestInfinity);
  EXPECT_EQ(none.covered, 0);
  const Result whole = RunAttention(backend, prompt, Whole(prompt));
  piece.earlier = whole;
  const Result merged = RunAttention(backend, prompt, piece);
  EXPECT_TRUE(SameBits(merged.out, whole.out));
  EXPECT_TRUE(SameBits(merged.lse, whole.lse));
  // An earlier row without keys does not count, whatever it holds.
  Piece onto_garbage = Whole(prompt);
  onto_garbage.earlier = Result{std::vector<float>(whole.out.size(), std::nanf("")),
                                std::vector<float>(whole.lse.size(), -kTestInfinity)};
  const Result got = RunAttention(backend, prompt, onto_garbage);
  for (size_t i = 0; i < whole.lse.size(); ++i) {
    if (whole.lse[i] == -kTestInfinity) continue;
    for (size_t d = 0; d < 64; ++d) ASSERT_EQ(got.out[i * 64 + d], whole.out[i * 64 + d]) << i;
  }
}

TEST_P(AttentionTest, LargeScoresStayFinite) {
  CpuBackend backend(1);
  const int64_t n = 130;
  std::vector<Head> heads;
  heads.push_back(DenseHead(n));
  Prompt prompt(n, 1, 1, 32, std::move(heads), 9);
  for (float& value : prompt.q) value *= 100;
  for (float& value : prompt.k) value *= 100;
  oracle::AttentionInput input{prompt.q.data(), prompt.k.data(), prompt.v.data(), 1, 1, n, n, 32,
                               prompt.scale};
  prompt.want = oracle::Attention(input, prompt.masks);
  const oracle::AttentionOutput<float> naive = oracle::NaiveFloatAttention(input, prompt.masks);
  prompt.tolerance = 2 * MaxError(naive.out, prompt.want.out) + 1e-6;
  prompt.lse_tolerance = 2 * MaxError(naive.lse, prompt.want.lse) + 1e-6;
  ExpectMatches(prompt, Whole(prompt), RunAttention(backend, prompt, Whole(prompt)));
}

TEST_P(AttentionTest, SequencesOfABatchDoNotMix) {
  CpuBackend backend(2);
  const int64_t dim = 32;
  std::vector<Prompt> prompts;
  for (int64_t n : {65, 0, 1, 130}) {
    std::vector<Head> heads;
    if (n > 0) {
      heads.push_back(DenseHead(n));
      heads.push_back(VerticalSlashHead(n, 5, 3, Coverage::kTiles, static_cast<uint32_t>(n)));
    } else {
      heads.resize(2);
    }
    prompts.emplace_back(n, 2, 1, dim, std::move(heads), static_cast<uint32_t>(n));
  }
  const int64_t total = 65 + 0 + 1 + 130;
  std::vector<float> q(2 * total * dim), k(total * dim), v(total * dim), out(2 * total * dim), lse(2 * total);
  std::vector<float> swapped_q = q;
  std::vector<AttentionSequence> sequences;
  int64_t begin = 0;
  for (const Prompt& prompt : prompts) {
    const int64_t n = prompt.num_tokens;
    AttentionSequence sequence;
    sequence.q_begin = sequence.k_begin = begin;
    sequence.q_end = sequence.k_end = begin + n;
    sequence.q_positions = PositionMap::Contiguous(0);
    sequence.num_tokens = n;
    sequence.key_range_end = n;
    sequence.indices = prompt.indices;
    sequences.push_back(sequence);
    for (int64_t h = 0; h < 2; ++h) {
      std::copy_n(prompt.q.begin() + h * n * dim, n * dim, q.begin() + (h * total + begin) * dim);
    }
    std::copy_n(prompt.k.begin(), n * dim, k.begin() + begin * dim);
    std::copy_n(prompt.v.begin(), n * dim, v.begin() + begin * dim);
    begin += n;
  }
  const std::vector<int32_t> kv_head = {0, 0};
  AttentionParams params;
  params.q = {q.data(), total * dim, dim};
  params.k = {k.data(), total * dim, dim};
  params.v = {v.data(), total * dim, dim};
  params.out = {out.data(), total * dim, dim};
  params.lse = lse.data();
  params.lse_head_stride = total;
  params.num_q_heads = 2;
  params.num_kv_heads = 1;
  params.kv_head = kv_head;
  params.head_dim = dim;
  params.scale = static_cast<float>(prompts[0].scale);
  params.sequences = sequences;
  LF_ASSERT_OK(backend.kernels().Attention(params, AttentionWorkspace(backend, dim), backend.stream()));
  begin = 0;
  for (const Prompt& prompt : prompts) {
    const int64_t n = prompt.num_tokens;
    std::vector<float> got;
    for (int64_t h = 0; h < 2; ++h) {
      const auto from = out.begin() + (h * total + begin) * dim;
      got.insert(got.end(), from, from + n * dim);
    }
    EXPECT_TRUE(Near(got, prompt.want.out, prompt.tolerance)) << n << " tokens";
    begin += n;
  }
}

TEST(AttentionErrors, NameWhatIsWrong) {
  CpuBackend backend(1);
  const HostIndex dense(MakeDenseIndex());
  IndexView index = dense.view();
  std::vector<float> data(64 * 64);
  AttentionSequence sequence;
  sequence.q_end = sequence.k_end = sequence.num_tokens = sequence.key_range_end = 4;
  sequence.indices = {&index, 1};
  AttentionParams good;
  good.q = good.k = good.v = {data.data(), 64, 16};
  good.out = {data.data() + 1024, 64, 16};
  good.num_q_heads = good.num_kv_heads = 1;
  good.head_dim = 16;
  good.scale = 1;
  good.sequences = {&sequence, 1};
  const Workspace workspace = AttentionWorkspace(backend, 256);
  const auto run = [&](const AttentionParams& params) {
    return backend.kernels().Attention(params, workspace, backend.stream());
  };
  LF_EXPECT_OK(run(good));
  AttentionParams params = good;
  params.head_dim = 20;
  EXPECT_THAT(run(params), StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("head_dim 20")));
  params.head_dim = 264;
  EXPECT_THAT(run(params), StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("head_dim 264")));
  params = good;
  params.merge = true;
  EXPECT_THAT(run(params), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("merge")));
  params = good;
  params.num_q_heads = 3;
  params.num_kv_heads = 2;
  EXPECT_THAT(run(params), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("3 query heads")));
  const int32_t kv_head[] = {1};
  params = good;
  params.kv_head = kv_head;
  EXPECT_THAT(run(params), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("kv_head 1 of 1")));
  EXPECT_THAT(backend.kernels().Attention(good, {workspace.data, 16}, backend.stream()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("workspace of 16 bytes")));
  index.counts = nullptr;
  EXPECT_THAT(run(good), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("index of query head 0")));
  index = dense.view();
  sequence.key_range_end = 5;
  EXPECT_THAT(run(good), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("key range [0, 5)")));
  sequence.key_range_end = 4;
  sequence.num_tokens = 3;
  EXPECT_THAT(run(good), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("position 3 of 3")));
  sequence.q_end = 0;
  LF_EXPECT_OK(run(good));
}

}  // namespace
}  // namespace longfill
