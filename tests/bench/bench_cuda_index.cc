// Time of a layer's vertical-slash selection on a GPU, step by step and as a whole, launches included.
//
//   longfill_bench_cuda_index [--tokens N,N,...] [--repeats R] [--q-heads N] [--kv-heads N] [--head-dim D]
//                             [--query-stddev X] [--json FILE]
//
// Queries and keys are random, so selections are spread more evenly than those of a model: more runs and less
// clumped distances, which costs the index and the pair counts more. Budgets are those that the published
// Llama-3-8B-262k patterns use most, in turn over the heads. Answers are checked first: probabilities sum to
// 1, selections have the size of their budgets, pair counts are those of the host; a wrong one ends the
// program with status 1. The floor is K read twice from memory at 3 TB/s.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "kernels/api/backend.h"
#include "kernels/sparse/coverage.h"

namespace longfill {
namespace {

constexpr VerticalSlash kBudgets[] = {{1000, 6096}, {30, 800},   {1000, 6096},
                                      {100, 800},   {3500, 100}, {500, 700}};
constexpr double kBytesPerSecond = 3e12;

struct Options {
  std::vector<int64_t> tokens = {131072, 1048576};
  int repeats = 20;
  int64_t num_q_heads = 32;
  int64_t num_kv_heads = 8;
  int64_t head_dim = 128;
  float query_stddev = 1;
  std::string json;
};

[[noreturn]] void Fail(const std::string& message) {
  std::fprintf(stderr, "bench_cuda_index: %s\n", message.c_str());
  std::exit(1);
}
void FailUnlessOk(const absl::Status& status) {
  if (!status.ok()) Fail(status.ToString());
}
template <typename T>
T ValueOrFail(absl::StatusOr<T> result) {
  FailUnlessOk(result.status());
  return *std::move(result);
}

double Median(std::vector<double> values) {
  const auto middle = values.begin() + std::ssize(values) / 2;
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

class Bench {
 public:
  Bench(Backend& backend, const Options& options, int64_t num_tokens)
      : backend_(backend),
        kernels_(backend.kernels()),
        stream_(backend.stream()),
        options_(options),
        num_tokens_(num_tokens),
        num_queries_(std::min(kMaxSelectingQueries, num_tokens)),
        num_blocks_((num_tokens + kSelectionBlock - 1) / kSelectionBlock),
        words_((num_tokens + 63) / 64) {
    const int64_t lists = 2 * options.num_q_heads;
    queries_ = Random(options.num_q_heads * num_queries_ * options.head_dim, options.query_stddev, 1);
    keys_ = Random(options.num_kv_heads * num_tokens * options.head_dim, 1, 2);
    row_max_ = Bytes(options.num_q_heads * kMaxSelectingQueries * 4);
    row_sum_ = Bytes(options.num_q_heads * kMaxSelectingQueries * 8);
    scores_ = Bytes(lists * num_tokens * 4);
    slash_ = Bytes(options.num_q_heads * num_blocks_ * kDiagonalWindow * 4);
    cuts_ = Bytes(lists * static_cast<int64_t>(sizeof(SelectionCut)));
    histogram_ = Bytes(lists * kSelectionBins * 8);
    bits_ = Bytes(lists * words_ * 8);
    counts_ = Bytes(options.num_q_heads * static_cast<int64_t>(sizeof(IndexCounts)));
    pairs_ = Bytes(options.num_q_heads * static_cast<int64_t>(sizeof(PairCounts)));
    heads_.resize(static_cast<size_t>(options.num_q_heads));
    std::iota(heads_.begin(), heads_.end(), 0);
    MakeIndices();
    MakeParams();
    MakeSteps();
  }

  void Check() {
    for (const Step& step : steps_) {
      FailUnlessOk(step.run());
      if (step.name == "scores") CheckScores();
    }
    FailUnlessOk(stream_.Sync());
    const auto counts = Download<IndexCounts>(counts_, options_.num_q_heads);
    for (size_t h = 0; h < counts.size(); ++h) {
      const bool whole = counts[h].columns == budgets_[2 * h] && counts[h].distances == budgets_[2 * h + 1] &&
                         counts[h].overflow == 0;
      if (!whole) Fail("head " + std::to_string(h) + ": the index has not the size of its budgets");
    }
    for (const size_t h : {size_t{0}, counts.size() - 1}) CheckPairs(h, counts[h]);
  }

  nlohmann::json Run() {
    std::vector<std::unique_ptr<Event>> events;
    for (size_t i = 0; i <= steps_.size(); ++i) events.push_back(ValueOrFail(backend_.NewEvent()));
    std::vector<std::vector<double>> ms(steps_.size() + 1);
    for (int repeat = 0; repeat < options_.repeats; ++repeat) {
      for (size_t i = 0; i < steps_.size(); ++i) {
        FailUnlessOk(events[i]->Record(stream_));
        FailUnlessOk(steps_[i].run());
      }
      FailUnlessOk(events.back()->Record(stream_));
      FailUnlessOk(stream_.Sync());
      for (size_t i = 0; i < steps_.size(); ++i) {
        ms[i].push_back(1e3 * ValueOrFail(events[i + 1]->SecondsSince(*events[i])));
      }
      FailUnlessOk(events[0]->Record(stream_));
      for (const Step& step : steps_) FailUnlessOk(step.run());
      FailUnlessOk(events[1]->Record(stream_));
      FailUnlessOk(stream_.Sync());
      ms.back().push_back(1e3 * ValueOrFail(events[1]->SecondsSince(*events[0])));
    }
    return Report(ms);
  }

 private:
  struct Step {
    std::string name;
    std::function<absl::Status()> run;
  };

  Buffer Bytes(int64_t count) { return ValueOrFail(backend_.memory().Allocate(count, "bench")); }
  Buffer Random(int64_t count, float stddev, uint64_t seed) {
    Buffer buffer = Bytes(count * DTypeBytes(kernels_.compute_dtype()));
    FillRandomParams params;
    params.out = buffer.data();
    params.dtype = kernels_.compute_dtype();
    params.count = count;
    params.stddev = stddev;
    params.seed = seed;
    FailUnlessOk(kernels_.FillRandom(params, stream_));
    return buffer;
  }
  template <typename T>
  std::vector<T> Download(const Buffer& from, int64_t count) {
    std::vector<T> values(static_cast<size_t>(count));
    FailUnlessOk(
        kernels_.CopyOut(values.data(), from.data(), count * static_cast<int64_t>(sizeof(T)), stream_));
    FailUnlessOk(stream_.Sync());
    return values;
  }

  void MakeIndices() {
    for (int64_t h = 0; h < options_.num_q_heads; ++h) {
      const VerticalSlash& budget = kBudgets[h % std::ssize(kBudgets)];
      budgets_.push_back(std::min(num_tokens_, std::max<int64_t>(budget.vertical, 30)));
      budgets_.push_back(std::min(num_tokens_, std::max<int64_t>(budget.slash, 50)));
      Lists lists = {Bytes(budgets_[2 * h] * 4), Bytes(budgets_[2 * h + 1] * 4),
                     Bytes(budgets_[2 * h + 1] * static_cast<int64_t>(sizeof(DistanceRun)))};
      const auto vertical = static_cast<int32_t>(budgets_[2 * h]);
      const auto slash = static_cast<int32_t>(budgets_[2 * h + 1]);
      IndexBuffers out = {lists.columns.as<int32_t>(),
                          lists.distances.as<int32_t>(),
                          lists.runs.as<DistanceRun>(),
                          counts_.as<IndexCounts>() + h,
                          vertical,
                          slash,
                          slash};
      IndexView view;
      view.columns = out.columns;
      view.distances = out.distances;
      view.runs = out.runs;
      view.counts = out.counts;
      lists_.push_back(std::move(lists));
      out_.push_back(out);
      views_.push_back(view);
    }
  }

  void MakeParams() {
    const int64_t dim = options_.head_dim;
    last_.q = {queries_.data(), num_queries_ * dim, dim};
    last_.num_queries = num_queries_;
    last_.first_query_position = num_tokens_ - num_queries_;
    last_.k = {keys_.data(), num_tokens_ * dim, dim};
    last_.num_keys = num_tokens_;
    last_.heads = heads_;
    last_.num_q_heads = options_.num_q_heads;
    last_.num_kv_heads = options_.num_kv_heads;
    last_.head_dim = dim;
    last_.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(dim)));
    join_.slash = slash_.as<float>();
    join_.num_heads = options_.num_q_heads;
    join_.num_keys = num_tokens_;
    join_.last_query = num_tokens_ - 1;
    join_.forced_keys = 30;
    join_.forced_distances = 100;
    join_.scores = scores_.as<float>();
    join_.score_stride = num_tokens_;
    selection_.scores = scores_.as<float>();
    selection_.list_stride = num_tokens_;
    selection_.num_entries = num_tokens_;
    selection_.num_lists = 2 * options_.num_q_heads;
    selection_.last_query = num_tokens_ - 1;
    for (Workspace* workspace : {&last_workspace_, &build_workspace_, &count_workspace_}) {
      const int64_t bytes = workspace == &last_workspace_
                                ? kernels_.LastQueryWorkspaceBytes(options_.num_q_heads, num_tokens_, dim)
                            : workspace == &build_workspace_
                                ? kernels_.BuildIndexWorkspaceBytes(options_.num_q_heads, words_)
                                : kernels_.CountPairsWorkspaceBytes(options_.num_q_heads, num_tokens_);
      workspaces_.push_back(Bytes(bytes));
      *workspace = {workspaces_.back().data(), bytes};
    }
  }

