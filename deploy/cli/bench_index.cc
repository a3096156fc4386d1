// longfill bench index: the vertical-slash selection of one layer, step by step and as a whole.

#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "deploy/cli/bench.h"
#include "deploy/cli/bench_timing.h"
#include "deploy/cli/index_check.h"
#include "deploy/cli/index_steps.h"
#include "runtime/engine/engine_device.h"

namespace longfill {
namespace {

// The budgets that the published Llama-3-8B-262k patterns use most, in turn over the heads.
constexpr VerticalSlash kMixedBudgets[] = {{1000, 6096}, {30, 800},   {1000, 6096},
                                           {100, 800},   {3500, 100}, {500, 700}};
constexpr std::string_view kMixed = "mixed";
constexpr int64_t kScoreSamples = 1024;
constexpr double kMemoryBytesPerSecond = 3e12;  // of the floor: K is read twice

struct BenchOptions : SelectionBenchOptions {
  BenchOptions() { repeat = 20; }

  std::vector<std::string> budgets = {"mixed", "9192,14288"};
  std::string coverage = "tiles";
};

absl::StatusOr<std::vector<VerticalSlash>> BudgetsOfHeads(const std::string& text, int64_t num_heads) {
  std::vector<VerticalSlash> budgets;
  if (text == kMixed) {
    for (int64_t head = 0; head < num_heads; ++head) {
      budgets.push_back(kMixedBudgets[head % std::ssize(kMixedBudgets)]);
    }
    return budgets;
  }
  const absl::StatusOr<HeadPattern> pattern = ParseHeadPattern("vertical-slash:" + text);
  if (!pattern.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("--budget ", text, " is neither mixed nor V,S"));
  }
  budgets.assign(static_cast<size_t>(num_heads), std::get<VerticalSlash>(*pattern));
  return budgets;
}

struct IndexFigures {
  int64_t num_tokens = 0;
  std::string budget;
  std::vector<std::pair<std::string, Timing>> steps;  // with events between them
  Timing index;                                       // all steps, nothing between
  Timing with_pairs;                                  // and the pair counts
  double floor_seconds = 0;
  double score_error = 0;  // relative, of the sample
};

// Queries and keys of one length, and what is measured on them.
class IndexBench {
 public:
  IndexBench(const BenchOptions& options, Backend& backend, ThreadPool& threads, int64_t num_tokens)
      : options_(options),
        backend_(backend),
        threads_(threads),
        num_tokens_(num_tokens),
        num_queries_(std::min(kMaxSelectingQueries, num_tokens)),
        dtype_(backend.kernels().compute_dtype()) {}

  absl::Status Allocate() {
    const int64_t dim = options_.head_dim;
    LF_ASSIGN_OR_RETURN(q_, Random(options_.num_q_heads * num_queries_ * dim, options_.seed, "queries"));
    LF_ASSIGN_OR_RETURN(k_, Random(options_.num_kv_heads * num_tokens_ * dim, options_.seed + 1, "keys"));
    return absl::OkStatus();
  }

  absl::StatusOr<IndexFigures> Run(const std::string& budget) {
    LF_ASSIGN_OR_RETURN(const std::unique_ptr<IndexSteps> steps, MakeSteps(budget));
    IndexFigures figures;
    figures.num_tokens = num_tokens_;
    figures.budget = budget;
    figures.floor_seconds = 2 * static_cast<double>(k_.size_bytes()) / kMemoryBytesPerSecond;
    LF_RETURN_IF_ERROR(steps->RunAll());
    LF_RETURN_IF_ERROR(steps->CountPairs());
    LF_ASSIGN_OR_RETURN(figures.score_error, Check(*steps));
    LF_RETURN_IF_ERROR(TimeSteps(*steps, &figures));
    LF_ASSIGN_OR_RETURN(figures.index, TimeAll([&] { return steps->RunAll(); }));
    LF_ASSIGN_OR_RETURN(figures.with_pairs, TimeAll([&] {
                          LF_RETURN_IF_ERROR(steps->RunAll());
                          return steps->CountPairs();
                        }));
    return figures;
  }

 private:
  absl::StatusOr<Buffer> Random(int64_t count, uint64_t seed, const char* what) {
    LF_ASSIGN_OR_RETURN(Buffer buffer, backend_.memory().Allocate(count * DTypeBytes(dtype_), what));
    LF_RETURN_IF_ERROR(backend_.kernels().FillRandom(
        {.out = buffer.data(), .dtype = dtype_, .count = count, .stddev = 1, .seed = seed},
        backend_.stream()));
    return buffer;
  }

