#include "kernels/cpu/oracle/oracle.h"
#include "tests/unit/cpu/cpu_test_util.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

Workspace WorkspaceFor(CpuBackend& backend, const SelectBlocksParams& params) {
  return backend.WorkspaceOf(backend.kernels().SelectBlocksWorkspaceBytes(
      params.num_row_blocks, params.num_key_blocks, params.head_dim));
}

absl::Status RunSelectBlocks(CpuBackend& backend, const SelectBlocksParams& params) {
  return backend.kernels().SelectBlocks(params, WorkspaceFor(backend, params), backend.stream());
}

TEST(PoolTest, IsTheMeanOfEachBlockAndTheSameBitsFromEveryStride) {
  CpuBackend backend(2);
  for (int64_t rows : {0, 1, 63, 64, 65, 127, 128, 331}) {
    const int64_t heads = 3, dim = 40, blocks = (rows + 63) / 64;
    const std::vector<float> x = RandomFloats(heads * rows * dim, 4);
    const StridedHeads strided(x.data(), heads, rows, dim);
    std::vector<float> out(static_cast<size_t>(heads * blocks * dim)), again(out.size());
    LF_ASSERT_OK(backend.kernels().Pool({{x.data(), rows * dim, dim}, heads, rows, dim, out.data()},
                                        backend.stream()));
    LF_ASSERT_OK(backend.kernels().Pool({strided.view(), heads, rows, dim, again.data()}, backend.stream()));
    EXPECT_TRUE(SameBits(out, again));
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t end = std::min(rows, b * 64 + 64);
        for (int64_t i = 0; i < dim; ++i) {
          double sum = 0;
          for (int64_t r = b * 64; r < end; ++r) sum += x[(h * rows + r) * dim + i];
          ASSERT_NEAR(out[(h * blocks + b) * dim + i], sum / static_cast<double>(end - b * 64), 1e-6);
        }
      }
    }
  }
}

class SelectBlocksTest : public TargetTest {};
LF_INSTANTIATE_TARGETS(SelectBlocksTest);

TEST_P(SelectBlocksTest, PicksWhatTheOraclePicks) {
  CpuBackend backend(3);
  for (int64_t n : {1, 64, 65, 500, 64 * 130 + 5}) {
    for (int64_t num_blocks : {1, 2, 5, 200}) {
      for (bool force : {true, false}) {
        SCOPED_TRACE(testing::Message() << n << " tokens, K " << num_blocks << " force " << force);
        const int64_t dim = 16, blocks = (n + 63) / 64;
        const std::vector<float> q = RandomFloats(n * dim, 5), k = RandomFloats(n * dim, 6);
        std::vector<float> pooled_q(static_cast<size_t>(blocks * dim)), pooled_k(pooled_q.size());
        LF_ASSERT_OK(
            backend.kernels().Pool({{q.data(), 0, dim}, 1, n, dim, pooled_q.data()}, backend.stream()));
        LF_ASSERT_OK(
            backend.kernels().Pool({{k.data(), 0, dim}, 1, n, dim, pooled_k.data()}, backend.stream()));
        std::vector<int32_t> selected(static_cast<size_t>(blocks * num_blocks), -7);
        SelectBlocksParams params{pooled_q.data(), PositionMap{}, blocks,
                                  pooled_k.data(), blocks,        dim,
                                  num_blocks,      force,         selected.data()};
        LF_ASSERT_OK(RunSelectBlocks(backend, params));
        const oracle::BlockSelection want =
            oracle::SelectBlocks(q.data(), k.data(), n, dim, num_blocks, force);
        for (int64_t m = 0; m < blocks; ++m) {
          const int64_t count = std::min(num_blocks, m + 1);
          const std::vector<int32_t> got(selected.begin() + m * num_blocks,
                                         selected.begin() + m * num_blocks + count);
          ASSERT_EQ(got, want.blocks[m]) << "row block " << m;
          for (int64_t i = count; i < num_blocks; ++i) ASSERT_EQ(selected[m * num_blocks + i], -7) << m;
        }
      }
    }
  }
}

TEST_P(SelectBlocksTest, TiesGoToTheLowerBlockAndASingleForcedBlockIsTheDiagonal) {
  CpuBackend backend(1);
  const std::vector<float> q(8 * 3, 1.0F);
  std::vector<float> k(8 * 9, 1.0F);
  for (int64_t i = 0; i < 8; ++i) k[4 * 8 + i] = -0.0F, k[5 * 8 + i] = 0.0F;
  const PositionMap row_blocks_3_5_7{3 * 64, 64, 128};
  std::vector<int32_t> selected(3 * 3);
  SelectBlocksParams params{q.data(), row_blocks_3_5_7, 3, k.data(), 9, 8, 3, false, selected.data()};
  LF_ASSERT_OK(RunSelectBlocks(backend, params));
  EXPECT_EQ(selected, (std::vector<int32_t>{0, 1, 2, 0, 1, 2, 0, 1, 2}));
  params.force = true;
  LF_ASSERT_OK(RunSelectBlocks(backend, params));
  EXPECT_EQ(selected, (std::vector<int32_t>{0, 1, 3, 0, 1, 5, 0, 1, 7}));
  params.num_blocks = 1;
  selected.resize(3);
  LF_ASSERT_OK(RunSelectBlocks(backend, params));
  EXPECT_EQ(selected, (std::vector<int32_t>{3, 5, 7}));
  // Largest scores do not displace forced blocks.
  for (int64_t i = 0; i < 8; ++i) k[2 * 8 + i] = 1e30F;
  params.num_blocks = 2;
  selected.resize(6);
  LF_ASSERT_OK(RunSelectBlocks(backend, params));
  EXPECT_EQ(selected, (std::vector<int32_t>{0, 3, 0, 5, 0, 7}));
}

TEST(SelectBlocksErrors, NameWhatIsWrong) {
  CpuBackend backend(1);
  std::vector<float> data(64);
  std::vector<int32_t> selected(4);
  SelectBlocksParams params{data.data(),    PositionMap::Contiguous(4 * 64), 1, data.data(), 4, 8, 1, true,
                            selected.data()};
  EXPECT_THAT(RunSelectBlocks(backend, params),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("row block 4 of 4")));
  params.positions = PositionMap::Contiguous(3 * 64);
  LF_EXPECT_OK(RunSelectBlocks(backend, params));
  EXPECT_THAT(backend.kernels().SelectBlocks(params, {data.data(), 64}, backend.stream()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("workspace of 64 bytes")));
  params.num_blocks = 0;
  EXPECT_THAT(RunSelectBlocks(backend, params),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("num_blocks 0")));
}

}  // namespace
}  // namespace longfill
