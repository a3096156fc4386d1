#include "kernels/sparse/coverage.h"
#include "tests/contract/attention_fixture.h"
#include "tests/testing/host_index.h"
#include "tests/testing/sanitized.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

LF_INSTANTIATE_BACKENDS(AttentionTest);

TEST_P(AttentionTest, EqualsTheOracleForEveryPatternAndEdgeLength) {
  for (int64_t n : {1, 2, 63, 64, 65, 127, 128, 129, 193, 331}) {
    SCOPED_TRACE(n);
    const auto seed = static_cast<uint32_t>(n);
    const Prompt prompt = NewPrompt(n, 2, 64, OneOfEach(n, seed), seed);
    ExpectRight(prompt, Whole(prompt));
  }
}

TEST_P(AttentionTest, EqualsTheOracleForEachHeadAloneAtAThousandTokens) {
  const int64_t n = 1000;
  for (const Head& head : OneOfEach(n, 17)) {
    SCOPED_TRACE(head.name);
    const Prompt prompt = NewPrompt(n, 1, 64, {head}, 18);
    ExpectRight(prompt, Whole(prompt));
  }
}

TEST_P(AttentionTest, EqualsTheOracleForEveryHeadDimAndGroupSize) {
  const int64_t n = 201;
  for (int64_t dim : {64, 96, 128, 256}) {
    for (int64_t group : {1, 4, 7, 8}) {
      SCOPED_TRACE(testing::Message() << "head_dim " << dim << " group " << group);
      std::vector<Head> heads;
      for (int64_t h = 0; h < 2 * group; ++h) {
        const auto seed = static_cast<uint32_t>(h);
        heads.push_back(h % 3 == 0 ? DenseHead() : RandomVerticalSlash(n, 30, 3, Coverage::kTiles, seed));
      }
      const Prompt prompt = NewPrompt(n, 2, dim, std::move(heads), static_cast<uint32_t>(dim + group));
      ExpectRight(prompt, Whole(prompt));
    }
  }
}

TEST_P(AttentionTest, HeadsReadTheKvHeadsOfTheMap) {
  const Prompt prompt = NewPrompt(140, 3, 128, OneOfEach(140, 2), 3, {2, 0, 2, 2, 1, 0, 2, 1, 0, 2});
  ExpectRight(prompt, Whole(prompt));
}

TEST_P(AttentionTest, EqualsTheOracleUnderEveryPositionMap) {
  const int64_t n = 331;
  const Prompt prompt = NewPrompt(n, 10, 64, OneOfEach(n, 3), 5);
  for (const PositionMap& map :
       {PositionMap::Contiguous(0), PositionMap::Contiguous(50), PositionMap::Contiguous(64),
        PositionMap{0, 128, 256}, PositionMap{128, 128, 256}, PositionMap{64, 64, 192}, PositionMap{3, 5, 11},
        PositionMap{17, 1, 70}, PositionMap{60, 8, 200}, PositionMap{0, 64, 128, 64},
        PositionMap{64, 64, 128, -64}, PositionMap{64, 64, 128, -64, 128}, PositionMap{0, 64, 192, 128, 64},
        PositionMap{2, 5, 11, -6, 7}}) {
    for (int64_t rows : {int64_t{1}, int64_t{40}, n}) {
      Piece piece = Whole(prompt);
      piece.map = map;
      piece.rows = std::min(rows, map.RowsBelow(n));
      SCOPED_TRACE(testing::Message() << ToString(map) << ", rows " << piece.rows);
      ExpectRight(prompt, piece);
    }
  }
}

