#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

#include "kernels/cpu/oracle/oracle.h"
#include "tests/contract/share_fixture.h"
#include "tests/testing/sanitized.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

class ShareSelectionTest : public ShareFixture {};
LF_INSTANTIATE_BACKENDS(ShareSelectionTest);

TEST_P(ShareSelectionTest, AgreesWithTheOracle) {
  Decisions decisions, in_fp8;
  for (const int64_t tokens : {1, 63, 64, 65, 127, 128, 129, 1009}) {
    for (const int64_t dim : {64, 96, 128, 256}) {
      for (const int64_t samples : {0, 1, 8, 16}) CompareWithOracle(tokens, dim, samples, &decisions);
      for (const int64_t samples : {0, 8}) CompareWithOracle(tokens, dim, samples, &in_fp8, /*fp8=*/true);
    }
  }
  for (const Decisions& each : {decisions, in_fp8}) {
    EXPECT_GT(each.kept, 200);
    EXPECT_GT(each.dropped, 200);
  }
}

TEST_P(ShareSelectionTest, AgreesWithTheOracleOnLongPrompts) {
  if (kSanitized) GTEST_SKIP() << "takes minutes under a sanitizer";
  Decisions decisions;
  for (const int64_t dim : {64, 128, 256}) {
    for (const int64_t samples : {0, 8}) CompareWithOracle(4999, dim, samples, &decisions);
    CompareWithOracle(4999, dim, 8, &decisions, /*fp8=*/true);
  }
  EXPECT_GT(decisions.kept, 10000);
  EXPECT_GT(decisions.dropped, 10000);
}

TEST_P(ShareSelectionTest, TwoLevelsAgreeWithTheOracle) {
  Decisions decisions, with_samples, in_fp8;
  for (const int64_t tokens : {1, 449, 511, 512, 513, 1024 + 65, 1601}) {
    for (const int64_t dim : {64, 96, 128, 256}) {
      for (const Kind& kind :
           {Kind{.coarse = 1}, {.outliers = 4, .coarse = 8}, {.outliers = 7, .coarse = 16}}) {
        CompareTwoLevelsWithOracle(tokens, dim, kind, &decisions);
      }
      const Kind samples = {.outliers = 4, .samples = 8, .coarse = 8};
      CompareTwoLevelsWithOracle(tokens, dim, samples, &with_samples);
      for (Kind kind : {samples, Kind{.outliers = 4, .coarse = 8}}) {
        kind.fp8 = true;
        CompareTwoLevelsWithOracle(tokens, dim, kind, &in_fp8);
      }
    }
  }
  for (const Decisions& each : {decisions, with_samples, in_fp8}) {
    EXPECT_GT(each.kept, 200);
    EXPECT_GT(each.dropped, 200);
    EXPECT_GT(each.closed, 200);
  }
}

TEST_P(ShareSelectionTest, TwoLevelsAgreeWithTheOracleOnLongPrompts) {
  if (kSanitized) GTEST_SKIP() << "takes minutes under a sanitizer";
  Decisions decisions;
  for (const int64_t dim : {64, 96, 128, 256}) {
    for (const Kind& kind : {Kind{.outliers = 4, .coarse = 8},
                             {.coarse = 2},
                             {.outliers = 8, .samples = 8, .coarse = 8},
                             {.outliers = 8, .samples = 8, .coarse = 8, .fp8 = true}}) {
      CompareTwoLevelsWithOracle(4999, dim, kind, &decisions);
    }
  }
  EXPECT_GT(decisions.kept, 5000);
  EXPECT_GT(decisions.dropped, 5000);
  EXPECT_GT(decisions.closed, 5000);
}