  absl::StatusOr<std::unique_ptr<IndexSteps>> MakeSteps(const std::string& budget) {
    IndexProblem problem;
    problem.num_tokens = num_tokens_;
    problem.num_q_heads = options_.num_q_heads;
    problem.num_kv_heads = options_.num_kv_heads;
    problem.head_dim = options_.head_dim;
    LF_ASSIGN_OR_RETURN(problem.coverage, ParseCoverage(options_.coverage));
    problem.last_q = {q_.data(), num_queries_ * options_.head_dim, options_.head_dim};
    problem.k = {k_.data(), num_tokens_ * options_.head_dim, options_.head_dim};
    problem.heads.resize(static_cast<size_t>(options_.num_q_heads));
    std::iota(problem.heads.begin(), problem.heads.end(), 0);
    LF_ASSIGN_OR_RETURN(problem.budgets, BudgetsOfHeads(budget, options_.num_q_heads));
    return IndexSteps::Create(backend_, std::move(problem));
  }

  absl::StatusOr<std::vector<float>> Download(const Buffer& from, int64_t first, int64_t count) {
    std::vector<char> stored(static_cast<size_t>(count * DTypeBytes(dtype_)));
    LF_RETURN_IF_ERROR(backend_.kernels().CopyOut(stored.data(), Advance(from.data(), first, dtype_),
                                                  std::ssize(stored), backend_.stream()));
    LF_RETURN_IF_ERROR(backend_.stream().Sync());
    std::vector<float> values(static_cast<size_t>(count));
    WidenToFloat(stored.data(), dtype_, count, values.data());
    return values;
  }

  // The first and the last head as a whole, that the lists of all fit.
  absl::StatusOr<double> Check(IndexSteps& steps) {
    double error = 0;
    const int64_t group = options_.num_q_heads / options_.num_kv_heads;
    const int64_t last = options_.num_q_heads - 1;
    for (int64_t head = 0; head <= last; ++head) {
      if (head != 0 && head != last) {
        LF_RETURN_IF_ERROR(steps.DownloadIndex(static_cast<size_t>(head)).status());
        continue;
      }
      const int64_t q_size = num_queries_ * options_.head_dim;
      const int64_t k_size = num_tokens_ * options_.head_dim;
      IndexCheckInput input;
      LF_ASSIGN_OR_RETURN(input.last_q, Download(q_, head * q_size, q_size));
      LF_ASSIGN_OR_RETURN(input.k, Download(k_, head / group * k_size, k_size));
      const absl::StatusOr<double> checked =
          CheckIndex(steps, static_cast<size_t>(head), input, kScoreSamples, threads_);
      if (!checked.ok()) return Annotate(checked.status(), absl::StrCat("head ", head));
      error = std::max(error, *checked);
    }
    return error;
  }

