// longfill bench: measurements that need no checkpoint.

#include "deploy/cli/bench.h"

#include <algorithm>
#include <utility>

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
