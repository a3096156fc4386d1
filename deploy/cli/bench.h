#ifndef LONGFILL_DEPLOY_CLI_BENCH_H_
#define LONGFILL_DEPLOY_CLI_BENCH_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "deploy/cli/command.h"
#include "kernels/api/backend.h"
#include "kernels/base/status.h"

namespace longfill {

// The subcommands of `longfill bench`.
Command AddBenchPrefill(CLI::App& bench);
Command AddBenchScaling(CLI::App& bench);
Command AddBenchAttention(CLI::App& bench);
Command AddBenchIndex(CLI::App& bench);
Command AddBenchShares(CLI::App& bench);

// --kernels of those that measure kernels: "auto" or "generic".
void AddKernelsOption(CLI::App& app, std::string& kernels);
absl::Status CheckKernels(const std::string& kernels, const ModelOptions& options);
// InvalidArgument unless every KV head has as many query heads.
absl::Status CheckHeads(int64_t num_q_heads, int64_t num_kv_heads);

// What the benchmarks of one layer's selection have in common.
struct SelectionBenchOptions {
  ModelOptions device;  // its device, dtype and threads
  std::vector<int64_t> tokens = {32768, 131072, 1048576};
  int64_t num_q_heads = 32;
  int64_t num_kv_heads = 8;
  int64_t head_dim = 128;
  std::string kernels = "auto";
  int repeat = 5;
  uint64_t seed = 1;
  bool json = false;
};
void AddSelectionBenchOptions(CLI::App& app, SelectionBenchOptions& options);
absl::StatusOr<std::shared_ptr<Backend>> MakeSelectionBackend(const SelectionBenchOptions& options);

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_BENCH_H_
