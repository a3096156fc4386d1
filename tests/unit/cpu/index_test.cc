// BuildIndex and CountPairs on the CPU: errors, and that the split over threads loses nothing.

#include <algorithm>

#include "kernels/sparse/coverage.h"
#include "tests/unit/cpu/cpu_test_util.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

TEST(CountPairsTest, OfManyHeadsAreTheSameOnEveryThreadCount) {
  std::vector<SparseIndex> indices;
  indices.push_back(MakeDenseIndex());
  indices.push_back(MakeAShapeIndex({100, 300}));
  indices.push_back(MakeVerticalSlashIndex({3, 70, 5000}, {0, 65, 131, 2000}, Coverage::kTiles));
  indices.push_back(MakeVerticalSlashIndex({3, 70, 5000}, {0, 65, 131, 2000}, Coverage::kParity));
  const PackedIndices packed(indices);
  const std::vector<IndexView> views = packed.Views(packed.data());
  for (const int64_t n : {0, 1, 64 * 64, 64 * 64 + 1, 20011}) {
    std::vector<PairCounts> want(views.size());
    std::transform(views.begin(), views.end(), want.begin(),
                   [n](const IndexView& view) { return CountPairs(view, n); });
    for (const int threads : {1, 3}) {
      CpuBackend backend(threads);
      std::vector<PairCounts> got(views.size(), PairCounts{7, 7});
      LF_ASSERT_OK(backend.kernels().CountPairs(
          {views, n, got.data()},
          backend.WorkspaceOf(backend.kernels().CountPairsWorkspaceBytes(views.size(), n)),
          backend.stream()));
      EXPECT_EQ(got, want) << n << " tokens, " << threads << " threads";
    }
  }
}

TEST(IndexErrors, NameWhatIsWrong) {
  CpuBackend backend(1);
  PairCounts counts;
  EXPECT_THAT(backend.kernels().CountPairs({{}, -1, &counts}, {}, backend.stream()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("num_tokens -1")));
  const IndexBuffers buffers{.run_capacity = -2};
  EXPECT_THAT(
      backend.kernels().BuildIndex({nullptr, 0, Coverage::kTiles, {&buffers, 1}}, {}, backend.stream()),
      StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("capacity -2")));
}

}  // namespace
}  // namespace longfill