  void MakeSteps() {
    auto* row_max = row_max_.as<float>();
    auto* row_sum = row_sum_.as<uint64_t>();
    auto* cuts = cuts_.as<SelectionCut>();
    auto* histogram = histogram_.as<uint64_t>();
    auto* bits = bits_.as<uint64_t>();
    const auto add = [this](std::string name, std::function<absl::Status()> run) {
      steps_.push_back({std::move(name), std::move(run)});
    };
    add("row max", [=, this] { return kernels_.LastQueryRowMax(last_, row_max, last_workspace_, stream_); });
    add("row sum",
        [=, this] { return kernels_.LastQueryRowSum(last_, row_max, row_sum, last_workspace_, stream_); });
    add("scores", [=, this] {
      const LastQueryScores out = {scores_.as<float>(), 2 * num_tokens_, slash_.as<float>()};
      return kernels_.LastQueryScore(last_, row_max, row_sum, out, last_workspace_, stream_);
    });
    add("join", [this] { return kernels_.JoinScores(join_, stream_); });
    add("cuts", [=, this] {
      LF_RETURN_IF_ERROR(kernels_.SelectionStart(budgets_, cuts, stream_));
      for (int pass = 0; pass < kSelectionPasses; ++pass) {
        LF_RETURN_IF_ERROR(kernels_.SelectionHistogram(selection_, pass, cuts, histogram, stream_));
        LF_RETURN_IF_ERROR(kernels_.SelectionAdvance(selection_.num_lists, pass, histogram, cuts, stream_));
      }
      return absl::OkStatus();
    });
    add("mark", [=, this] {
      LF_RETURN_IF_ERROR(kernels_.Zero(bits, bits_.size_bytes(), stream_));
      return kernels_.SelectionMark(selection_, cuts, bits, words_, stream_);
    });
    add("build", [=, this] {
      return kernels_.BuildIndex({bits, words_, Coverage::kTiles, out_}, build_workspace_, stream_);
    });
    add("count pairs", [this] {
      return kernels_.CountPairs({views_, num_tokens_, pairs_.as<PairCounts>()}, count_workspace_, stream_);
    });
  }

