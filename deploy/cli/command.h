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
#include "models/weights.h"
#include "parallel/mesh.h"
#include "parallel/nccl_communicator.h"
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
Command AddDoctorCommand(CLI::App& program);
Command AddEvalCommand(CLI::App& program);
Command AddInspectCommand(CLI::App& program);
Command AddPrefillCommand(CLI::App& program);
Command AddSearchCommand(CLI::App& program);
Command AddServeCommand(CLI::App& program);
Command AddSubmitCommand(CLI::App& program);

// "longfill: message" as one line on standard error.
void PrintError(std::string_view message);
// Prints the error and returns the exit code that its status code stands for.
int Report(const absl::Status& status);
int ExitCodeOf(const absl::Status& status);
// Writes out what standard output holds; Internal if that fails: what was printed is not there.
absl::Status FlushOutput();
// The exit code of a command that could not make its World; the first process says why.
int ReportNoWorld(const Launch& launch, const absl::Status& status);

// Options that several subcommands share.
struct ModelOptions {
  std::string model_dir;
  std::string mesh_text;                   // empty: sequence=ranks,head=1
  std::string device = "cpu";              // "cpu", "cuda" or "cuda:N"
  std::string device_dtype;                // empty: that of the device
  std::string communicator = "auto";       // "auto", "nccl" or "mpi"
  int nccl_ctas = NcclOptions().max_ctas;  // NcclOptions
  std::string peer_copies = "auto";        // "auto", "on" or "off"
  std::string weights = "replicated";      // or "sharded"
  int threads = 0;                         // 0: DefaultThreads
  int64_t dense_below = AttentionDefaults{}.dense_below;
  int64_t memory_limit_bytes = 0;  // of each rank; 0: what is available when a prompt comes
  std::string patterns_path;
};
// Returns --model, which is required.
CLI::Option* AddModelOption(CLI::App& app, ModelOptions& options);
void AddMeshOption(CLI::App& app, ModelOptions& options);
void AddDeviceOption(CLI::App& app, ModelOptions& options);
void AddWeightsOption(CLI::App& app, ModelOptions& options);
void AddThreadsOption(CLI::App& app, ModelOptions& options);
void AddMemoryOption(CLI::App& app, ModelOptions& options);
// A number of bytes, 1 to 2^63 - 1, alone or with a unit: 4GB is 4 * 10^9, 64MiB 64 * 2^20. InvalidArgument
// names `text`.
absl::StatusOr<int64_t> ParseBytes(const std::string& text);
// A CLI11 check for whole numbers: CLI11's own call them "in range 1.000000 to 1797693134862315...".
CLI::Validator AtLeast(int64_t least);
void AddPatternOptions(CLI::App& app, ModelOptions& options);

// Local checks of the shared options and what the engine wants of them; equal on all ranks where the file
// systems are.
absl::StatusOr<EngineOptions> MakeEngineOptions(const ModelOptions& options, const World& world);
// The device alone, for `ranks_on_host` ranks, as the options say, whether it is there or not.
absl::StatusOr<DeviceOptions> DescribeDevice(const ModelOptions& options, int ranks_on_host, int local_rank);
// Likewise. Unimplemented, saying what is missing, where it cannot be used
// here.
absl::StatusOr<DeviceOptions> MakeDeviceOptions(const ModelOptions& options, int ranks_on_host,
                                                int local_rank);
absl::StatusOr<DeviceCommunicatorOptions> MakeCommunicatorOptions(const ModelOptions& options);
WeightPlacement MakeWeightPlacement(const ModelOptions& options);
// Bytes of the weights of the largest rank, in the memory of the device whose kernels are given: from the
// checkpoint, or without one (nullptr) from the shapes alone.
int64_t LargestWeightsBytes(WeightPlacement placement, const ModelConfig& config, const ModelWeights* weights,
                            const Mesh& mesh, const KernelSet& kernels);
// --patterns: FILE, or the file in DIR for the model of --model, by its names (models/pattern_directory.h).
absl::StatusOr<AttentionSpec> ReadPatterns(const ModelOptions& options);
// What the pattern options say; the engine adds those of the model directory.
absl::StatusOr<AttentionDefaults> MakeAttentionDefaults(const ModelOptions& options);

// --recall-monitor and --min-recall, of `prefill`, `submit`, `serve`, `inspect` and `bench prefill`.
struct RecallArguments {
  RecallOptions options;
  bool given = false;  // one of them was
};
// `otherwise`: what holds where none is given, for the help.
void AddRecallOptions(CLI::App& app, std::string_view otherwise, RecallArguments& arguments);

// Options of a prompt that `prefill` and `submit` share.
struct PromptOptions {
  std::vector<std::string> token_paths;
  std::string out;
  std::string attention = "auto";
  std::string coverage = "tiles";
  std::string logits = "last";
  std::string kv_dtype;  // empty: what the device computes in
  RecallArguments recall;
  bool overwrite = false;
  bool json = false;
};
// Returns --out, so that a subcommand can require it. `recall_otherwise`: see AddRecallOptions.
CLI::Option* AddPromptOptions(CLI::App& app, std::string_view recall_otherwise, PromptOptions& options);

// The prompts that the options describe, token files read and options parsed; ids, memory and the model are
// not looked at. request_id is the number of the prompt, "000". kv_dtype is for the caller where the options
// leave it open.
absl::StatusOr<std::vector<PrefillRequest>> ReadPrompts(const PromptOptions& options);

// 32 hex digits from the kernel's random numbers.
std::string RandomId();

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_COMMAND_H_
