// longfill bench: measurements that need no checkpoint.

#include "deploy/cli/bench.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/engine/engine_device.h"

namespace longfill {

void AddKernelsOption(CLI::App& app, std::string& kernels) {
  app.add_option(
         "--kernels", kernels,
         "auto (default): those that are fastest on the device; generic: those that run on every GPU,\n"
         "with which auto is compared where it is checked")
      ->type_name("KIND")
      ->check(CLI::IsMember({"auto", "generic"}));
}

absl::Status CheckKernels(const std::string& kernels, const ModelOptions& options) {
  if (kernels != "generic" || options.device != "cpu") return absl::OkStatus();
  return absl::InvalidArgumentError(
      "--kernels generic is for --device cuda: the CPU has kernels of one kind");
}

absl::Status CheckHeads(int64_t num_q_heads, int64_t num_kv_heads) {
  if (num_q_heads % num_kv_heads == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("--q-heads ", num_q_heads, " is not a multiple of --kv-heads ", num_kv_heads));
}

void AddSelectionBenchOptions(CLI::App& app, SelectionBenchOptions& options) {
  app.add_option("--tokens", options.tokens, "lengths of the prompt (default: 32768,131072,1048576)")
      ->type_name("N,...")
      ->delimiter(',')
      ->check(CLI::Range(int64_t{1}, (int64_t{1} << 31) - 128));
  const CLI::Range heads(1, 65536);
  app.add_option("--q-heads", options.num_q_heads, "query heads, all of which select (default: 32)")
      ->type_name("N")
      ->check(heads);
  app.add_option("--kv-heads", options.num_kv_heads, "KV heads (default: 8)")->type_name("N")->check(heads);
  app.add_option("--head-dim", options.head_dim, "(default: 128)")
      ->type_name("D")
      ->check(CLI::Range(1, 4096));
  app.add_option("--repeat", options.repeat, absl::StrCat("timed runs (default: ", options.repeat, ")"))
      ->type_name("R")
      ->check(CLI::Range(1, 1000));
  app.add_option("--seed", options.seed, "of Q and K (default: 1)")->type_name("S");
  app.add_flag("--json", options.json, "one JSON object and nothing else on standard output");
  AddKernelsOption(app, options.kernels);
  AddDeviceOption(app, options.device);
  AddThreadsOption(app, options.device);
}

absl::StatusOr<std::shared_ptr<Backend>> MakeSelectionBackend(const SelectionBenchOptions& options) {
  LF_ASSIGN_OR_RETURN(DeviceOptions device, MakeDeviceOptions(options.device, 1, 0));
  device.generic_kernels = options.kernels == "generic";
  return CreateBackend(device);
}

Command AddBenchCommand(CLI::App& program) {
  CLI::App* bench = program.add_subcommand("bench", "Measure without a checkpoint");
  bench->require_subcommand(1);
  std::vector<Command> commands = {AddBenchPrefill(*bench), AddBenchScaling(*bench),
                                   AddBenchAttention(*bench), AddBenchIndex(*bench), AddBenchShares(*bench)};
  return {bench, [commands = std::move(commands)](CommandContext& context) {
            const auto parsed = std::find_if(commands.begin(), commands.end(),
                                             [](const Command& command) { return command.app->parsed(); });
            return parsed->run(context);
          }};
}

}  // namespace longfill
