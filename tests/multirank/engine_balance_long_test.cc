// Balance of all layers of a real model at 32K tokens: minutes of compute.

#include "tests/multirank/engine_group.h"
#include "tests/multirank/needle_32k.h"

namespace longfill {
namespace {

class BalanceOfAllLayersAt32K : public testing::TestWithParam<const char*> {};

TEST_P(BalanceOfAllLayersAt32K, FallsEvenlyOnSequenceRanks) {
  if (!HasNeedle()) GTEST_SKIP() << "needs " << NeedleModel() << " and " << FillerFile();
  Recorder recorder;
  const GroupOptions options{.model_dir = NeedleModel(), .mesh = {8, 1}, .timeout = std::chrono::minutes(20)};
  WithEngine(options, recorder, [&](PrefillEngine& engine) {
    LF_ASSERT_OK_AND_ASSIGN(const PrefillResult result,
                            Prefill(engine, recorder, MakeRequest("balance", FillerIds(), GetParam())));
    const std::vector<int64_t>& loads = result.figures.rank_covered_pairs;
    ASSERT_EQ(loads.size(), 8u);
    const double total = static_cast<double>(result.figures.covered_pairs);
    for (const int size : {8, 4, 2}) {  // rank r of fewer ranks has the blocks of ranks r, r + size, ...
      for (int rank = 0; rank < size; ++rank) {
        int64_t load = 0;
        for (int r = rank; r < 8; r += size) load += loads[r];
        EXPECT_LE(static_cast<double>(load) * size / total, 1.10) << "rank " << rank << " of " << size;
      }
    }
  });
}

INSTANTIATE_TEST_SUITE_P(, BalanceOfAllLayersAt32K,
                         testing::Values("vertical-slash:1000,6096", "vertical-slash:500,700"),
                         [](const auto& test) { return test.index == 0 ? "Published" : "Small"; });

}  // namespace
}  // namespace longfill
