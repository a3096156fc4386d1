#include "models/search/calibration.h"

#include <algorithm>
#include <iterator>
#include <set>
#include <utility>
#include <variant>

#include "kernels/sparse/coverage.h"
#include "models/search/pattern_family.h"

namespace longfill {
namespace {

constexpr double kScales[] = {1.0 / 32, 1.0 / 16, 1.0 / 8, 1.0 / 4, 1.0 / 2, 1, 2, 4};
constexpr double kNearlyAll = 0.9;  // of the causal pairs

// Sums over the layers that were measured.
struct Sums {
  double pairs = 0, attention_seconds = 0, index_seconds = 0;
  int64_t heads = 0;
};

// All families on one sample.
class SampleCalibration {
 public:
  SampleCalibration(const SearchModel& model, std::span<const int32_t> ids, const CalibrationOptions& options)
      : model_(model), ids_(ids), options_(options) {
    families_.push_back(Dense());
    families_.insert(families_.end(), options.families.begin(), options.families.end());
    sums_.resize(families_.size(), std::vector<Sums>(std::size(kScales)));
    const int64_t count = std::min(options.num_layers, model.config.num_layers);
    // The middles of equal parts: first and last layers are often unlike the others.
    for (int64_t i = 0; i < count; ++i) layers_.insert((2 * i + 1) * model.config.num_layers / (2 * count));
  }

  int64_t num_measurements() const { return static_cast<int64_t>(layers_.size() * families_.size()); }

  absl::Status Run(const std::function<void()>& on_measured) {
    SampleVisitor visitor;
    visitor.wants = [this](int64_t layer) { return layers_.contains(layer); };
    visitor.look = [&](int64_t, const LayerHeads& heads, LayerScorer& scorer) -> absl::Status {
      for (size_t family = 0; family < families_.size(); ++family) {
        LF_RETURN_IF_ERROR(MeasureFamily(family, heads, scorer));
        on_measured();
      }
      return absl::OkStatus();
    };
    visitor.after_layer = [](int64_t) { return absl::OkStatus(); };
    return RunSample(model_, ids_, *layers_.rbegin() + 1, options_.pass, visitor);
  }

  void AddCurves(CostTable* table) const {
    for (size_t family = 0; family < families_.size(); ++family) {
      CostCurve curve{.family = families_[family], .num_tokens = num_tokens()};
      for (size_t i = 0; i < std::size(kScales); ++i) {
        const Sums& sums = sums_[family][i];
        // Dense has one scale; others are measured as far as their indices fit on every layer.
        if (sums.heads < static_cast<int64_t>(layers_.size()) * model_.config.num_q_heads) continue;
        const auto heads = static_cast<double>(sums.heads);
        curve.points.push_back(
            {kScales[i], sums.pairs / heads, sums.attention_seconds / heads, sums.index_seconds / heads});
      }
      table->Add(std::move(curve));
    }
  }

 private:
  int64_t num_tokens() const { return static_cast<int64_t>(ids_.size()); }

  absl::Status MeasureFamily(size_t family, const LayerHeads& heads, LayerScorer& scorer) {
    const int64_t num_heads = model_.config.num_q_heads;
    const double all_pairs = static_cast<double>(CausalPairs(num_tokens()) * num_heads);
    const bool is_dense = std::holds_alternative<Dense>(families_[family]);
    LayerTime time;
    HeadPattern before;
    for (size_t i = 0; i < std::size(kScales); ++i) {
      if (is_dense && kScales[i] != 1) continue;
      const HeadPattern pattern = ScalePattern(families_[family], kScales[i]);
      // What covers nearly all is not measured again at larger scales, nor is the same pattern.
      const bool saturated = static_cast<double>(time.pairs) >= kNearlyAll * all_pairs || pattern == before;
      if (!saturated || i == 0 || is_dense) {
        const std::vector<HeadPattern> patterns(static_cast<size_t>(num_heads), pattern);
        absl::StatusOr<LayerTime> measured = scorer.Measure(heads, patterns, options_.runs);
        // An index that does not fit into memory is no candidate; a smaller one was.
        if (absl::IsResourceExhausted(measured.status()) && i > 0 && !is_dense) return absl::OkStatus();
        LF_RETURN_IF_ERROR(measured.status());
        time = *measured;
      }
      before = pattern;
      Sums& sums = sums_[family][i];
      sums.pairs += static_cast<double>(time.pairs);
      sums.attention_seconds += time.attention_seconds;
      sums.index_seconds += time.index_seconds;
      sums.heads += num_heads;
    }
    return absl::OkStatus();
  }

  const SearchModel& model_;
  const std::span<const int32_t> ids_;
  const CalibrationOptions& options_;
  std::vector<HeadPattern> families_;
  std::set<int64_t> layers_;
  std::vector<std::vector<Sums>> sums_;  // [family][scale]
};

}  // namespace

std::span<const double> CalibrationScales() { return kScales; }

CostTableDevice TableDeviceOf(const SearchModel& model, Coverage coverage) {
  return {.device = model.backend.facts().name,
          .compute_dtype = model.backend.kernels().compute_dtype(),
          .num_q_heads = model.config.num_q_heads,
          .num_kv_heads = model.config.num_kv_heads,
          .head_dim = model.config.head_dim,
          .coverage = coverage};
}

absl::StatusOr<CostTable> MeasureCosts(const SearchModel& model,
                                       std::span<const std::vector<int32_t>> samples,
                                       const CalibrationOptions& options) {
  std::vector<SampleCalibration> calibrations;
  std::set<size_t> lengths;
  int64_t total = 0;
  for (const std::vector<int32_t>& sample : samples) {
    if (!lengths.insert(sample.size()).second) continue;
    calibrations.emplace_back(model, sample, options);
    total += calibrations.back().num_measurements();
  }
  CostTable table(TableDeviceOf(model, options.pass.coverage));
  int64_t done = 0;
  for (SampleCalibration& calibration : calibrations) {
    LF_RETURN_IF_ERROR(calibration.Run([&] {
      ++done;
      if (options.on_progress) options.on_progress(done, total);
    }));
    calibration.AddCurves(&table);
  }
  return table;
}

}  // namespace longfill