  // Of head 0, before forced entries are marked: the probabilities of each query sum to 1.
  void CheckScores() {
    const auto sum = [](const std::vector<float>& values) {
      return std::accumulate(values.begin(), values.end(), 0.0);
    };
    const double vertical = sum(Download<float>(scores_, num_tokens_));
    const double slash = sum(Download<float>(slash_, num_blocks_ * kDiagonalWindow));
    const auto queries = static_cast<double>(num_queries_);
    if (std::abs(vertical - queries) > 1e-4 * queries || std::abs(slash - queries) > 1e-4 * queries) {
      Fail("probabilities sum to " + std::to_string(vertical) + " by key and " + std::to_string(slash) +
           " by distance, not to " + std::to_string(num_queries_));
    }
  }

  void CheckPairs(size_t head, const IndexCounts& counts) {
    const auto columns = Download<int32_t>(lists_[head].columns, counts.columns);
    const auto distances = Download<int32_t>(lists_[head].distances, counts.distances);
    const auto runs = Download<DistanceRun>(lists_[head].runs, counts.runs);
    IndexView host;
    host.columns = columns.data();
    host.distances = distances.data();
    host.runs = runs.data();
    host.counts = &counts;
    const PairCounts want = CountPairs(host, num_tokens_);
    if (Download<PairCounts>(pairs_, options_.num_q_heads)[head] != want) {
      Fail("head " + std::to_string(head) + ": wrong pair counts");
    }
  }

