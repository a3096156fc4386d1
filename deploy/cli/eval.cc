// longfill eval: hands its arguments to the Python package longfill.eval, which starts `longfill serve`
// again.

#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "deploy/cli/command.h"

namespace longfill {
namespace {

// Arguments: where the package lies in a source tree, or "", then those of longfill.eval.
constexpr char kStart[] = R"(
import sys
source = sys.argv.pop(1)
sys.path[:1] = [source] if source else []
def fail(what):
    print(f"longfill: eval: {sys.executable}: {what}; LONGFILL_PYTHON names another Python", file=sys.stderr)
    sys.exit(2)
if sys.version_info < (3, 11):
    fail("this is Python %d.%d, at least 3.11 is needed" % sys.version_info[:2])
try:
    from longfill.eval.command import main
except ModuleNotFoundError as error:
    fail(f"there is no module {error.name}: pip install './deploy/python[eval]', or in a source tree deploy/setup.sh "
         "and deploy/python/generate_protos.py")
sys.exit(main())
)";

struct Python {
  std::string program;
  std::string source;  // the package's folder in the source tree that this program was built in; or empty
};

// LONGFILL_PYTHON, else the environment of deploy/setup.sh in a source tree, else python3.
Python FindPython(const std::filesystem::path& self) {
  Python python{PythonFromEnvironment(), ""};
  std::error_code ignored;
  // ROOT/build/PRESET/bin/longfill
  const std::filesystem::path root = self.parent_path().parent_path().parent_path().parent_path();
  const std::filesystem::path source = root / "deploy" / "python" / "src";
  if (std::filesystem::is_regular_file(source / "longfill" / "eval" / "command.py", ignored)) {
    python.source = source.string();
    const std::filesystem::path environment = root / ".venv" / "bin" / "python";
    if (python.program.empty() && std::filesystem::exists(environment, ignored)) {
      python.program = environment.string();
    }
  }
  if (python.program.empty()) python.program = "python3";
  return python;
}

// On every rank; rank 0 prints.
int RefuseRanks(const Launch& launch) {
  if (launch.rank == 0) PrintError("eval starts its ranks itself: --ranks N instead of mpirun");
  const auto world = World::Create(launch, kExitUsage);
  if (world.ok()) (*world)->Agree(absl::OkStatus()).IgnoreError();
  return kExitUsage;
}

int Eval(const std::vector<std::string>& arguments, const CommandContext& context) {
  if (context.launch.parallel) return RefuseRanks(context.launch);
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  if (error) return Report(absl::InternalError(absl::StrCat("/proc/self/exe: ", error.message())));
  Python python = FindPython(self);
  std::vector<std::string> command = {python.program, "-c",        kStart,
                                      python.source,  "--program", self.string()};
  command.insert(command.end(), arguments.begin(), arguments.end());
  std::vector<char*> pointers;
  pointers.reserve(command.size() + 1);
  for (std::string& argument : command) pointers.push_back(argument.data());
  pointers.push_back(nullptr);
  // Ctrl-C is Python's from here on.
  sigset_t none;
  sigemptyset(&none);
  pthread_sigmask(SIG_SETMASK, &none, nullptr);
  execvp(pointers[0], pointers.data());
  PrintError(absl::StrCat("eval: cannot run ", python.program, ": ", std::strerror(errno),
                          "; LONGFILL_PYTHON names a Python with the package longfill[eval]"));
  return kExitUsage;
}

}  // namespace

Command AddEvalCommand(CLI::App& program) {
  CLI::App* app = program.add_subcommand(
      "eval", "Measure what sparse attention costs and brings on a model: needles, RULER, perplexity");
  app->set_help_flag();  // --help is the package's, as all options are
  app->prefix_command();
  return {app, [app](CommandContext& context) { return Eval(app->remaining(), context); }};
}

}  // namespace longfill
