#ifndef LONGFILL_DEPLOY_CLI_BENCH_H_
#define LONGFILL_DEPLOY_CLI_BENCH_H_

#include <string>

#include "deploy/cli/command.h"
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

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_BENCH_H_
