#ifndef LONGFILL_MODELS_SEARCH_CALIBRATION_H_
#define LONGFILL_MODELS_SEARCH_CALIBRATION_H_

// Measures a cost table: families at growing scales on the queries, keys and values of real prompts, since
// how many pairs a selection covers, and in how many pieces, depends on what the heads attend to.

#include <functional>
#include <span>
#include <vector>

#include "models/search/cost_table.h"
#include "models/search/sample_pass.h"

namespace longfill {

struct CalibrationOptions {
  std::vector<HeadPattern> families;  // dense is measured beside them
  int64_t num_layers = 2;             // evenly spaced; at most those of the model
  int runs = 3;                       // of each measurement; the median counts
  SamplePassOptions pass;
  std::function<void(int64_t done, int64_t total)> on_progress;  // measurements; may be empty
};

// Scales that are measured, ascending. A family goes no further once it covers nearly all pairs.
std::span<const double> CalibrationScales();

CostTableDevice TableDeviceOf(const SearchModel& model, Coverage coverage);

// One curve for each family and each length of the samples, the first sample of a length. One rank.
absl::StatusOr<CostTable> MeasureCosts(const SearchModel& model,
                                       std::span<const std::vector<int32_t>> samples,
                                       const CalibrationOptions& options);

}  // namespace longfill

#endif  // LONGFILL_MODELS_SEARCH_CALIBRATION_H_
