#ifndef LONGFILL_DEPLOY_CLI_BENCH_WORK_H_
#define LONGFILL_DEPLOY_CLI_BENCH_WORK_H_

// The prompt that `bench prefill` and `bench scaling` measure: random ids on a model without a checkpoint,
// with recorded selections where there are some.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "deploy/cli/command.h"
#include "models/config.h"
#include "models/pattern_file.h"
#include "runtime/engine/attention_spec.h"
#include "runtime/engine/replayed_indices.h"

namespace longfill {

struct BenchWorkOptions {
  std::string geometry;
  int64_t num_tokens = 0;
  std::string attention = "dense";  // where there is no ModelOptions::patterns_path
  std::string coverage = "tiles";
  std::string indices;
  uint64_t seed = 1;
};
// With --patterns, which goes to `model`.
void AddBenchWorkOptions(CLI::App& app, BenchWorkOptions& options, ModelOptions& model);

// What the options say, checked; equal on all ranks where the file systems are.
struct BenchWork {
  ModelConfig config;
  AttentionSpec attention;
  PatternSet patterns;  // of `attention`
  Coverage coverage = Coverage::kTiles;
  std::shared_ptr<ReplayedIndices> replayed;  // empty: the indices that are built are used
  int64_t num_recorded_layers = 0;            // of these
  std::vector<int32_t> token_ids;
};
// InvalidArgument, Unimplemented or DataLoss (a broken recording), naming option and value.
absl::StatusOr<BenchWork> ReadBenchWork(const BenchWorkOptions& options, const ModelOptions& model,
                                        const AttentionDefaults& defaults);

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_BENCH_WORK_H_
