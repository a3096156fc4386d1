#ifndef LONGFILL_DEPLOY_CLI_COMMAND_H_
#define LONGFILL_DEPLOY_CLI_COMMAND_H_

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "deploy/cli/environment.h"
#include "deploy/cli/signals.h"
#include "kernels/base/status.h"
#include "parallel/mesh.h"
#include "runtime/engine/prefill_engine.h"

namespace longfill {

enum ExitCode : int {
  kExitDone = 0,
  kExitFailed = 1,
  kExitUsage = 2,     // bad usage or input
  kExitRankLost = 3,  // serve: a rank was lost, the group has to be started anew
};

// What every subcommand gets.
struct CommandContext {
  Launch launch;
  StopSignals* signals = nullptr;
};

// One subcommand: its options are in `app`, `run` executes it after they were parsed and returns the exit
// code.
struct Command {
  CLI::App* app = nullptr;
  std::function<int(CommandContext& context)> run;
};

Command AddBenchCommand(CLI::App& program);
Command AddInspectCommand(CLI::App& program);
Command AddPrefillCommand(CLI::App& program);
Command AddServeCommand(CLI::App& program);
Command AddSubmitCommand(CLI::App& program);

// "longfill: message" as one line on standard error.
void PrintError(std::string_view message);
// Prints the error and returns the exit code that its status code stands for.
int Report(const absl::Status& status);
int ExitCodeOf(const absl::Status& status);

// Options that several subcommands share.
struct ModelOptions {
  std::string model_dir;
  std::string mesh_text;       // empty: sequence=ranks,head=1
  std::string device = "cpu";  // "cpu", "cuda" or "cuda:N"
  std::string device_dtype;    // empty: that of the device
  int threads = 0;             // 0: DefaultThreads
  int64_t dense_below = AttentionDefaults{}.dense_below;
  uint64_t memory_limit_bytes = 0;  // of each rank; 0: what is available when a prompt comes
  std::string patterns_path;
};
void AddModelOption(CLI::App& app, ModelOptions& options);
void AddMeshOption(CLI::App& app, ModelOptions& options);
void AddDeviceOption(CLI::App& app, ModelOptions& options);
void AddThreadsOption(CLI::App& app, ModelOptions& options);
void AddMemoryOption(CLI::App& app, ModelOptions& options);
void AddPatternOptions(CLI::App& app, ModelOptions& options);

// Local checks of the shared options and what the engine wants of them; equal on all ranks where the file
// systems are.
absl::StatusOr<EngineOptions> MakeEngineOptions(const ModelOptions& options, const World& world);
// The device alone, for `ranks_on_host` ranks. Unimplemented, saying what is missing, where it cannot be used
// here.
absl::StatusOr<DeviceOptions> MakeDeviceOptions(const ModelOptions& options, int ranks_on_host,
                                                int local_rank);
// FILE, or DIR/patterns.json.
absl::StatusOr<AttentionSpec> ReadPatterns(const std::string& path);
// What the pattern options say; the engine adds those of the model directory.
absl::StatusOr<AttentionDefaults> MakeAttentionDefaults(const ModelOptions& options);

// Options of a prompt that `prefill` and `submit` share.
struct PromptOptions {
  std::vector<std::string> token_paths;
  std::string out;
  std::string attention = "auto";
  std::string coverage = "tiles";
  std::string logits = "last";
  std::string kv_dtype;  // empty: what the device computes in
  bool overwrite = false;
  bool json = false;
};
// Returns --out, so that a subcommand can require it.
CLI::Option* AddPromptOptions(CLI::App& app, PromptOptions& options);

// The prompts that the options describe, token files read and options parsed; ids, memory and the model are
// not looked at. request_id is the number of the prompt, "000". kv_dtype is for the caller where the options
// leave it open.
absl::StatusOr<std::vector<PrefillRequest>> ReadPrompts(const PromptOptions& options);

// 32 hex digits from the kernel's random numbers.
std::string RandomId();

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_COMMAND_H_
