#ifndef LONGFILL_RUNTIME_SCALING_SCALING_FIGURES_H_
#define LONGFILL_RUNTIME_SCALING_SCALING_FIGURES_H_

// What recordings of all ranks of a mesh say of a prefill on it. Pure functions of values.

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/base/status.h"
#include "models/pattern_file.h"
#include "runtime/scaling/link_model.h"
#include "runtime/scaling/rank_recording.h"

namespace longfill {

// Not every layer has to run: one with the patterns and the recorded selections of another takes as long, and
// where less is wanted than all, some stand for their neighbours.
struct LayerChoice {
  std::vector<int64_t> executed;  // ascending
  std::vector<size_t> stand_in;   // [num_layers], places in `executed`
};

// At most `limit` layers (0: no limit), spread evenly. `num_recorded_layers`: after how many layers the
// recorded selections come again; 0: nothing is recorded.
LayerChoice ChooseLayers(const PatternSet& patterns, int64_t num_recorded_layers, int64_t limit);

struct ScalingFigures {
  double seconds = 0;
  // Beyond those of links that take no time, whose ranks still wait for each other.
  double exposed_communication_seconds = 0;
  double communication_seconds = 0;  // of the rank whose links are busy longest, without waiting for peers
  LinkBytes bytes;                   // of the rank that has most, of each kind of link
  // Sum over layers of the slowest rank's attention over the sum of the means; 1 where there is none.
  double imbalance = 1;
  std::array<double, kNumWorkParts> mean_seconds{};     // of the device, over the ranks
  std::array<double, kNumWorkParts> slowest_seconds{};  // of each part's slowest rank
};

// recordings: [ranks], of the layers of `choice`. Internal: their exchanges do not fit each other.
absl::StatusOr<ScalingFigures> ComputeScalingFigures(const std::vector<RankRecording>& recordings,
                                                     const LayerChoice& choice,
                                                     const std::vector<std::vector<int>>& groups,
                                                     const LinkRates& links);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_SCALING_SCALING_FIGURES_H_
