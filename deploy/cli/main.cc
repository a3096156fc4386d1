// longfill: one program for the prefill service, the batch job and the client.

#include <unistd.h>

#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "deploy/cli/command.h"
#include "deploy/cli/version.h"

namespace longfill {
namespace {

constexpr char kFooter[] =
    "Exit codes: 0 done, 1 failed, 2 bad usage or input, with one line on standard error;\n"
    "serve: 3 when a rank or its GPU was lost and the group has to be started anew.\n"
    "Ranks: mpirun -np N longfill prefill|serve ... splits every prompt over N ranks, search its layers.";

std::string VersionText() { return absl::StrCat("longfill ", kVersion, " (commit ", kGitCommit, ")"); }

// All ranks see the same bad usage. They leave together: mpirun ends the others as soon as one has failed,
// perhaps before rank 0 has spoken.
int ReportUsage(const Launch& launch, const std::string& message) {
  if (launch.process == 0) PrintError(message);
  if (launch.parallel) {
    const auto world = World::Create(launch, kExitUsage);
    if (world.ok()) (*world)->Agree(absl::OkStatus()).IgnoreError();
  }
  return kExitUsage;
}

int RunProgram(int argc, char** argv) {
  CLI::App program("Sparse long-context prefill with KV hand-off.", "longfill");
  program.set_version_flag("--version", VersionText(), "Print version and commit and exit");
  program.footer(kFooter);
  program.require_subcommand(1);
  program.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::Throw);
  const std::vector<Command> commands = {AddInspectCommand(program), AddPrefillCommand(program),
                                         AddServeCommand(program),   AddSubmitCommand(program),
                                         AddSearchCommand(program),  AddBenchCommand(program),
                                         AddEvalCommand(program),    AddDoctorCommand(program)};
  CommandContext context;
  context.launch = ReadLaunch();
  SetNcclDefaults();
  ReturnLargeBlocksToSystem();
  try {
    program.parse(argc, argv);
  } catch (const CLI::Success& help_or_version) {
    return context.launch.process == 0 ? program.exit(help_or_version) : static_cast<int>(kExitDone);
  } catch (const CLI::ParseError& error) {
    return ReportUsage(context.launch, absl::StrCat(error.what(), " (longfill --help shows the options)"));
  }
  auto signals = StopSignals::Create();
  if (!signals.ok()) return Report(signals.status());
  context.signals = signals->get();
  context.signals->SetHandler([](int count) {
    if (count < 2) return;  // the first one is seen by whoever computes
    PrintError("interrupted again, leaving at once");
    _exit(kExitFailed);
  });
  for (const Command& command : commands) {
    if (command.app->parsed()) return command.run(context);
  }
  return kExitUsage;
}

}  // namespace
}  // namespace longfill

int main(int argc, char** argv) {
  try {
    return longfill::RunProgram(argc, argv);
  } catch (const std::exception& error) {
    longfill::PrintError(absl::StrCat("internal error: ", error.what()));
    return longfill::kExitFailed;
  }
}