// Closed blocks count in the sum by their coarse blocks, whichever level has the larger score.
TEST_P(ShareSelectionTest, SharesAreOfTheSumOverCoarseBlocksWhereThatIsLarger) {
  const int64_t blocks = 87, row_block = 86, tokens = blocks * kRowBlock, dim = 64, block = 80;
  std::vector<float> q(tokens * dim, 0.0F);
  for (int64_t row = 0; row < tokens; ++row) q[row * dim] = 1;
  for (const float shift : {0.0F, 40.0F, -40.0F}) {
    for (const double weight : {4.5, 6.0, 9.0}) {  // of block 80; of each of ten coarse blocks it is 1
      std::vector<float> k(tokens * dim, 0.0F);
      for (int64_t n = 0; n < tokens; ++n) {
        const int64_t of = n / kRowBlock;
        k[n * dim] = shift + (of < block ? 0 : of == block ? static_cast<float>(std::log(weight)) : -20);
      }
      k = Rounded(k);
      const double share = std::exp(k[block * kRowBlock * dim] - k[0]) / 10;
      const Buffer representatives = Represent(k, 1, tokens, dim, 0);
      const Buffer coarse = RepresentCoarse(representatives, 1, blocks, dim, 1);
      const auto keeps = [&](double min_share) {
        return IsSet(Select(q, representatives,
                            {.rows = tokens,
                             .dim = dim,
                             .num_key_blocks = blocks,
                             .min_share = {static_cast<float>(min_share)},
                             .coarse = &coarse,
                             .num_coarse = 1})[0][row_block],
                     block);
      };
      EXPECT_TRUE(keeps(share * 0.99)) << weight << " at " << shift;
      EXPECT_FALSE(keeps(share * 1.01)) << weight << " at " << shift;
    }
  }
}

// With samples: a row that leans on its own keys gives little to coarse blocks and to open key blocks.
TEST_P(ShareSelectionTest, OwnKeysCountInTheSumsOfBothLevels) {
  const int64_t row_block = 22, tokens = row_block * kRowBlock + 1, blocks = row_block, dim = 64;
  std::vector<float> q(tokens * dim, 0.0F), k(tokens * dim, 0.0F);
  for (int64_t row = 0; row < tokens; ++row) q[row * dim] = 1;
  for (int64_t key = 9 * kRowBlock; key < 10 * kRowBlock; ++key) k[key * dim] = 5;
  k[(tokens - 1) * dim] = 9;  // the last row's own key
  const double key_block = 64 * std::exp(5.0), own = std::exp(9.0);
  const Buffer representatives = Represent(k, 1, tokens, dim, 0, 1);
  const Buffer coarse = RepresentCoarse(representatives, 1, blocks, dim, 1, 1);
  const auto keeps = [&](int64_t block, double min_share) {
    return IsSet(Select(q, representatives,
                        {.rows = tokens,
                         .dim = dim,
                         .num_key_blocks = blocks,
                         .min_share = {static_cast<float>(min_share)},
                         .num_samples = 1,
                         .own_k = k,
                         .coarse = &coarse,
                         .num_coarse = 1})[0][row_block],
                 block);
  };
  // Both coarse blocks weigh 512 by their sample, which is not of block 9, whose own weight would be enough.
  const double opens = 512 / (2 * 512 + own) / kOpenFactor;
  ASSERT_LT(opens, 0.9 * key_block / (21 * 64 + key_block + own));
  EXPECT_TRUE(keeps(9, opens * 0.99));
  EXPECT_FALSE(keeps(9, opens * 1.01));
  const double share = 64 / (21 * 64 + key_block + own);
  EXPECT_TRUE(keeps(16, share * 0.99));
  EXPECT_FALSE(keeps(16, share * 1.01));
}