  nlohmann::json Report(const std::vector<std::vector<double>>& ms) {
    const double floor_ms = 2e3 * static_cast<double>(keys_.size_bytes()) / kBytesPerSecond;
    std::printf("%lld tokens, %lld query heads on %lld of %lld, floor %.2f ms\n",
                static_cast<long long>(num_tokens_), static_cast<long long>(options_.num_q_heads),
                static_cast<long long>(options_.num_kv_heads), static_cast<long long>(options_.head_dim),
                floor_ms);
    nlohmann::json result = {{"device", backend_.facts().name}, {"tokens", num_tokens_},
                             {"q_heads", options_.num_q_heads}, {"kv_heads", options_.num_kv_heads},
                             {"head_dim", options_.head_dim},   {"floor_ms", floor_ms}};
    for (size_t i = 0; i < ms.size(); ++i) {
      const std::string name = i < steps_.size() ? steps_[i].name : "all, without events between";
      const auto [least, most] = std::minmax_element(ms[i].begin(), ms[i].end());
      const double median = Median(ms[i]);
      std::printf("  %-28s %8.3f ms  (%.3f to %.3f)\n", name.c_str(), median, *least, *most);
      result["ms"][name] = {{"median", median}, {"min", *least}, {"max", *most}};
    }
    return result;
  }

  struct Lists {
    Buffer columns, distances, runs;
  };

  Backend& backend_;
  KernelSet& kernels_;
  Stream& stream_;
  const Options options_;
  const int64_t num_tokens_, num_queries_, num_blocks_, words_;
  Buffer queries_, keys_, row_max_, row_sum_, scores_, slash_, cuts_, histogram_, bits_, counts_, pairs_;
  std::vector<Buffer> workspaces_;
  std::vector<Lists> lists_;
  std::vector<int32_t> heads_;
  std::vector<int64_t> budgets_;  // [2 * heads]
  std::vector<IndexBuffers> out_;
  std::vector<IndexView> views_;
  LastQueryParams last_;
  JoinScoresParams join_;
  SelectionLists selection_;
  Workspace last_workspace_, build_workspace_, count_workspace_;
  std::vector<Step> steps_;
};

Options ParseOptions(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (i + 1 == argc) Fail("option " + name + " needs a value");
    const std::string value = argv[i + 1];
    const auto positive = [&] { return std::max(1LL, std::atoll(value.c_str())); };
    if (name == "--tokens") {
      options.tokens.clear();
      std::stringstream list(value);
      for (std::string item; std::getline(list, item, ',');) {
        options.tokens.push_back(std::max(1LL, std::atoll(item.c_str())));
      }
    } else if (name == "--repeats") {
      options.repeats = static_cast<int>(positive());
    } else if (name == "--q-heads") {
      options.num_q_heads = positive();
    } else if (name == "--kv-heads") {
      options.num_kv_heads = positive();
    } else if (name == "--head-dim") {
      options.head_dim = positive();
    } else if (name == "--query-stddev") {
      options.query_stddev = std::strtof(value.c_str(), nullptr);
    } else if (name == "--json") {
      options.json = value;
    } else {
      Fail("unknown option " + name);
    }
  }
  return options;
}

int Main(int argc, char** argv) {
  const Options options = ParseOptions(argc, argv);
  const std::unique_ptr<Backend> backend = ValueOrFail(CreateCudaBackend({}));
  std::printf("%s\n", backend->facts().name.c_str());
  nlohmann::json results = nlohmann::json::array();
  for (const int64_t num_tokens : options.tokens) {
    Bench bench(*backend, options, num_tokens);
    bench.Check();
    results.push_back(bench.Run());
  }
  if (!options.json.empty()) {
    std::ofstream file(options.json);
    file << results.dump(2) << '\n';
    if (!file.flush()) Fail("cannot write " + options.json);
  }
  return 0;
}

}  // namespace
}  // namespace longfill

int main(int argc, char** argv) {
  try {
    return longfill::Main(argc, argv);
  } catch (const std::exception& error) {  // of the standard and JSON libraries
    std::fprintf(stderr, "bench_cuda_index: %s\n", error.what());
    return 1;
  }
}