TEST_P(AttentionTest, ChunksOverTheKeysSoFarCoverWhatTheWholeDoes) {
  const int64_t n = 331;
  const Prompt prompt = NewPrompt(n, 2, 96, OneOfEach(n, 4), 6);
  int64_t covered = 0;
  for (int64_t begin = 0; begin < n; begin += 75) {
    SCOPED_TRACE(begin);
    const int64_t end = std::min(n, begin + 75);
    const Piece piece{.map = PositionMap::Contiguous(begin), .rows = end - begin, .key_end = end};
    ExpectRight(prompt, piece);
    covered += Run(prompt, piece).covered;
  }
  EXPECT_EQ(covered, Run(prompt, Whole(prompt)).covered);
}

TEST_P(AttentionTest, KeyRangesMergedEqualTheWhole) {
  const int64_t n = 331;
  const Prompt prompt = NewPrompt(n, 2, 128, OneOfEach(n, 5), 7);
  const Expected expected = Expect(prompt, Whole(prompt), PositionsOf(Whole(prompt)));
  for (const std::vector<int64_t>& cuts :
       {std::vector<int64_t>{0, 331}, {0, 1, 331}, {0, 64, 65, 200, 331}, {0, 180, 331}}) {
    Piece piece = Whole(prompt);
    int64_t covered = 0;
    for (size_t i = cuts.size() - 1; i > 0; --i) {  // later keys first: the order must not matter
      piece.key_begin = cuts[i - 1];
      piece.key_end = cuts[i];
      Result result = Run(prompt, piece);
      covered += result.covered;
      piece.earlier = std::move(result);
    }
    SCOPED_TRACE(testing::Message() << cuts.size() - 1 << " ranges");
    // Each merge rounds the result to the compute dtype once more.
    const double rounding = static_cast<double>(cuts.size() - 2) * epsilon() * 4;
    EXPECT_TRUE(Near(piece.earlier->out, expected.want.out, expected.tolerance + rounding));
    EXPECT_TRUE(Near(piece.earlier->lse, expected.want.lse, 2 * expected.lse_tolerance));
    EXPECT_EQ(covered, expected.covered_pairs);
  }
}

TEST_P(AttentionTest, RowsWithoutKeysGiveZeroAndMergeKeepsEarlierBits) {
  const int64_t n = 200;
  const Prompt prompt = NewPrompt(n, 1, 64, {DenseHead(), BlockHead(n, 1, false, 3)}, 8);
  Piece none = Whole(prompt);
  none.key_begin = none.key_end = 100;
  const Result nothing = Run(prompt, none);
  for (float value : nothing.out) ASSERT_EQ(value, 0.0F);
  for (float value : nothing.lse) ASSERT_EQ(value, -kInfinity);
  EXPECT_EQ(nothing.covered, 0);
  const Result whole = Run(prompt, Whole(prompt));
  none.earlier = whole;
  const Result merged = Run(prompt, none);
  EXPECT_TRUE(SameBits(merged.out, whole.out));
  EXPECT_TRUE(SameBits(merged.lse, whole.lse));
  // An earlier row without keys does not count, whatever it holds.
  Piece onto_garbage = Whole(prompt);
  onto_garbage.earlier =
      Result{std::vector<float>(whole.out.size(), kNaN), std::vector<float>(whole.lse.size(), -kInfinity)};
  const Result got = Run(prompt, onto_garbage);
  int64_t empty = 0;
  for (size_t i = 0; i < whole.lse.size(); ++i) {
    empty += whole.lse[i] == -kInfinity ? 1 : 0;
    if (whole.lse[i] == -kInfinity) continue;
    for (size_t d = 0; d < 64; ++d) ASSERT_EQ(got.out[i * 64 + d], whole.out[i * 64 + d]) << i;
  }
  EXPECT_GT(empty, 0);
}

