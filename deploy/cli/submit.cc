// longfill submit: sends prompts to a service and writes what `longfill prefill` writes.

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "deploy/cli/command.h"
#include "deploy/cli/figures.h"
#include "deploy/cli/output_directory.h"
#include "runtime/client/prefill_client.h"

namespace longfill {
namespace {

constexpr int kBarWidth = 40;

struct SubmitCommandOptions {
  std::string target;
  PromptOptions prompt;
  double timeout_seconds = 0;  // 0: none
};

// Progress on standard error: one line that is written over on a terminal, plain lines elsewhere.
class ProgressPrinter {
 public:
  explicit ProgressPrinter(bool quiet) : quiet_(quiet), terminal_(isatty(STDERR_FILENO) != 0) {}
  ~ProgressPrinter() { ClearLine(); }

  PrefillEvents Events() {
    PrefillEvents events;
    if (quiet_) return events;
    events.on_queued = [this](int position) {
      Show(absl::StrCat("waiting, ", position, " before this prompt"), position > 0);
    };
    events.on_accepted = [this](const AcceptedPrefill& accepted) {
      ClearLine();
      std::fprintf(stderr, "accepted after %.1f s, %s\n", accepted.queue_seconds, accepted.attention.c_str());
    };
    events.on_progress = [this](const PrefillProgress& progress) { OnProgress(progress); };
    return events;
  }

 private:
  void OnProgress(const PrefillProgress& progress) {
    const double share = progress.total_tokens > 0 ? static_cast<double>(progress.processed_tokens) /
                                                         static_cast<double>(progress.total_tokens)
                                                   : 0;
    std::string text =
        absl::StrFormat("%d of %d tokens, layer %d of %d, %.1f s", progress.processed_tokens,
                        progress.total_tokens, progress.layers_done, progress.num_layers, progress.seconds);
    if (terminal_) {
      const int filled = std::clamp(static_cast<int>(share * kBarWidth), 0, kBarWidth);
      text = absl::StrCat("[", std::string(filled, '#'), std::string(kBarWidth - filled, ' '), "] ", text);
    }
    const int tenth = static_cast<int>(share * 10);
    Show(text, tenth > last_tenth_);
    last_tenth_ = tenth;
  }

  // A terminal shows every text, a file those that are worth a line.
  void Show(const std::string& text, bool worth_a_line) {
    if (terminal_) {
      std::fprintf(stderr, "\r\033[K%s", text.c_str());
      line_open_ = true;
    } else if (worth_a_line) {
      std::fprintf(stderr, "%s\n", text.c_str());
    }
  }

  void ClearLine() {
    if (line_open_) std::fprintf(stderr, "\r\033[K");
    line_open_ = false;
  }

  const bool quiet_;
  const bool terminal_;
  bool line_open_ = false;
  int last_tenth_ = 0;
};

// The error of one prompt with what the service said about trying again.
absl::Status WithHint(const absl::Status& status, const PrefillRefusal& refusal) {
  if (refusal.retry_after.count() == 0) return status;
  return absl::Status(status.code(),
                      absl::StrFormat("%s (try again after %.1f s)", std::string(status.message()),
                                      static_cast<double>(refusal.retry_after.count()) / 1000));
}

absl::StatusOr<PrefillFigures> SubmitPrompt(PrefillClient& client, const PrefillRequest& prompt,
                                            const SubmitCommandOptions& options, const std::string& folder,
                                            Cancellation& cancellation) {
  SubmitOptions submit;
  submit.attention = prompt.attention;
  submit.coverage = prompt.coverage;
  submit.logits_positions = prompt.logits_positions;
  if (!options.prompt.kv_dtype.empty()) submit.kv_dtype = prompt.kv_dtype;
  if (options.prompt.recall.given) submit.recall = prompt.recall;
  submit.timeout = std::chrono::milliseconds(static_cast<int64_t>(options.timeout_seconds * 1000));
  PrefillRefusal refusal;
  ProgressPrinter progress(options.prompt.json);
  const absl::StatusOr<Prefilled> prefilled = DownloadToDirectory(client, prompt.token_ids, submit, folder,
                                                                  progress.Events(), &cancellation, &refusal);
  if (!prefilled.ok()) return WithHint(prefilled.status(), refusal);
  return prefilled->figures;
}

absl::Status Submit(const SubmitCommandOptions& options, CommandContext& context) {
  LF_ASSIGN_OR_RETURN(const std::vector<PrefillRequest> prompts, ReadPrompts(options.prompt));
  LF_ASSIGN_OR_RETURN(
      const std::unique_ptr<OutputDirectory> output,
      OutputDirectory::Open(options.prompt.out, static_cast<int>(prompts.size()), options.prompt.overwrite));
  Cancellation cancellation;
  context.signals->SetHandler([&cancellation](int count) {
    if (count > 1) _exit(kExitFailed);
    cancellation.Cancel();
  });
  const absl::Cleanup remove_handler = [&context] { context.signals->SetHandler(nullptr); };
  LF_ASSIGN_OR_RETURN(const std::unique_ptr<PrefillClient> client, PrefillClient::Connect(options.target));
  LF_RETURN_IF_ERROR(output->Prepare());
  std::vector<PrefillFigures> figures;
  absl::Status status;
  for (size_t i = 0; i < prompts.size() && status.ok(); ++i) {
    const auto result =
        SubmitPrompt(*client, prompts[i], options, output->Folder(static_cast<int>(i)), cancellation);
    const std::string name = prompts.size() == 1 ? "" : absl::StrCat(options.prompt.token_paths[i], ": ");
    if (!result.ok()) {
      status = absl::Status(result.status().code(), absl::StrCat(name, result.status().message()));
    } else {
      figures.push_back(*result);
      if (!options.prompt.json) std::printf("%s%s\n", name.c_str(), FiguresToText(*result).c_str());
    }
  }
  LF_RETURN_IF_ERROR(status);
  output->Keep();
  if (options.prompt.json) std::printf("%s\n", FiguresToJson(figures).c_str());
  return FlushOutput();
}

}  // namespace

Command AddSubmitCommand(CLI::App& program) {
  CLI::App* app = program.add_subcommand("submit", "Send prompts to a service and write what prefill writes");
  auto options = std::make_shared<SubmitCommandOptions>();
  app->add_option("--target", options->target, "rank 0 of the service")->type_name("HOST:PORT")->required();
  AddPromptOptions(*app, "as the service was started", options->prompt)->required();
  app->add_option("--timeout", options->timeout_seconds, "give a prompt up after so long (default: never)")
      ->type_name("SECONDS")
      ->check(CLI::PositiveNumber);
  return {app, [options](CommandContext& context) { return Report(Submit(*options, context)); }};
}

}  // namespace longfill