// Scores for which rows want so many blocks that the backend must go over them twice.
TEST_P(ShareSelectionTest, AgreesWithTheOracleOnRowsOfManyBlocks) {
  const int64_t tokens = 6'400;
  Decisions decisions;
  for (const int64_t dim : {64, 96, 128}) {
    const std::vector<float> q = Rounded(AgreeingQueries(1, tokens, dim, 70));
    const std::vector<float> k = Rounded(NormalFloats(tokens * dim, 72));
    const float scale = 1.2F / std::sqrt(static_cast<float>(dim));
    for (const Kind& kind : {Kind{.outliers = 4},
                             {.outliers = 4, .samples = 4},
                             {.outliers = 4, .coarse = 8},
                             {.outliers = 4, .samples = 4, .coarse = 8},
                             {.outliers = 4, .samples = 4, .fp8 = true},
                             {.outliers = 4, .samples = 4, .coarse = 8, .fp8 = true}}) {
      CompareWithOracle(q, k, tokens, dim, kind, scale, {0.5F * kRowBlock / static_cast<float>(tokens)},
                        &decisions);
    }
  }
  EXPECT_GT(decisions.kept, 20'000);
  EXPECT_GT(decisions.dropped, 1'000);
}

// To the last bit: at which min_share a row block stops to keep a block does not depend on the rows around
// it.
TEST_P(ShareSelectionTest, TheLeastShareDoesNotDependOnWhatElseIsInTheCall) {
  const int64_t tokens = 12'800, dim = 64, blocks = tokens / kRowBlock, first = 150, row_block = 187;
  const std::vector<float> k = NormalFloats(tokens * dim, 81);
  const std::vector<float> q = AgreeingQueries(1, tokens - first * kRowBlock, dim, 80);  // from `first` on
  for (const Kind& kind : {Kind{.outliers = 4},
                           {.outliers = 4, .coarse = 8},
                           {.outliers = 4, .samples = 4, .coarse = 8},
                           {.outliers = 4, .samples = 4, .fp8 = true},
                           {.outliers = 4, .samples = 4, .coarse = 8, .fp8 = true}}) {
    const Buffer representatives = Represent(k, 1, tokens, dim, kind.outliers, kind.samples);
    const int64_t num_representatives = kind.num_representatives();
    const Buffer coarse = RepresentCoarse(representatives, kind, blocks, dim);
    const std::string what =
        testing::PrintToString(std::vector<int64_t>{kind.samples, kind.coarse, kind.fp8}) +
        " samples, coarse, fp8";
    const auto keeps = [&](int64_t begin, int64_t end, int64_t block, float min_share) {
      const auto row_of = [&](int64_t b) { return q.begin() + (b - first) * kRowBlock * dim; };
      const auto key_of = [&](int64_t b) { return k.begin() + b * kRowBlock * dim; };
      const Bits bits = Select({row_of(begin), row_of(end)}, representatives,
                               {.rows = (end - begin) * kRowBlock,
                                .positions = PositionMap::Contiguous(begin * kRowBlock),
                                .dim = dim,
                                .num_representatives = num_representatives,
                                .num_key_blocks = blocks,
                                .scale = 0.2F,
                                .min_share = {min_share},
                                .num_samples = kind.samples,
                                .own_k = {key_of(begin), key_of(end)},
                                .coarse = &coarse,
                                .num_coarse = kind.coarse,
                                .fp8 = kind.fp8});
      return IsSet(bits[0][row_block - begin], block);
    };
    for (const int64_t block : {3, 77, 130, 176}) {
      float kept = 1e-12F, dropped = 1;
      ASSERT_TRUE(keeps(first, blocks, block, kept));
      ASSERT_FALSE(keeps(first, blocks, block, dropped));
      while (std::nextafter(kept, dropped) < dropped) {
        const float middle =
            std::sqrt(kept) * std::sqrt(dropped);  // of the exponents, until they are the same
        const float between = middle > kept && middle < dropped ? middle : std::midpoint(kept, dropped);
        (keeps(first, blocks, block, between) ? kept : dropped) = between;
      }
      for (const auto& [begin, end] : {std::pair{row_block, row_block + 1},
                                       {row_block, blocks},
                                       {row_block - 1, row_block + 1},
                                       {row_block - 2, row_block + 3}}) {
        EXPECT_TRUE(keeps(begin, end, block, kept)) << what << ", block " << block << ", rows from " << begin;
        EXPECT_FALSE(keeps(begin, end, block, dropped))
            << what << ", block " << block << ", rows from " << begin;
      }
    }
  }
}

// Of a row of equal shares all blocks are kept or none: as many as may be, and more than a kernel can note in
// passing.
TEST_P(ShareSelectionTest, RowsMayKeepEveryBlock) {
  const int64_t tokens = 12'800, dim = 64, blocks = tokens / kRowBlock;
  const std::vector<float> min_share = {0.9F / static_cast<float>(blocks), 0.01F};
  const std::vector<float> q(static_cast<size_t>(std::ssize(min_share) * tokens * dim), 0.0F);
  Decisions decisions;
  CompareWithOracle(q, Rounded(NormalFloats(tokens * dim, 50)), tokens, dim, {.outliers = 4}, 1, min_share,
                    &decisions);
  EXPECT_GT(decisions.kept, blocks * blocks / 2);
  EXPECT_GT(decisions.dropped, blocks * blocks / 8);
}

// The first blocks of a prompt outweigh later ones, the nearest of which were candidates by the sums before
// them, until these were known.
TEST_P(ShareSelectionTest, CandidatesFailWhenSumsAreKnown) {
  const int64_t tokens = 12'800, dim = 64, blocks = tokens / kRowBlock;
  std::vector<float> q(static_cast<size_t>(tokens * dim), 0.0F);
  std::vector<float> k(q.size(), 0.0F);
  for (int64_t i = 0; i < tokens; ++i) {
    q[i * dim] = 1;
    const int64_t block = i / kRowBlock;
    k[i * dim] = static_cast<float>(blocks - block) / 16;  // e^(1/16) from block to block
  }
  Decisions decisions;
  CompareWithOracle(Rounded(q), Rounded(k), tokens, dim, {.outliers = 1}, 1, {0.02F}, &decisions);
  EXPECT_GT(decisions.kept, 10 * blocks);
  EXPECT_GT(decisions.dropped, 10 * blocks);
}

// The bits of a row block are those of the whole prompt for ranks, chunks and heads of a call.
TEST_P(ShareSelectionTest, DoesNotDependOnWhatElseIsInTheCall) {
  for (const Kind& kind : {Kind{.outliers = 4},
                           {.outliers = 4, .samples = 4},
                           {.outliers = 4, .coarse = 8},
                           {.outliers = 4, .samples = 4, .coarse = 8},
                           {.outliers = 4, .samples = 4, .fp8 = true},
                           {.outliers = 4, .samples = 4, .coarse = 8, .fp8 = true}}) {
    const int64_t tokens = 2999, dim = 64, heads = 3, blocks = tokens / kRowBlock;
    const std::vector<float> q = kind.coarse > 0 ? AgreeingQueries(heads, tokens, dim, 24)
                                                 : NormalFloats(heads * tokens * dim, 24, 2.0F);
    const std::vector<float> k = NormalFloats(tokens * dim, 25);
    const Buffer representatives = Represent(k, 1, tokens, dim, kind.outliers, kind.samples);
    const Buffer coarse = RepresentCoarse(representatives, kind, blocks, dim);
    Case whole = {.rows = tokens,
                  .dim = dim,
                  .num_representatives = kind.num_representatives(),
                  .num_key_blocks = blocks,
                  .scale = kind.coarse > 0 ? 0.3F : 0.125F,
                  .min_share = {0.05F, 0.1F, 0.2F},
                  .num_samples = kind.samples,
                  .own_k = k,
                  .coarse = &coarse,
                  .num_coarse = kind.coarse,
                  .fp8 = kind.fp8};
    const Bits want = Select(q, representatives, whole);
    const auto expect_rows = [&](const PositionMap& positions, int64_t rows, int64_t head) {
      Case part = whole;
      part.rows = rows;
      part.positions = positions;
      part.min_share = {whole.min_share[head]};
      std::vector<float> own;
      part.own_k.clear();
      for (int64_t r = 0; r < rows; ++r) {
        const auto from = q.begin() + (head * tokens + positions.Position(r)) * dim;
        own.insert(own.end(), from, from + dim);
        const auto key = k.begin() + positions.Position(r) * dim;
        part.own_k.insert(part.own_k.end(), key, key + dim);
      }
      const Bits got = Select(own, representatives, part);
      for (int64_t m = 0; m < RowBlocksOf(rows); ++m) {
        const int64_t row_block = positions.Position(m * kRowBlock) / kRowBlock;
        EXPECT_EQ(got[0][m], want[head][row_block]) << "head " << head << ", row block " << row_block;
      }
    };
    for (const int64_t ranks : {2, 3}) {
      for (int64_t rank = 0; rank < ranks; ++rank) {
        const PositionMap positions = {rank * 128, 128, ranks * 128, (ranks - 1 - 2 * rank) * 128};
        expect_rows(positions, positions.RowsBelow(tokens), rank);
        const PositionMap later = positions.From(128);
        expect_rows(later, later.RowsBelow(tokens), rank);
      }
    }
    for (const int64_t begin : {0, 64, 1984}) {
      for (const int64_t end : {2048, 2999}) expect_rows(PositionMap::Contiguous(begin), end - begin, 1);
    }
  }
}

// A row leans on its own block or not, where samples are; which the mean knows nothing of.
TEST_P(ShareSelectionTest, KeysOfTheOwnBlockTakeTheirShare) {
  const int64_t tokens = 640, dim = 64, row_block = 9;
  std::vector<float> q(tokens * dim, 0.0F), k(tokens * dim, 0.0F);
  for (int64_t row = row_block * 64; row < tokens; ++row) q[row * dim] = k[row * dim] = 4;  // products of 16
  std::vector<float> apart;  // rows of the keys, each with 8 values behind it that are not its
  for (int64_t row = 0; row < tokens; ++row) {
    apart.insert(apart.end(), k.begin() + row * dim, k.begin() + (row + 1) * dim);
    apart.insert(apart.end(), 8, 100.0F);
  }
  const auto keeps_block_2 = [&](int64_t samples, float min_share) {
    const Buffer representatives = Represent(k, 1, tokens, dim, 0, samples);
    const Bits bits = Select(q, representatives,
                             {.rows = tokens,
                              .dim = dim,
                              .num_representatives = NumRepresentatives(samples, 0),
                              .num_key_blocks = tokens / kRowBlock,
                              .scale = 0.25F,
                              .min_share = {min_share},
                              .num_samples = samples,
                              .own_k = apart,
                              .own_k_row_stride = dim + 8});
    return IsSet(bits[0][row_block], 2);
  };
  // Nine blocks before, of which a row gives each a ninth.
  EXPECT_TRUE(keeps_block_2(0, 0.11F));
  EXPECT_FALSE(keeps_block_2(0, 0.112F));
  const double share = 16 / (9 * 16 + std::exp(4.0));  // 4 samples of 16 keys each, of which one counts
  EXPECT_TRUE(keeps_block_2(4, static_cast<float>(share * 0.99)));
  EXPECT_FALSE(keeps_block_2(4, static_cast<float>(share * 1.01)));
}

// A GPU does so many heads, and so many rows, in several launches.
TEST_P(ShareSelectionTest, TakesAnyNumberOfHeads) {
  const int64_t tokens = 1700, dim = 64, heads = 130, blocks = tokens / kRowBlock;
  const Buffer representatives = Represent(NormalFloats(tokens * dim, 29), 1, tokens, dim, 0);
  const Buffer coarse = RepresentCoarse(representatives, 1, blocks, dim, 4);
  Case all = {.rows = tokens, .dim = dim, .num_key_blocks = blocks, .scale = 0.125F, .coarse = &coarse};
  for (int64_t h = 0; h < heads; ++h) all.min_share.push_back(0.02F + 0.002F * static_cast<float>(h));
  for (const auto& [num_coarse, fp8] : {std::pair{0, false}, {4, false}, {4, true}}) {
    all.num_coarse = num_coarse;
    all.fp8 = fp8;
    if (num_coarse > 0) all.scale = 0.3F;
    const std::vector<float> q = num_coarse > 0 ? AgreeingQueries(heads, tokens, dim, 28)
                                                : NormalFloats(heads * tokens * dim, 28, 2.0F);
    const Bits got = Select(q, representatives, all);
    for (const int64_t head : {0, 1, 63, 64, 65, 127, 128, 129}) {
      Case one = all;
      one.min_share = {all.min_share[head]};
      const auto from = q.begin() + head * tokens * dim;
      EXPECT_EQ(got[head], Select({from, from + tokens * dim}, representatives, one)[0])
          << "head " << head << ", coarse " << num_coarse << ", fp8 " << fp8;
    }
  }
}

TEST_P(ShareSelectionTest, TakesAnyNumberOfRows) {
  if (!on_gpu()) GTEST_SKIP() << "a CPU has no launches, and needs minutes for so many rows";
  const int64_t rows = 150'016, dim = 128, num_representatives = kMaxOutliers + 1, blocks = 16384;
  const int64_t first = blocks * kRowBlock - rows;  // the last rows of a million
  const std::vector<float> q = NormalFloats(rows * dim, 30);
  const Buffer representatives = UploadCompute(NormalFloats(num_representatives * blocks * dim, 31));
  const Buffer coarse = RepresentCoarse(representatives, num_representatives, blocks, dim, 8);
  Case all = {.rows = rows,
              .positions = PositionMap::Contiguous(first),
              .dim = dim,
              .num_representatives = num_representatives,
              .num_key_blocks = blocks,
              .scale = 0.3F,
              .min_share = {0.01F},
              .coarse = &coarse};
  for (const auto& [num_coarse, fp8] : {std::pair{0, false}, {8, false}, {0, true}, {8, true}}) {
    all.num_coarse = num_coarse;
    all.fp8 = fp8;
    const Bits got = Select(q, representatives, all);
    int64_t selected = 0;
    for (const int64_t begin : {int64_t{0}, int64_t{8192}, rows / 2 / kRowBlock * kRowBlock, rows - 256}) {
      Case part = all;
      part.rows = 256;
      part.positions = PositionMap::Contiguous(first + begin);
      const auto from = q.begin() + begin * dim;
      const Bits want = Select({from, from + part.rows * dim}, representatives, part);
      for (int64_t m = 0; m < part.rows / kRowBlock; ++m) {
        EXPECT_EQ(got[0][begin / kRowBlock + m], want[0][m])
            << "row block " << begin / kRowBlock + m << ", coarse " << num_coarse << ", fp8 " << fp8;
        for (const uint64_t word : want[0][m]) selected += std::popcount(word);
      }
    }
    EXPECT_GT(selected, 16 * 3 * kForcedNearestBlocks)
        << "only forced blocks, coarse " << num_coarse << ", fp8 " << fp8;
  }
}

// Whatever the mean of its block says.
TEST_P(ShareSelectionTest, OneKeyThatARowWantsKeepsItsBlock) {
  const int64_t tokens = 4096, dim = 64;
  std::vector<float> q = NormalFloats(tokens * dim, 26, 0.1F);
  std::vector<float> k = NormalFloats(tokens * dim, 27, 0.5F);
  const int64_t key = 1000, row = 3000;
  for (int64_t i = 0; i < dim; ++i) k[key * dim + i] = q[row * dim + i] = i % 2 == 0 ? 2.0F : -2.0F;
  const auto blocks_of = [&](int64_t outliers) {
    return Select(q, Represent(k, 1, tokens, dim, outliers),
                  {.rows = tokens,
                   .dim = dim,
                   .num_representatives = outliers + 1,
                   .num_key_blocks = tokens / kRowBlock,
                   .scale = 0.125F,
                   .min_share = {0.5F}})[0];
  };
  const auto by_outliers = blocks_of(1);
  const auto by_means = blocks_of(0);
  for (int64_t m = 0; m < tokens / kRowBlock; ++m) {
    const int64_t wanted = m - key / kRowBlock;
    if (wanted < kForcedNearestBlocks) continue;
    EXPECT_EQ(IsSet(by_outliers[m], key / kRowBlock), m == row / kRowBlock) << "row block " << m;
    EXPECT_FALSE(IsSet(by_means[m], key / kRowBlock)) << "row block " << m;
  }
}

TEST_P(ShareSelectionTest, NothingToDoIsLegal) {
  ShareSelectionParams params;
  LF_EXPECT_OK(kernels().SelectByShare(params, {}, stream()));
  const Buffer offsets = Bytes(8), entries = Bytes(8);
  LF_EXPECT_OK(kernels().Zero(entries.data(), 8, stream()));
  BuildBlockListsParams lists;
  lists.num_heads = 1;  // of an empty prompt
  lists.row_offsets = offsets.as<int64_t>();
  lists.num_entries = entries.as<int64_t>();
  LF_EXPECT_OK(kernels().BuildBlockLists(lists, NewWorkspace(kernels().BuildBlockListsWorkspaceBytes(1, 0)),
                                         stream()));
  EXPECT_EQ(Download<int64_t>(offsets.data(), 1)[0], 0);
  EXPECT_EQ(Download<int64_t>(entries.data(), 1)[0], 0);
}

TEST_P(ShareSelectionTest, SaysWhatIsWrong) {
  const Buffer data = UploadCompute(std::vector<float>(size_t{17} * 8 * 256, 0.0F));
  const Buffer bits = Bytes(512 * 8);
  const std::vector<float> min_share = {0.5F};
  ShareSelectionParams good;
  good.q = {data.data(), 512 * 64, 64};
  good.num_heads = 1;
  good.num_rows = 512;
  good.representatives = data.data();
  good.num_representatives = 5;
  good.num_key_blocks = 8;
  good.head_dim = 64;
  good.scale = 1;
  good.min_share = min_share;
  good.bits = bits.as<uint64_t>();
  good.words_per_row = 1;
  const auto run = [&](const ShareSelectionParams& params) {
    return kernels().SelectByShare(
        params, NewWorkspace(kernels().ShareSelectionWorkspaceBytes({1, 512, 17, 8, 256, 16, 16, true})),
        stream());
  };
  LF_EXPECT_OK(run(good));
  ShareSelectionParams two_levels = good;
  two_levels.coarse = data.data();
  two_levels.num_coarse = 4;
  for (const bool fp8 : {false, true}) {
    two_levels.fp8 = fp8;
    LF_EXPECT_OK(run(two_levels));
    const int64_t needed = kernels().ShareSelectionWorkspaceBytes({1, 512, 5, 8, 64, 4, 0, fp8});
    const Buffer scratch = Bytes(needed + 16);
    for (const Workspace& bad : {Workspace{}, Workspace{scratch.data(), needed - 1}}) {
      EXPECT_THAT(kernels().SelectByShare(two_levels, bad, stream()),
                  StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("workspace")));
    }
    if (on_gpu()) {
      EXPECT_THAT(
          kernels().SelectByShare(two_levels, {static_cast<char*>(scratch.data()) + 8, needed}, stream()),
          StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("workspace")));
    }
  }
  const auto expect = [&](const char* message, const auto& change) {
    ShareSelectionParams bad = good;
    change(bad);
    EXPECT_THAT(run(bad), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  };
  expect("num_key_blocks 6", [](ShareSelectionParams& p) { p.num_key_blocks = 6; });
  expect("words_per_row 0", [](ShareSelectionParams& p) { p.words_per_row = 0; });
  expect("num_representatives 0", [](ShareSelectionParams& p) { p.num_representatives = 0; });
  expect("num_representatives 18", [](ShareSelectionParams& p) { p.num_representatives = 18; });
  expect("num_samples 3", [](ShareSelectionParams& p) { p.num_samples = 3; });
  expect("num_samples -4", [](ShareSelectionParams& p) { p.num_samples = -4; });
  expect("num_samples 32", [](ShareSelectionParams& p) { p.num_samples = 32; });
  expect("num_representatives 17 is not in [8, 16]", [](ShareSelectionParams& p) {
    p.num_samples = 8;
    p.num_representatives = 17;
  });
  expect("num_representatives 5 is not", [](ShareSelectionParams& p) { p.num_samples = 8; });
  expect("num_samples 4 without", [](ShareSelectionParams& p) { p.num_samples = 4; });
  for (const int64_t coarse : {-1, 17}) {
    expect("num_coarse", [&](ShareSelectionParams& p) {
      p.coarse = data.data();
      p.num_coarse = coarse;
    });
  }
  expect("num_coarse 4 without", [](ShareSelectionParams& p) { p.num_coarse = 4; });
  expect("num_coarse 9 is not in [0, 8]", [&](ShareSelectionParams& p) {
    p.num_samples = p.num_representatives = 8;
    p.own_k = p.coarse = data.data();
    p.own_k_row_stride = 64;
    p.num_coarse = 9;
  });
  expect("scale 0", [](ShareSelectionParams& p) { p.scale = 0; });
  expect("first 32", [](ShareSelectionParams& p) { p.positions = PositionMap::Contiguous(32); });
  expect("block 96", [](ShareSelectionParams& p) { p.positions = {0, 96, 192}; });
  expect("2 values of min_share", [](ShareSelectionParams& p) {
    static const std::vector<float> two = {0.5F, 0.5F};
    p.min_share = two;
  });
  for (const float share : {0.0F, 1.5F, NAN}) {
    expect("min_share", [share](ShareSelectionParams& p) { p.min_share = {&share, 1}; });
  }
  good.head_dim = 12;
  EXPECT_THAT(run(good), StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("head_dim 12")));
}

}  // namespace
}  // namespace longfill