TEST_P(AttentionTest, LayoutAndLimitsDoNotChangeBits) {
  const int64_t n = 700;
  const Prompt prompt = NewPrompt(n, 2, 128, OneOfEach(n, 21), 22);
  const Result first = Run(prompt, Whole(prompt));
  for (int cta_limit : {0, 1, 7}) {
    for (bool token_major : {false, true}) {
      Piece piece = Whole(prompt);
      piece.cta_limit = cta_limit;
      piece.token_major = token_major;
      piece.gap = token_major ? 0 : 24;
      SCOPED_TRACE(testing::Message() << "limit " << cta_limit << " token-major " << token_major);
      const Result got = Run(prompt, piece);
      EXPECT_TRUE(SameBits(got.out, first.out));
      EXPECT_TRUE(SameBits(got.lse, first.lse));
      EXPECT_EQ(got.covered, first.covered);
      EXPECT_EQ(got.computed, first.computed);
    }
  }
  Piece piece = Whole(prompt);
  piece.want_lse = false;
  EXPECT_TRUE(SameBits(Run(prompt, piece).out, first.out));
}

TEST_P(AttentionTest, LargeScoresStayFinite) {
  const int64_t n = 130;
  Prompt prompt = NewPrompt(n, 1, 64, {DenseHead(), RandomVerticalSlash(n, 9, 2, Coverage::kTiles, 1)}, 9);
  for (float& value : prompt.q) value *= 64;
  for (float& value : prompt.k) value *= 64;
  const Result got = Run(prompt, Whole(prompt));
  const Expected expected = Expect(prompt, Whole(prompt), PositionsOf(Whole(prompt)));
  // Nearly all rows have one probability of 1, with which the naive result is exact. Here it may be rounded,
  // like the result, whose values are up to 4.
  EXPECT_TRUE(Near(got.out, expected.want.out, expected.tolerance + 2 * 4 * epsilon()));
  EXPECT_TRUE(Near(got.lse, expected.want.lse, expected.lse_tolerance));
}

TEST_P(AttentionTest, SequencesOfABatchDoNotMix) {
  const int64_t dim = 64;
  std::vector<Prompt> prompts;
  for (int64_t n : {65, 1, 130, 300}) {
    const auto seed = static_cast<uint32_t>(n);
    prompts.push_back(NewPrompt(
        n, 1, dim,
        {DenseHead(), RandomVerticalSlash(n, 5, 3, Coverage::kTiles, seed), BlockHead(n, 2, true, 1)}, seed));
  }
  const int64_t total = 65 + 1 + 130 + 300;
  std::vector<float> q(3 * total * dim), k(total * dim), v(total * dim);
  std::vector<std::vector<IndexView>> indices;
  std::vector<AttentionSequence> sequences;
  indices.reserve(prompts.size());
  int64_t begin = 0;
  for (const Prompt& prompt : prompts) {
    const int64_t n = prompt.num_tokens;
    indices.push_back(UploadHeads(prompt.heads));
    sequences.push_back({.q_begin = begin, .q_end = begin});  // one without rows before each
    sequences.push_back({.q_begin = begin,
                         .q_end = begin + n,
                         .k_begin = begin,
                         .k_end = begin + n,
                         .q_positions = PositionMap::Contiguous(0),
                         .num_tokens = n,
                         .key_range_end = n,
                         .indices = indices.back()});
    for (int64_t h = 0; h < 3; ++h) {
      std::copy_n(prompt.q.begin() + h * n * dim, n * dim, q.begin() + (h * total + begin) * dim);
    }
    std::copy_n(prompt.k.begin(), n * dim, k.begin() + begin * dim);
    std::copy_n(prompt.v.begin(), n * dim, v.begin() + begin * dim);
    begin += n;
  }
  const Buffer q_memory = UploadCompute(q), k_memory = UploadCompute(k), v_memory = UploadCompute(v);
  const Buffer out_memory = ComputeArray(3 * total * dim), lse_memory = Bytes(3 * total * 4);
  AttentionParams params = ParamsOf(prompts[0]);
  params.kv_head = {};
  params.q = {q_memory.data(), total * dim, dim};
  params.k = {k_memory.data(), total * dim, dim};
  params.v = {v_memory.data(), total * dim, dim};
  params.out = {out_memory.data(), total * dim, dim};
  params.lse = lse_memory.as<float>();
  params.lse_head_stride = total;
  params.sequences = sequences;
  LF_ASSERT_OK(Attention(params));
  const std::vector<float> out = DownloadCompute(out_memory.data(), 3 * total * dim);
  begin = 0;
  for (const Prompt& prompt : prompts) {
    const int64_t n = prompt.num_tokens;
    std::vector<float> got;
    for (int64_t h = 0; h < 3; ++h) {
      const auto from = out.begin() + (h * total + begin) * dim;
      got.insert(got.end(), from, from + n * dim);
    }
    const Expected expected = Expect(prompt, Whole(prompt), PositionsOf(Whole(prompt)));
    EXPECT_TRUE(Near(got, expected.want.out, expected.tolerance)) << n << " tokens";
    begin += n;
  }
}

