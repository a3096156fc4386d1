#include <map>

#include "kernels/cpu/oracle/oracle.h"
#include "tests/unit/cpu/cpu_test_util.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

TEST(SelectionHistogramTest, CountsDigitsOfKeysUnderThePrefix) {
  CpuBackend backend(3);
  std::mt19937_64 generator(1);
  for (int64_t num_keys : {0, 1, 127, 65536, 65537, 150001}) {
    const int64_t lists = 3, stride = num_keys + 2;
    std::vector<uint64_t> keys(static_cast<size_t>(lists * stride));
    for (uint64_t& key : keys) key = generator() & 0xF00FFF00000000FF;
    const std::vector<uint64_t> prefixes = {0x1, 0xF, 0x3};
    for (auto [prefix_shift, digit_shift, bins] :
         {std::tuple{64, 52, 4096}, std::tuple{60, 36, 256}, std::tuple{60, 0, 1}, std::tuple{60, 63, 2}}) {
      SCOPED_TRACE(testing::Message() << num_keys << " keys, shifts " << prefix_shift << " " << digit_shift);
      std::vector<uint64_t> want(static_cast<size_t>(lists * bins));
      for (int64_t list = 0; list < lists; ++list) {
        for (int64_t i = 0; i < num_keys; ++i) {
          const uint64_t key = keys[list * stride + i];
          if (prefix_shift == 64 || key >> prefix_shift == prefixes[list]) {
            ++want[list * bins + (key >> digit_shift) % bins];
          }
        }
      }
      std::vector<uint64_t> got(want.size(), 99);
      SelectionHistogramParams params{keys.data(),  stride,      num_keys, lists,     prefixes.data(),
                                      prefix_shift, digit_shift, bins,     got.data()};
      LF_ASSERT_OK(backend.kernels().SelectionHistogram(params, backend.stream()));
      EXPECT_EQ(got, want);
    }
  }
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
        std::vector<int32_t> row_blocks(static_cast<size_t>(blocks));
        for (int64_t m = 0; m < blocks; ++m) row_blocks[m] = static_cast<int32_t>(m);
        std::vector<int32_t> selected(static_cast<size_t>(blocks * num_blocks), -7);
        SelectBlocksParams params{pooled_q.data(), row_blocks, pooled_k.data(), blocks, dim,
                                  num_blocks,      force,      selected.data()};
        LF_ASSERT_OK(backend.kernels().SelectBlocks(params, backend.stream()));
        EXPECT_EQ(backend.memory().bytes_in_use(), 0);
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
  const std::vector<int32_t> row_blocks = {8, 3, 5};
  std::vector<int32_t> selected(3 * 3);
  SelectBlocksParams params{q.data(), row_blocks, k.data(), 9, 8, 3, false, selected.data()};
  LF_ASSERT_OK(backend.kernels().SelectBlocks(params, backend.stream()));
  EXPECT_EQ(selected, (std::vector<int32_t>{0, 1, 2, 0, 1, 2, 0, 1, 2}));
  params.force = true;
  LF_ASSERT_OK(backend.kernels().SelectBlocks(params, backend.stream()));
  EXPECT_EQ(selected, (std::vector<int32_t>{0, 1, 8, 0, 1, 3, 0, 1, 5}));
  params.num_blocks = 1;
  selected.resize(3);
  LF_ASSERT_OK(backend.kernels().SelectBlocks(params, backend.stream()));
  EXPECT_EQ(selected, (std::vector<int32_t>{8, 3, 5}));
  // Largest scores do not displace forced blocks.
  for (int64_t i = 0; i < 8; ++i) k[2 * 8 + i] = 1e30F;
  params.num_blocks = 2;
  selected.resize(6);
  LF_ASSERT_OK(backend.kernels().SelectBlocks(params, backend.stream()));
  EXPECT_EQ(selected, (std::vector<int32_t>{0, 8, 0, 3, 0, 5}));
}

TEST(SelectionErrors, NameWhatIsWrong) {
  CpuMemoryResource small(64);
  ThreadPool pool(1);
  const std::unique_ptr<KernelSet> kernels = CreateCpuKernelSet(pool, small);
  CpuStream stream;
  std::vector<float> data(64);
  std::vector<int32_t> row_blocks = {4}, selected(4);
  SelectBlocksParams params{data.data(), row_blocks, data.data(), 4, 8, 1, true, selected.data()};
  EXPECT_THAT(kernels->SelectBlocks(params, stream),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("row block 4 of 4")));
  row_blocks[0] = 3;
  EXPECT_THAT(kernels->SelectBlocks(params, stream),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("block selection scratch")));
  params.num_blocks = 0;
  EXPECT_THAT(kernels->SelectBlocks(params, stream),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("num_blocks 0")));
  std::vector<uint64_t> keys(4), histogram(8192);
  SelectionHistogramParams histogram_params{keys.data(), 4, 4, 1, nullptr, 64, 0, 3, histogram.data()};
  EXPECT_THAT(kernels->SelectionHistogram(histogram_params, stream),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("num_bins 3")));
  histogram_params.num_bins = 8192;
  EXPECT_THAT(kernels->SelectionHistogram(histogram_params, stream),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("8192 bins")));
}

}  // namespace
}  // namespace longfill
