#ifndef LONGFILL_MODELS_SEARCH_COST_TABLE_H_
#define LONGFILL_MODELS_SEARCH_COST_TABLE_H_

// What patterns take on a device: measured points, and the predictions that are read off them. Kernel-aware
// search asks it instead of a clock, so that its result does not depend on what else the machine did.
//
// The file is strict JSON:
//   {"longfill_cost_table": {
//     "version": 1, "device": "CPU (AVX3, 2 threads)", "compute_dtype": "float32",
//     "num_q_heads": 8, "num_kv_heads": 8, "head_dim": 64, "coverage": "tiles",
//     "curves": [{"family": "vertical-slash:1000,6096", "tokens": 32768,
//                 "points": [{"scale": 0.25, "pairs": ..., "attention_seconds": ..., "index_seconds":
//                 ...}]}]}}
// All keys are required, and no others are known. Numbers of a point are of one head: those of whole layers
// whose heads all had the pattern, divided by the heads.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/base/status.h"
#include "kernels/sparse/head_pattern.h"
#include "parallel/attention_geometry.h"

namespace longfill {

inline constexpr int64_t kMaxCostTableBytes = int64_t{4} << 20;

// What a table holds for.
struct CostTableDevice {
  std::string device;  // DeviceFacts::name
  DType compute_dtype = DType::kFloat32;
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  Coverage coverage = Coverage::kTiles;
  friend bool operator==(const CostTableDevice&, const CostTableDevice&) = default;
};

struct CostPoint {
  double scale = 1;  // ScalePattern of the family
  double pairs = 0;  // covered
  double attention_seconds = 0;
  double index_seconds = 0;
  double seconds() const { return attention_seconds + index_seconds; }
  friend bool operator==(const CostPoint&, const CostPoint&) = default;
};

// One family at one prompt length.
struct CostCurve {
  HeadPattern family;
  int64_t num_tokens = 0;
  std::vector<CostPoint> points;  // at least one; scale ascends, pairs and seconds do not descend
  friend bool operator==(const CostCurve&, const CostCurve&) = default;
};

// A value. Every prediction is in seconds of one head in one layer, index included.
class CostTable {
 public:
  CostTable() = default;
  explicit CostTable(const CostTableDevice& device) : device_(device) {}

  const CostTableDevice& device() const { return device_; }
  const std::vector<CostCurve>& curves() const { return curves_; }
  // Points in any order; of equal scales the first counts. What noise makes cheaper although it is more is
  // raised to its predecessor. LF_CHECK: no points, or values that are no finite numbers >= 0.
  void Add(CostCurve curve);

  // InvalidArgument, naming what differs, unless the table was measured for `device`.
  absl::Status CheckIsFor(const CostTableDevice& device) const;

  // The curve of the family at num_tokens. Between two measured lengths each scale that both have is
  // interpolated, in logarithms. InvalidArgument for a family or a length beyond those measured, naming what
  // there is.
  absl::StatusOr<CostCurve> CurveAt(const HeadPattern& family, int64_t num_tokens) const;

  // JSON of the form above; ParseCostTable(ToJson()) is the same table.
  std::string ToJson() const;

 private:
  CostTableDevice device_;
  std::vector<CostCurve> curves_;
};

// What a head with `pairs` covered pairs takes: linear between the points around, what the first point takes
// below it (its fixed costs), in proportion to the pairs above the last one.
double PredictSeconds(const CostCurve& curve, double pairs);

// The largest scale within the measured ones that takes at most `seconds` on the mean head, interpolated in
// logarithms; 0 where the smallest takes more.
double ScaleForSeconds(const CostCurve& curve, double seconds);

// InvalidArgument names `source` and what is wrong; Unimplemented: another version.
absl::StatusOr<CostTable> ParseCostTable(std::string_view json, std::string_view source);

}  // namespace longfill

#endif  // LONGFILL_MODELS_SEARCH_COST_TABLE_H_
