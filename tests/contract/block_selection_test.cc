#include <algorithm>
#include <cmath>
#include <random>

#include "kernels/cpu/oracle/oracle.h"
#include "tests/contract/backend_fixture.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

class BlockSelectionTest : public BackendTest {
 protected:
  // [heads, blocks, dim]
  std::vector<float> Pool(const std::vector<float>& x, int64_t heads, int64_t rows, int64_t dim) {
    const Buffer on_backend = UploadCompute(x);
    const int64_t count = heads * ((rows + kRowBlock - 1) / kRowBlock) * dim;
    const Buffer out = Bytes(count * 4);
    PoolParams params;
    params.x = {on_backend.data(), rows * dim, dim};
    params.num_heads = heads;
    params.num_rows = rows;
    params.head_dim = dim;
    params.out = out.as<float>();
    LF_EXPECT_OK(kernels().Pool(params, stream()));
    return Download<float>(out.data(), count);
  }

  struct Choice {
    int64_t num_blocks = 0;  // K
    bool force = true;
    PositionMap positions;  // of the rows of pooled_q
  };
  // [row blocks][the first min(K, m + 1) selected], ascending
  std::vector<std::vector<int32_t>> Select(const std::vector<float>& pooled_q,
                                           const std::vector<float>& pooled_k, int64_t dim,
                                           const Choice& choice) {
    const Buffer q = Upload(pooled_q);
    const Buffer k = Upload(pooled_k);
    SelectBlocksParams params;
    params.pooled_q = q.as<float>();
    params.positions = choice.positions;
    params.num_row_blocks = std::ssize(pooled_q) / dim;
    params.pooled_k = k.as<float>();
    params.num_key_blocks = std::ssize(pooled_k) / dim;
    params.head_dim = dim;
    params.num_blocks = choice.num_blocks;
    params.force = choice.force;
    const Buffer selected = Bytes(params.num_row_blocks * choice.num_blocks * 4);
    params.selected = selected.as<int32_t>();
    const Workspace workspace =
        NewWorkspace(kernels().SelectBlocksWorkspaceBytes(params.num_row_blocks, params.num_key_blocks, dim));
    LF_EXPECT_OK(kernels().SelectBlocks(params, workspace, stream()));
    const std::vector<int32_t> table =
        Download<int32_t>(selected.data(), params.num_row_blocks * choice.num_blocks);
    std::vector<std::vector<int32_t>> rows;
    for (int64_t r = 0; r < params.num_row_blocks; ++r) {
      const auto from = table.begin() + r * choice.num_blocks;
      const int64_t m = choice.positions.Position(r * kRowBlock) / kRowBlock;
      rows.emplace_back(from, from + std::min(choice.num_blocks, m + 1));
    }
    return rows;
  }
};
LF_INSTANTIATE_BACKENDS(BlockSelectionTest);

// Every block whose score is above the smallest selected one by `tolerance` must be selected, none that is as
// much below may be.
void CheckRow(const std::vector<int32_t>& got, const std::vector<double>& scores, int64_t num_blocks,
              bool force, double tolerance) {
  const auto m = static_cast<int64_t>(scores.size()) - 1;
  ASSERT_EQ(std::ssize(got), std::min(num_blocks, m + 1));
  ASSERT_TRUE(std::is_sorted(got.begin(), got.end(), std::less_equal<>())) << "ascending, each once";
  ASSERT_GE(got.front(), 0);
  ASSERT_LE(got.back(), m);
  std::vector<double> ranked = scores;
  if (force) {
    if (num_blocks > 1) ranked[0] = std::numeric_limits<double>::infinity();
    ranked[m] = std::numeric_limits<double>::infinity();
  }
  std::vector<double> sorted = ranked;
  std::nth_element(sorted.begin(), sorted.begin() + std::ssize(got) - 1, sorted.end(), std::greater<>());
  const double cut = sorted[got.size() - 1];
  for (int32_t n = 0; n <= m; ++n) {
    const bool selected = std::binary_search(got.begin(), got.end(), n);
    if (ranked[n] > cut + tolerance) {
      ASSERT_TRUE(selected) << "block " << n << " of row block " << m;
    }
    if (ranked[n] < cut - tolerance) {
      ASSERT_FALSE(selected) << "block " << n << " of row block " << m;
    }
  }
}