TEST_P(AttentionTest, LongPromptsCoverWhatTheHostCounts) {
  const int64_t n = on_gpu() ? 9001 : 2049;
  std::vector<Head> heads = OneOfEach(n, 31);
  heads.push_back(RandomVerticalSlash(n, n / 3, n / 3, Coverage::kParity, 32));
  heads.push_back(RandomVerticalSlash(n, 600, 40, Coverage::kParity, 33));
  heads.push_back(RandomVerticalSlash(n, 600, 40, Coverage::kTiles, 34));
  heads.push_back(RandomVerticalSlash(n, n / 2, n / 100, Coverage::kTiles, 35));
  const Prompt prompt = NewPrompt(n, 2, 64, std::move(heads), 36);
  const Result got = Run(prompt, Whole(prompt));
  int64_t covered = 0;
  for (const Head& head : prompt.heads) {
    TileKeys keys;
    const HostIndex index(head.index);
    for (int64_t m = 0; m * kRowBlock < n; ++m) {
      ExpandTile(index.view(), m, n, &keys);
      covered += CountTilePairs(keys, m, n);
    }
  }
  EXPECT_EQ(got.covered, covered);
  std::vector<int64_t> positions = {0, 1, n - 1};
  for (int32_t position : RandomPicks(n, 20, 37)) positions.push_back(position);
  const Expected expected = Expect(prompt, Whole(prompt), positions);
  std::vector<float> out, lse;
  for (int64_t head = 0; head < prompt.num_q_heads; ++head) {
    for (int64_t position : positions) {
      const int64_t at = head * n + position;
      out.insert(out.end(), got.out.begin() + at * 64, got.out.begin() + (at + 1) * 64);
      lse.push_back(got.lse[at]);
    }
  }
  EXPECT_TRUE(Near(out, expected.want.out, expected.tolerance));
  EXPECT_TRUE(Near(lse, expected.want.lse, expected.lse_tolerance));
}

