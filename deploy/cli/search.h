#ifndef LONGFILL_DEPLOY_CLI_SEARCH_H_
#define LONGFILL_DEPLOY_CLI_SEARCH_H_

// `longfill search`, and what its parts share: its options, and the model that it works on.

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "deploy/cli/command.h"
#include "models/config.h"
#include "models/pattern_file.h"
#include "models/search/cost_table.h"
#include "models/search/sample_pass.h"
#include "models/weights.h"

namespace longfill {

struct SearchCommandOptions {
  ModelOptions model;
  std::string geometry;  // instead of a model
  uint64_t seed = 1;     // of its weights
  std::vector<std::string> token_paths;
  std::string out;
  bool calibrate = false;
  std::vector<std::string> evaluate;
  std::string cost_path;
  std::vector<std::string> candidates;
  std::vector<double> budgets;
  bool as_given = false;
  std::string reference = "vertical-slash:1000,6096";
  double time_share = 0;   // 0: not given
  double mean_recall = 0;  // 0: not given
  double head_recall = 0;  // 0: not given
  std::string value = "end";
  double end_share = -1;     // below 0: not given
  double answer_share = -1;  // below 0: not given
  std::string coverage = "tiles";
  std::vector<int64_t> target_tokens;  // empty: the longest sample's; per_length: those of all samples
  bool per_length = false;
  int64_t max_rows = 0;  // 0: kDefaultSearchRows
  int64_t calibration_layers = 2;
  int runs = 0;  // 0: 3 of a calibration, 1 of an evaluation
  bool json = false;
};
inline constexpr int64_t kDefaultSearchRows = 4096;

// Input that rank 0 has read and sent to all; equal on all ranks.
struct SearchInput {
  std::vector<std::vector<int32_t>> samples;
  std::string cost_json;  // empty: no table was given
};

// The model on this rank.
struct LoadedModel {
  ModelConfig config;
  std::shared_ptr<Backend> backend;
  std::unique_ptr<const ModelWeights> weights;
  std::string fingerprint;
  std::string name;
  SearchModel view() const { return {config, *weights, *backend}; }
};

// SHA-256, 64 hex digits, over the samples, each preceded by its length: little-endian int32 throughout.
absl::StatusOr<std::string> SamplesHash(const std::vector<std::vector<int32_t>>& samples);

// Options of one pass over the samples.
SamplePassOptions MakePassOptions(const SearchCommandOptions& options, int num_threads,
                                  const StopSignals& signals);

// The three things that the command does, on all ranks or, the first two, on one; returns what rank 0 prints.
absl::StatusOr<std::string> RunCalibration(const SearchCommandOptions& options, const SearchInput& input,
                                           const LoadedModel& model, const SamplePassOptions& pass);
absl::StatusOr<std::string> RunEvaluation(const SearchCommandOptions& options, const SearchInput& input,
                                          const LoadedModel& model, const SamplePassOptions& pass);
absl::StatusOr<std::string> RunPatternSearch(const SearchCommandOptions& options, const SearchInput& input,
                                             const LoadedModel& model, const SamplePassOptions& pass,
                                             World& world);

// "score: layer 3 of 8, 12.1 s, about 20.0 s left" on standard error, for every tenth of the work.
class ProgressLines {
 public:
  explicit ProgressLines(bool quiet) : quiet_(quiet) {}
  void Report(const std::string& what, int64_t done, int64_t total, double seconds, double seconds_left);
  // Of equal pieces of work, begun when this was made.
  void ReportEqualPieces(const std::string& what, int64_t done, int64_t total);

 private:
  const bool quiet_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::string what_;
  int64_t last_tenth_ = 0;
};

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_SEARCH_H_