TEST_P(BlockSelectionTest, PoolIsTheMeanOfEachBlock) {
  for (const int64_t rows : {0, 1, 63, 64, 65, 127, 128, 331}) {
    for (const int64_t dim : {64, 96, 128, 256}) {
      const int64_t heads = 3, blocks = (rows + 63) / 64;
      const std::vector<float> x = Rounded(NormalFloats(heads * rows * dim, 4));
      const std::vector<float> got = Pool(x, heads, rows, dim);
      for (int64_t i = 0; i < std::ssize(got); ++i) {
        const int64_t h = i / (blocks * dim), b = i / dim % blocks;
        const int64_t end = std::min(rows, b * 64 + 64);
        double sum = 0;
        for (int64_t r = b * 64; r < end; ++r) sum += x[(h * rows + r) * dim + i % dim];
        ASSERT_NEAR(got[i], sum / static_cast<double>(end - b * 64), 1e-6) << rows << " rows of " << dim;
      }
    }
  }
}

TEST_P(BlockSelectionTest, AgreesWithTheOracle) {
  for (const int64_t tokens : {1, 63, 64, 65, 128, 1000, 8192}) {
    for (const int64_t dim : {64, 128, 256}) {
      const std::vector<float> q = Rounded(NormalFloats(tokens * dim, 5));
      const std::vector<float> k = Rounded(NormalFloats(tokens * dim, 6));
      const std::vector<float> pooled_q = Pool(q, 1, tokens, dim);
      const std::vector<float> pooled_k = Pool(k, 1, tokens, dim);
      for (const int64_t num_blocks : {1, 2, 7, 100, 1000}) {
        for (const bool force : {true, false}) {
          SCOPED_TRACE(testing::Message() << tokens << " tokens of " << dim << ", K " << num_blocks);
          const oracle::BlockSelection want =
              oracle::SelectBlocks(q.data(), k.data(), tokens, dim, num_blocks, force);
          const auto got = Select(pooled_q, pooled_k, dim, {num_blocks, force, {}});
          ASSERT_EQ(got.size(), want.blocks.size());
          for (size_t m = 0; m < got.size(); ++m) CheckRow(got[m], want.scores[m], num_blocks, force, 1e-5);
        }
      }
    }
  }
}

TEST_P(BlockSelectionTest, TiesGoToTheLowerBlock) {
  const int64_t dim = 8, blocks = 300;
  std::mt19937 generator(7);
  std::vector<float> pooled_q, pooled_k;
  for (int64_t i = 0; i < blocks * dim; ++i) {
    pooled_q.push_back(i % dim == 0 ? 1.0F : 0.0F);
    pooled_k.push_back(i % dim == 0 ? static_cast<float>(generator() % 5) - 2.0F : 3.0F);  // product: -2 to 2
  }
  for (const bool force : {true, false}) {
    for (const int64_t num_blocks : {1, 3, 64, 299, 300}) {
      const auto got = Select(pooled_q, pooled_k, dim, {num_blocks, force, {}});
      for (int64_t m = 0; m < blocks; ++m) {
        const auto rank = [&](int32_t n) {
          if (force && n == m) return 20.0F;
          if (force && n == 0) return 10.0F;
          return pooled_k[n * dim];
        };
        std::vector<int32_t> want(static_cast<size_t>(m + 1));
        for (size_t n = 0; n < want.size(); ++n) want[n] = static_cast<int32_t>(n);
        std::stable_sort(want.begin(), want.end(), [&](int32_t a, int32_t b) { return rank(a) > rank(b); });
        want.resize(static_cast<size_t>(std::min(num_blocks, m + 1)));
        std::sort(want.begin(), want.end());
        ASSERT_EQ(got[m], want) << "row block " << m << ", K " << num_blocks;
      }
    }
  }
}