  absl::Status TimeSteps(IndexSteps& steps, IndexFigures* figures) {
    const size_t count = steps.steps().size();
    std::vector<std::unique_ptr<Event>> events(count + 2);
    for (std::unique_ptr<Event>& event : events) {
      LF_ASSIGN_OR_RETURN(event, backend_.NewEvent());
    }
    std::vector<std::vector<double>> seconds(count + 1);
    for (int run = 0; run < options_.repeat; ++run) {
      for (size_t i = 0; i <= count; ++i) {
        LF_RETURN_IF_ERROR(events[i]->Record(backend_.stream()));
        LF_RETURN_IF_ERROR(i < count ? steps.steps()[i].run() : steps.CountPairs());
      }
      LF_RETURN_IF_ERROR(events[count + 1]->Record(backend_.stream()));
      LF_RETURN_IF_ERROR(backend_.stream().Sync());
      for (size_t i = 0; i <= count; ++i) {
        LF_ASSIGN_OR_RETURN(const double step, events[i + 1]->SecondsSince(*events[i]));
        seconds[i].push_back(step);
      }
    }
    for (size_t i = 0; i <= count; ++i) {
      figures->steps.emplace_back(i < count ? steps.steps()[i].name : "count pairs", TimingOf(seconds[i]));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<Timing> TimeAll(const std::function<absl::Status()>& run_all) {
    LF_ASSIGN_OR_RETURN(const std::unique_ptr<Event> begin, backend_.NewEvent());
    LF_ASSIGN_OR_RETURN(const std::unique_ptr<Event> end, backend_.NewEvent());
    std::vector<double> seconds;
    for (int run = 0; run < options_.repeat; ++run) {
      LF_RETURN_IF_ERROR(begin->Record(backend_.stream()));
      LF_RETURN_IF_ERROR(run_all());
      LF_RETURN_IF_ERROR(end->Record(backend_.stream()));
      LF_RETURN_IF_ERROR(backend_.stream().Sync());
      LF_ASSIGN_OR_RETURN(const double all, end->SecondsSince(*begin));
      seconds.push_back(all);
    }
    return TimingOf(seconds);
  }

  const BenchOptions& options_;
  Backend& backend_;
  ThreadPool& threads_;
  const int64_t num_tokens_, num_queries_;
  const DType dtype_;
  Buffer q_, k_;
};

nlohmann::ordered_json ToJson(const IndexFigures& figures) {
  nlohmann::ordered_json steps = nlohmann::ordered_json::object();
  for (const auto& [name, timing] : figures.steps) steps[name] = ToJson(timing);
  return {{"tokens", figures.num_tokens},           {"budget", figures.budget},
          {"index_seconds", ToJson(figures.index)}, {"with_pairs_seconds", ToJson(figures.with_pairs)},
          {"step_seconds", std::move(steps)},       {"floor_seconds", figures.floor_seconds},
          {"score_error", figures.score_error}};
}

std::string TextOf(const IndexFigures& figures) {
  std::string text =
      absl::StrFormat("%d tokens, budget %s: floor %.3f ms, error of scores %.1e\n", figures.num_tokens,
                      figures.budget, 1e3 * figures.floor_seconds, figures.score_error);
  const auto line = [&](const std::string& name, const Timing& timing) {
    text += absl::StrFormat("  %-24s", name) + ToText(timing) + "\n";
  };
  for (const auto& [name, timing] : figures.steps) line(name, timing);
  line("index, nothing between", figures.index);
  line("with pairs counted", figures.with_pairs);
  return text;
}

absl::Status CheckOptions(const BenchOptions& options) {
  LF_RETURN_IF_ERROR(CheckHeads(options.num_q_heads, options.num_kv_heads));
  LF_RETURN_IF_ERROR(CheckKernels(options.kernels, options.device));
  for (const std::string& budget : options.budgets) {
    LF_RETURN_IF_ERROR(BudgetsOfHeads(budget, 1).status());
  }
  return absl::OkStatus();
}

absl::Status Measure(const BenchOptions& options, const StopSignals& signals) {
  LF_RETURN_IF_ERROR(CheckOptions(options));
  LF_ASSIGN_OR_RETURN(const std::shared_ptr<Backend> backend, MakeSelectionBackend(options));
  ThreadPool threads(options.device.threads);
  nlohmann::ordered_json cases = nlohmann::ordered_json::array();
  if (!options.json) std::printf("%s\n", backend->facts().name.c_str());
  for (const int64_t num_tokens : options.tokens) {
    IndexBench bench(options, *backend, threads, num_tokens);
    LF_RETURN_IF_ERROR(bench.Allocate());
    for (const std::string& budget : options.budgets) {
      LF_RETURN_IF_ERROR(signals.ShouldStop());
      LF_ASSIGN_OR_RETURN(const IndexFigures figures, bench.Run(budget));
      cases.push_back(ToJson(figures));
      if (!options.json) std::printf("%s", TextOf(figures).c_str());
      std::fflush(stdout);
    }
  }
  if (options.json) {
    const nlohmann::ordered_json report = {
        {"device", backend->facts().name},  {"q_heads", options.num_q_heads},
        {"kv_heads", options.num_kv_heads}, {"head_dim", options.head_dim},
        {"coverage", options.coverage},     {"repeat", options.repeat},
        {"cases", std::move(cases)}};
    std::printf("%s\n", report.dump(1).c_str());
  }
  return FlushOutput();
}

int BenchIndex(BenchOptions options, CommandContext& context) {
  if (context.launch.parallel) return Report(absl::InvalidArgumentError("bench index runs on one rank"));
  if (options.device.threads == 0) options.device.threads = DefaultThreads(1);
  return Report(Measure(options, *context.signals));
}

}  // namespace

Command AddBenchIndex(CLI::App& bench) {
  CLI::App* app = bench.add_subcommand(
      "index", "Time and check a layer's vertical-slash selection on random Q and K, step by step");
  auto options = std::make_shared<BenchOptions>();
  AddSelectionBenchOptions(*app, *options);
  app->add_option("--budget", options->budgets,
                  "of every head: V,S keys and distances; or mixed, those of published patterns in turn.\n"
                  "May be repeated, each is a case (default: mixed and 9192,14288)")
      ->type_name("BUDGET")
      ->take_all();
  app->add_option("--coverage", options->coverage, "tiles (default) or parity")
      ->type_name("COVERAGE")
      ->check(CLI::IsMember({"parity", "tiles"}));
  return {app, [options](CommandContext& context) { return BenchIndex(*options, context); }};
}

}  // namespace longfill