TEST_P(AttentionTest, RandomIndicesMapsAndRanges) {
  const int num_cases = on_gpu() ? 60 : kSanitized ? 8 : 25;
  for (int seed = 0; seed < num_cases; ++seed) {
    std::mt19937 random(static_cast<uint32_t>(seed));
    const auto below = [&](int64_t limit) {
      return static_cast<int64_t>(random() % static_cast<uint64_t>(limit));
    };
    const int64_t n = 1 + below(below(2) == 0 ? 200 : 900);
    std::vector<Head> heads;
    for (int64_t h = 0; h < 4; ++h) {
      const auto index_seed = static_cast<uint32_t>(100 * seed + h);
      switch (below(6)) {
        case 0:
          heads.push_back(AShapeHead({below(n + 10), 1 + below(n + 10)}));
          break;
        case 1:
          heads.push_back(BlockHead(n, 1 + below(n / 64 + 2), below(2) == 0, index_seed));
          break;
        case 2:
          heads.push_back(ExactHead({{below(5), 6 + below(70), true}, {200, 201 + below(300), true}},
                                    RandomPicks(n, below(n + 1), index_seed)));
          break;
        default:
          heads.push_back(RandomVerticalSlash(n, below(n + 1), below(below(2) == 0 ? 9 : n + 1),
                                              below(3) == 0 ? Coverage::kParity : Coverage::kTiles,
                                              index_seed));
      }
    }
    const int64_t dims[] = {64, 96, 128, 256};
    const Prompt prompt = NewPrompt(n, below(2) == 0 ? 2 : 4, dims[below(4)], std::move(heads),
                                    static_cast<uint32_t>(1000 + seed));
    Piece piece = Whole(prompt);
    if (below(2) == 0) {
      const int64_t block = below(2) == 0 ? 128 : 1 + below(150);
      piece.map = {below(n), block, block * (1 + below(3)) + (below(2) == 0 ? 0 : below(64))};
      piece.rows = piece.map.RowsBelow(n);
    }
    if (below(2) == 0) {
      piece.key_begin = below(n);
      piece.key_end = piece.key_begin + below(n - piece.key_begin + 1);
    }
    piece.token_major = below(2) == 0;
    piece.cta_limit = below(2) == 0 ? 0 : 5;
    SCOPED_TRACE(testing::Message() << "seed " << seed << ", " << n << " tokens, head_dim " << prompt.head_dim
                                    << ", keys [" << piece.key_begin << ", " << piece.key_end << "), map "
                                    << piece.map.first << " " << piece.map.block << " " << piece.map.stride);
    ExpectRight(prompt, piece);
    if (HasFailure()) return;  // the first one says enough
  }
}

// One array of 6.4 GB holds everything, rows 32 MiB apart: rows, heads and sums of both lie beyond 2^31
// elements.
TEST_P(AttentionTest, OffsetsBeyond32Bits) {
  if (!on_gpu()) GTEST_SKIP() << "takes 6.4 GB in 16 bits";
  const int64_t n = 100;
  const int64_t dim = 128;
  const int64_t row_stride = int64_t{1} << 24;
  const int64_t head_stride = n * row_stride;
  const Prompt prompt =
      NewPrompt(n, 2, dim, {DenseHead(), RandomVerticalSlash(n, 20, 4, Coverage::kTiles, 1)}, 40);
  absl::StatusOr<Buffer> memory = backend().memory().Allocate(2 * 2 * head_stride, "a sparse test array");
  if (!memory.ok()) GTEST_SKIP() << memory.status().message();
  char* base = memory->as<char>();
  const int64_t row_bytes = 2 * dim;
  const auto place = [&](int64_t number) { return base + number * row_bytes; };
  const auto spread = [&](const std::vector<float>& rows, int64_t number) {
    const Buffer dense = UploadCompute(rows);
    LF_EXPECT_OK(kernels().Copy2D({.to = place(number),
                                   .to_pitch = 2 * row_stride,
                                   .from = dense.data(),
                                   .from_pitch = row_bytes,
                                   .row_bytes = row_bytes,
                                   .rows = 2 * n},
                                  stream()));
    LF_EXPECT_OK(stream().Sync());
  };
  spread(prompt.q, 0);
  spread(prompt.k, 1);
  spread(prompt.v, 2);
  const std::vector<IndexView> indices = UploadHeads(prompt.heads);
  const AttentionSequence sequence{.q_end = n,
                                   .k_end = n,
                                   .q_positions = PositionMap::Contiguous(0),
                                   .num_tokens = n,
                                   .key_range_end = n,
                                   .indices = indices};
  AttentionParams params = ParamsOf(prompt);
  params.q = {place(0), head_stride, row_stride};
  params.k = {place(1), head_stride, row_stride};
  params.v = {place(2), head_stride, row_stride};
  params.out = {place(3), head_stride, row_stride};
  params.lse = reinterpret_cast<float*>(place(4));
  params.lse_head_stride = head_stride / 2;
  params.sequences = {&sequence, 1};
  LF_ASSERT_OK(Attention(params));
  const Buffer dense = ComputeArray(2 * n * dim);
  LF_ASSERT_OK(kernels().Copy2D({.to = dense.data(),
                                 .to_pitch = row_bytes,
                                 .from = place(3),
                                 .from_pitch = 2 * row_stride,
                                 .row_bytes = row_bytes,
                                 .rows = 2 * n},
                                stream()));
  const Expected expected = Expect(prompt, Whole(prompt), PositionsOf(Whole(prompt)));
  EXPECT_TRUE(Near(DownloadCompute(dense.data(), 2 * n * dim), expected.want.out, expected.tolerance));
  std::vector<float> lse = Download<float>(params.lse, n);
  const std::vector<float> second = Download<float>(params.lse + params.lse_head_stride, n);
  lse.insert(lse.end(), second.begin(), second.end());
  EXPECT_TRUE(Near(lse, expected.want.lse, expected.lse_tolerance));
}