TEST_P(BlockSelectionTest, DoesNotDependOnTheDeal) {
  const int64_t dim = 64, blocks = 200, num_blocks = 10;
  const std::vector<float> pooled_q = NormalFloats(blocks * dim, 8);
  const std::vector<float> pooled_k = NormalFloats(blocks * dim, 9);
  const auto want = Select(pooled_q, pooled_k, dim, {num_blocks, true, {}});
  for (const int64_t ranks : {1, 2, 3, 4}) {
    for (int64_t rank = 0; rank < ranks; ++rank) {
      const PositionMap positions = {rank * 128, 128, ranks * 128, (ranks - 1 - 2 * rank) * 128};
      const int64_t own = positions.RowsBelow(blocks * kRowBlock) / kRowBlock;
      std::vector<float> own_q;
      for (int64_t r = 0; r < own; ++r) {
        const auto from = pooled_q.begin() + positions.Position(r * kRowBlock) / kRowBlock * dim;
        own_q.insert(own_q.end(), from, from + dim);
      }
      const auto got = Select(own_q, pooled_k, dim, {num_blocks, true, positions});
      for (int64_t r = 0; r < own; ++r) {
        EXPECT_EQ(got[r], want[positions.Position(r * kRowBlock) / kRowBlock]) << "row " << r;
      }
    }
  }
}

// More rows than the scores of a GPU's workspace are for.
TEST_P(BlockSelectionTest, TakesManyRowsOfALongPrompt) {
  const int64_t dim = 8, key_blocks = 20000, row_blocks = 1000, num_blocks = 50;
  const std::vector<float> pooled_q = NormalFloats(row_blocks * dim, 10);
  const std::vector<float> pooled_k = NormalFloats(key_blocks * dim, 11);
  const PositionMap positions = PositionMap::Contiguous((key_blocks - row_blocks) * kRowBlock);
  const auto got = Select(pooled_q, pooled_k, dim, {num_blocks, true, positions});
  for (int64_t r = 0; r < row_blocks; r += r < 990 ? 37 : 1) {
    std::vector<double> scores;
    for (int64_t n = 0; n <= key_blocks - row_blocks + r; ++n) {
      double sum = 0;
      for (int64_t i = 0; i < dim; ++i) {
        sum += static_cast<double>(pooled_q[r * dim + i]) * static_cast<double>(pooled_k[n * dim + i]);
      }
      scores.push_back(sum);
    }
    CheckRow(got[r], scores, num_blocks, true, 1e-5);
  }
}

TEST_P(BlockSelectionTest, SaysWhatIsWrong) {
  const Buffer means = Upload(std::vector<float>(64 * 8));
  const Buffer selected = Bytes(64 * 4);
  SelectBlocksParams params;
  params.pooled_q = means.as<float>();
  params.pooled_k = means.as<float>();
  params.num_row_blocks = 8;
  params.num_key_blocks = 8;
  params.head_dim = 64;
  params.num_blocks = 8;
  params.selected = selected.as<int32_t>();
  const auto run = [&] {
    return kernels().SelectBlocks(params, NewWorkspace(kernels().SelectBlocksWorkspaceBytes(8, 8, 64)),
                                  stream());
  };
  LF_EXPECT_OK(run());
  params.num_blocks = 0;
  EXPECT_THAT(run(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("num_blocks 0")));
  params.num_blocks = 8;
  params.num_key_blocks = 7;
  EXPECT_THAT(run(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("7 key blocks")));
  params.num_row_blocks = 0;
  LF_EXPECT_OK(run());
}

}  // namespace
}  // namespace longfill