TEST_P(AttentionTest, ErrorsNameWhatIsWrong) {
  const Buffer data = ComputeArray(64 * 64);
  const std::vector<IndexView> indices = UploadHeads({DenseHead()});
  AttentionSequence sequence{.q_end = 4,
                             .k_end = 4,
                             .q_positions = PositionMap::Contiguous(0),
                             .num_tokens = 4,
                             .key_range_end = 4,
                             .indices = indices};
  AttentionParams good;
  good.q = good.k = good.v = {data.data(), 1024, 64};
  good.out = {Advance(data.data(), 2048, compute_dtype()), 1024, 64};
  good.num_q_heads = good.num_kv_heads = 1;
  good.head_dim = 64;
  good.scale = 1;
  good.sequences = {&sequence, 1};
  LF_EXPECT_OK(Attention(good));
  const auto invalid = [](const char* text) {
    return StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(text));
  };
  AttentionParams params = good;
  params.head_dim = on_gpu() ? 80 : 20;
  EXPECT_THAT(Attention(params), StatusIs(absl::StatusCode::kUnimplemented,
                                          HasSubstr("head_dim " + std::to_string(params.head_dim))));
  params = good;
  params.merge = true;
  EXPECT_THAT(Attention(params), invalid("merge"));
  params = good;
  params.num_q_heads = 3;
  params.num_kv_heads = 2;
  EXPECT_THAT(Attention(params), invalid("3 query heads"));
  const int32_t kv_head[] = {1};
  params = good;
  params.kv_head = kv_head;
  EXPECT_THAT(Attention(params), invalid("kv_head 1 of 1"));
  EXPECT_THAT(kernels().Attention(good, {}, stream()), invalid("workspace of 0 bytes"));
  sequence.key_range_end = 5;
  EXPECT_THAT(Attention(good), invalid("key range [0, 5)"));
  sequence.key_range_end = 4;
  sequence.num_tokens = 3;
  EXPECT_THAT(Attention(good), invalid("position 3 of 3"));
  sequence.q_end = 0;
  LF_EXPECT_OK(Attention(good));
  params = good;
  params.num_q_heads = 0;
  LF_EXPECT_OK(Attention(params));
}

TEST_P(AttentionTest, RowsOffTheSixteenByteGridAreRefusedOnAGpu) {
  if (!on_gpu()) GTEST_SKIP() << "the CPU takes any alignment";
  const Buffer data = ComputeArray(64 * 64);
  const std::vector<IndexView> indices = UploadHeads({DenseHead()});
  const AttentionSequence sequence{.q_end = 4, .num_tokens = 4, .indices = indices};
  AttentionParams params;
  params.q = {data.data(), 1024, 64};
  params.k = {data.data(), 1024, 68};
  params.num_q_heads = params.num_kv_heads = 1;
  params.head_dim = 64;
  params.scale = 1;
  params.sequences = {&sequence, 1};
  EXPECT_THAT(Attention(params), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("row stride 68")));
}

}  // namespace
}  // namespace longfill
