// Speed of the CPU kernels on one core, beside the GEMM library's sgemm in the same run. Every timed answer
// is checked against fp64 on sampled rows first; a wrong one ends the program with status 1.
//
//   longfill_bench_kernels [--tokens N,N,...] [--repeats R] [--threads T] [--filter TEXT] [--avx2]
//                          [--json FILE] [--smoke]
//
// --filter keeps the cases whose name contains TEXT, and sgemm. --avx2 keeps our code from AVX-512
// (DNNL_MAX_CPU_ISA=AVX2 does that for oneDNN). --smoke runs small shapes once. The cases take turns within
// each repeat, so that a slow moment of a shared machine hits all of them. Rates count 4 * head_dim FLOP for
// each covered pair. Ratios compare best with best.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "hwy/highway.h"
#include "kernels/api/backend.h"
#include "kernels/cpu/gemm.h"
#include "kernels/sparse/coverage.h"

namespace longfill {
namespace {

struct Options {
  std::vector<int64_t> tokens = {8192, 16384};
  int repeats = 7;
  int threads = 1;
  bool smoke = false;
  std::string filter;
  std::string json;
};

[[noreturn]] void Fail(const std::string& message) {
  std::fprintf(stderr, "bench_kernels: %s\n", message.c_str());
  std::exit(1);
}
void FailUnlessOk(const absl::Status& status) {
  if (!status.ok()) Fail(status.ToString());
}

std::vector<float> RandomFloats(int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

double Number(int64_t value) { return static_cast<double>(value); }

// One thing that is timed.
struct Case {
  std::string name;
  std::map<std::string, double> facts;  // shape, pairs, density, error
  double gflop = 0;
  std::function<void()> run;
  std::function<double()> check;  // largest error against fp64 on sampled rows
  double allowed_error = 0;
  std::vector<double> seconds;

  double Best() const { return *std::min_element(seconds.begin(), seconds.end()); }
  double Worst() const { return *std::max_element(seconds.begin(), seconds.end()); }
  double Median() const {
    std::vector<double> sorted = seconds;
    std::nth_element(sorted.begin(), sorted.begin() + static_cast<int64_t>(sorted.size() / 2), sorted.end());
    return sorted[sorted.size() / 2];
  }
  double BestRate() const { return gflop / Best(); }
};

class Bench {
 public:
  explicit Bench(const Options& options)
      : options_(options),
        backend_(CreateCpuBackend(options.threads)),
        kernels_(&backend_->kernels()),
        stream_(backend_->stream()) {}

  void AddSgemm(int64_t m, int64_t n, int64_t k) {
    auto x = std::make_shared<std::vector<float>>(RandomFloats(m * k, 1));
    auto w = std::make_shared<std::vector<float>>(RandomFloats(n * k, 2));
    auto out = std::make_shared<std::vector<float>>(static_cast<size_t>(m * n));
    Case c;
    c.name = "sgemm";
    c.facts = {{"rows", Number(m)}, {"out_width", Number(n)}, {"in_width", Number(k)}};
    c.gflop = 2e-9 * static_cast<double>(m * n * k);
    c.run = [=] { FailUnlessOk(SingleThreadSgemm(x->data(), k, w->data(), m, n, k, false, out->data(), n)); };
    c.check = [=] { return GemmError(*x, *w, *out, m, n, k); };
    c.allowed_error = 1e-6 * static_cast<double>(k);
    cases_.push_back(std::move(c));
  }

  bool Wanted(const std::string& name) const { return name.find(options_.filter) != std::string::npos; }

  // The backend's own Gemm with weights of a 16-bit type, for context.
  void AddGemm(int64_t m, int64_t n, int64_t k, DType dtype) {
    const std::string name = std::string("gemm ") + std::string(DTypeName(dtype));
    if (!Wanted(name)) return;
    auto x = std::make_shared<std::vector<float>>(RandomFloats(m * k, 3));
    auto w = std::make_shared<std::vector<float>>(RandomFloats(n * k, 4));
    auto stored = std::make_shared<std::vector<uint16_t>>(static_cast<size_t>(n * k));
    NarrowFromFloat(w->data(), n * k, dtype, stored->data());
    WidenToFloat(stored->data(), dtype, n * k, w->data());
    auto out = std::make_shared<std::vector<float>>(static_cast<size_t>(m * n));
    auto scratch =
        std::make_shared<std::vector<char>>(static_cast<size_t>(kernels_->GemmWorkspaceBytes(m, k, n)));
    Case c;
    c.name = name;
    c.facts = {{"rows", Number(m)}, {"out_width", Number(n)}, {"in_width", Number(k)}};
    c.gflop = 2e-9 * static_cast<double>(m * n * k);
    c.run = [=, this] {
      GemmParams params;
      params.x = x->data();
      params.x_stride = k;
      params.weight = stored->data();
      params.weight_dtype = dtype;
      params.num_rows = m;
      params.in_width = k;
      params.out_width = n;
      params.out = out->data();
      params.out_stride = n;
      FailUnlessOk(kernels_->Gemm(params, {scratch->data(), static_cast<int64_t>(scratch->size())}, stream_));
    };
    c.check = [=] { return GemmError(*x, *w, *out, m, n, k); };
    c.allowed_error = 1e-6 * static_cast<double>(k);
    cases_.push_back(std::move(c));
  }

  // All query heads of one KV group share the index.
  void AddAttention(const std::string& pattern, const SparseIndex& index, int64_t n, int64_t dim,
                    int64_t q_heads) {
    if (!Wanted("attention " + pattern)) return;
    FailUnlessOk(ValidateIndex(index, n));
    auto data = std::make_shared<Attention>(index);
    data->indices.assign(static_cast<size_t>(q_heads), data->packed.Views(data->packed.data()).front());
    data->num_tokens = n;
    data->head_dim = dim;
    data->q = RandomFloats(q_heads * n * dim, 5);
    data->k = RandomFloats(n * dim, 6);
    data->v = RandomFloats(n * dim, 7);
    data->out.resize(data->q.size());
    data->lse.resize(static_cast<size_t>(q_heads * n));
    data->scratch.resize(static_cast<size_t>(
        kernels_->AttentionWorkspaceBytes({.num_q_heads = q_heads, .num_q_rows = n, .head_dim = dim})));
    RunAttention(*data, q_heads);
    Case c;
    c.name = "attention " + pattern;
    const double density = static_cast<double>(data->covered) / static_cast<double>(q_heads * CausalPairs(n));
    c.facts = {{"tokens", Number(n)},
               {"head_dim", Number(dim)},
               {"query_heads", Number(q_heads)},
               {"covered_pairs", Number(data->covered)},
               {"computed_pairs", Number(data->computed)},
               {"density", density}};
    c.gflop = 4e-9 * static_cast<double>(dim) * static_cast<double>(data->covered);
    c.run = [=, this] { RunAttention(*data, q_heads); };
    c.check = [=] { return AttentionError(*data, q_heads); };
    c.allowed_error = 5e-6;
    cases_.push_back(std::move(c));
  }

  void AddLastQuery(int64_t n, int64_t dim) {
    if (!Wanted("last-query scores")) return;
    auto q = std::make_shared<std::vector<float>>(RandomFloats(64 * dim, 8));
    auto k = std::make_shared<std::vector<float>>(RandomFloats(n * dim, 9));
    auto max = std::make_shared<std::vector<float>>(64);
    auto sum = std::make_shared<std::vector<uint64_t>>(64);
    auto vertical = std::make_shared<std::vector<float>>(static_cast<size_t>(n));
    auto slash = std::make_shared<std::vector<float>>(static_cast<size_t>((n + 127) / 128 * kDiagonalWindow));
    auto scratch = std::make_shared<std::vector<char>>(
        static_cast<size_t>(kernels_->LastQueryWorkspaceBytes(1, n, dim)));
    Case c;
    c.name = "last-query scores";
    c.facts = {{"tokens", Number(n)}, {"head_dim", Number(dim)}};
    c.gflop = 3 * 2e-9 * 64 * static_cast<double>(n * dim);  // three passes over the keys
    c.run = [=, this] {
      static constexpr int32_t kHeads[] = {0};
      LastQueryParams params;
      params.q = {q->data(), 64 * dim, dim};
      params.num_queries = 64;
      params.first_query_position = n - 64;
      params.k = {k->data(), n * dim, dim};
      params.num_keys = n;
      params.key_positions = PositionMap::Contiguous(0);
      params.heads = kHeads;
      params.num_q_heads = params.num_kv_heads = 1;
      params.head_dim = dim;
      params.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(dim)));
      const Workspace workspace{scratch->data(), static_cast<int64_t>(scratch->size())};
      FailUnlessOk(kernels_->LastQueryRowMax(params, max->data(), workspace, stream_));
      FailUnlessOk(kernels_->LastQueryRowSum(params, max->data(), sum->data(), workspace, stream_));
      FailUnlessOk(kernels_->LastQueryScore(params, max->data(), sum->data(),
                                            {vertical->data(), n, slash->data()}, workspace, stream_));
    };
    // The probabilities of 64 queries add up to 64, by keys and by distances.
    c.check = [=] {
      double by_key = 0, by_distance = 0;
      for (float value : *vertical) by_key += value;
      for (float value : *slash) by_distance += value;
      return std::max(std::abs(by_key - 64), std::abs(by_distance - 64));
    };
    c.allowed_error = 1e-3;
    cases_.push_back(std::move(c));
  }

  void Run() {
    for (Case& c : cases_) {
      c.run();
      const double error = c.check();
      if (!(error <= c.allowed_error)) {
        Fail(c.name + " " + Shape(c.facts) + ": error " + std::to_string(error) + " above " +
             std::to_string(c.allowed_error));
      }
      c.facts["error"] = error;
    }
    for (int repeat = 0; repeat < options_.repeats; ++repeat) {
      for (Case& c : cases_) {
        const auto start = std::chrono::steady_clock::now();
        c.run();
        c.seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
      }
    }
  }

  void Report() const {
    double sgemm = 0;
    for (const Case& c : cases_) {
      if (c.name == "sgemm") sgemm = std::max(sgemm, c.BestRate());
    }
    nlohmann::json report = {{"device", CpuName()},
                             {"kernels", std::string(kernels_->name())},
                             {"repeats", options_.repeats},
                             {"sgemm_gflops", sgemm},
                             {"cases", nlohmann::json::array()}};
    std::printf("device %s, kernels %s, best of %d\n", CpuName().c_str(),
                std::string(kernels_->name()).c_str(), options_.repeats);
    std::printf("%-28s %-34s %8s %9s %9s %7s %7s\n", "case", "shape", "density", "median ms", "spread %",
                "GFLOP/s", "/sgemm");
    for (const Case& c : cases_) {
      const double ratio = c.BestRate() / sgemm;
      const double spread = 100 * (c.Worst() - c.Best()) / c.Median();
      nlohmann::json entry = c.facts;
      entry["name"] = c.name;
      entry["seconds"] = c.seconds;
      entry["best_gflops"] = c.BestRate();
      entry["median_gflops"] = c.gflop / c.Median();
      entry["ratio_to_sgemm"] = ratio;
      report["cases"].push_back(entry);
      std::printf("%-28s %-34s %8s %9.2f %9.1f %7.1f %7.2f\n", c.name.c_str(), Shape(c.facts).c_str(),
                  c.facts.contains("density") ? std::to_string(c.facts.at("density")).c_str() : "",
                  1e3 * c.Median(), spread, c.BestRate(), ratio);
    }
    if (options_.json.empty()) return;
    std::ofstream file(options_.json);
    file << report.dump(2) << "\n";
    if (!file.flush()) Fail("cannot write " + options_.json);
  }

 private:
  struct Attention {
    explicit Attention(const SparseIndex& index) : packed({&index, 1}) {}
    const PackedIndices packed;
    std::vector<IndexView> indices;  // of the query heads: all the same
    int64_t num_tokens = 0, head_dim = 0;
    std::vector<float> q, k, v, out, lse;
    std::vector<char> scratch;
    int64_t covered = 0, computed = 0;
  };

  void RunAttention(Attention& data, int64_t q_heads) {
    const int64_t n = data.num_tokens;
    AttentionSequence sequence;
    sequence.q_end = sequence.k_end = sequence.num_tokens = sequence.key_range_end = n;
    sequence.q_positions = PositionMap::Contiguous(0);
    sequence.indices = data.indices;
    AttentionParams params;
    params.q = {data.q.data(), n * data.head_dim, data.head_dim};
    params.k = {data.k.data(), n * data.head_dim, data.head_dim};
    params.v = {data.v.data(), n * data.head_dim, data.head_dim};
    params.out = {data.out.data(), n * data.head_dim, data.head_dim};
    params.lse = data.lse.data();
    params.lse_head_stride = n;
    params.num_q_heads = q_heads;
    params.num_kv_heads = 1;
    params.head_dim = data.head_dim;
    params.scale = Scale(data.head_dim);
    params.sequences = {&sequence, 1};
    data.covered = data.computed = 0;
    params.covered_pairs = &data.covered;
    params.computed_pairs = &data.computed;
    FailUnlessOk(kernels_->Attention(params, {data.scratch.data(), static_cast<int64_t>(data.scratch.size())},
                                     stream_));
  }

  static float Scale(int64_t dim) { return static_cast<float>(1 / std::sqrt(static_cast<double>(dim))); }

  static double GemmError(const std::vector<float>& x, const std::vector<float>& w,
                          const std::vector<float>& out, int64_t m, int64_t n, int64_t k) {
    double worst = 0;
    for (int64_t sample = 0; sample < 64; ++sample) {
      const int64_t row = sample * 7919 % m;
      const int64_t column = sample * 104729 % n;
      double sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += double{x[row * k + i]} * w[column * k + i];
      worst = std::max(worst, std::abs(sum - out[row * n + column]));
    }
    return worst;
  }

  // Sampled rows against the definition in fp64, under the coverage that ExpandTile states.
  static double AttentionError(const Attention& data, int64_t q_heads) {
    const int64_t n = data.num_tokens;
    const int64_t dim = data.head_dim;
    double worst = 0;
    for (int64_t sample = 0; sample < 12; ++sample) {
      const int64_t row = sample < 2 ? sample * (n - 1) : sample * 15485863 % n;
      const int64_t head = sample % q_heads;
      TileKeys keys;
      ExpandTile(data.indices.front(), row / kRowBlock, n, &keys);
      std::vector<int64_t> seen;
      for (const KeyRange& range : keys.ranges) {
        for (int64_t key = range.begin; key < std::min(range.end, row + 1); ++key) {
          if (row - key >= range.min_distance && row - key < range.max_distance) seen.push_back(key);
        }
      }
      for (int32_t column : keys.columns) {
        if (column <= row) seen.push_back(column);
      }
      const float* q = data.q.data() + (head * n + row) * dim;
      std::vector<double> scores, want(static_cast<size_t>(dim));
      double max = -std::numeric_limits<double>::infinity(), sum = 0;
      for (int64_t key : seen) {
        double score = 0;
        for (int64_t i = 0; i < dim; ++i) score += double{q[i]} * data.k[key * dim + i];
        scores.push_back(score / std::sqrt(static_cast<double>(dim)));
        max = std::max(max, scores.back());
      }
      for (size_t j = 0; j < seen.size(); ++j) {
        const double p = std::exp(scores[j] - max);
        sum += p;
        for (int64_t i = 0; i < dim; ++i) want[i] += p * data.v[seen[j] * dim + i];
      }
      for (int64_t i = 0; i < dim; ++i) {
        const double expected = sum == 0 ? 0 : want[i] / sum;
        const double error = std::abs(expected - data.out[(head * n + row) * dim + i]);
        worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : std::max(worst, error);
      }
    }
    return worst;
  }

  static std::string CpuName() {
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line);) {
      if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
    }
    return "unknown CPU";
  }

  static std::string Shape(const std::map<std::string, double>& facts) {
    std::string text;
    for (const char* key : {"tokens", "head_dim", "query_heads", "rows", "out_width", "in_width"}) {
      if (!facts.contains(key)) continue;
      if (!text.empty()) text += ' ';
      text += std::to_string(std::llround(facts.at(key)));
    }
    return text;
  }

  const Options options_;
  const std::unique_ptr<Backend> backend_;
  KernelSet* const kernels_;
  Stream& stream_;
  std::vector<Case> cases_;
};

// Forced entries as real selections have them (30 first keys, 100 nearest distances), the others at random.
SparseIndex SyntheticVerticalSlash(int64_t n, int64_t num_columns, int64_t num_distances) {
  std::mt19937 generator(11);
  const auto pick = [&](int64_t first, int64_t count) {
    std::set<int32_t> picked;
    for (int64_t i = 0; i < std::min(first, n); ++i) picked.insert(static_cast<int32_t>(i));
    std::uniform_int_distribution<int32_t> any(0, static_cast<int32_t>(n - 1));
    while (static_cast<int64_t>(picked.size()) < std::min(count, n)) picked.insert(any(generator));
    return std::vector<int32_t>(picked.begin(), picked.end());
  };
  std::vector<int32_t> columns = pick(30, num_columns);
  return MakeVerticalSlashIndex(std::move(columns), pick(100, num_distances), Coverage::kTiles);
}

SparseIndex SyntheticBlocks(int64_t n, int64_t num_blocks) {
  std::mt19937 generator(12);
  BlockListIndex index;
  index.row_offsets.push_back(0);
  for (int64_t m = 0; m < (n + kRowBlock - 1) / kRowBlock; ++m) {
    std::set<int32_t> picked = {0, static_cast<int32_t>(m)};
    std::uniform_int_distribution<int32_t> any(0, static_cast<int32_t>(m));
    while (static_cast<int64_t>(picked.size()) < std::min(num_blocks, m + 1)) picked.insert(any(generator));
    index.key_blocks.insert(index.key_blocks.end(), picked.begin(), picked.end());
    index.row_offsets.push_back(static_cast<int64_t>(index.key_blocks.size()));
  }
  return index;
}

Options ParseOptions(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--smoke") {
      options.smoke = true;
      options.tokens = {513};
      options.repeats = 1;
      continue;
    }
    if (name == "--avx2") {
      hwy::GetChosenTarget().Update(hwy::SupportedTargets() & ~(HWY_AVX3 | HWY_AVX3_DL));
      continue;
    }
    if (i + 1 == argc) Fail("option " + name + " is unknown or lacks its value");
    const std::string value = argv[++i];
    if (name == "--filter") {
      options.filter = value;
    } else if (name == "--json") {
      options.json = value;
    } else if (name == "--repeats") {
      options.repeats = std::max(1, std::atoi(value.c_str()));
    } else if (name == "--threads") {
      options.threads = std::max(1, std::atoi(value.c_str()));
    } else if (name == "--tokens") {
      options.tokens.clear();
      std::stringstream list(value);
      for (std::string item; std::getline(list, item, ',');) {
        options.tokens.push_back(std::max(1LL, std::atoll(item.c_str())));
      }
    } else {
      Fail("unknown option " + name);
    }
  }
  return options;
}

int Main(int argc, char** argv) {
  const Options options = ParseOptions(argc, argv);
  Bench bench(options);
  if (options.smoke) {
    bench.AddSgemm(64, 96, 128);
    bench.AddGemm(70, 300, 128, DType::kBFloat16);
  } else {
    bench.AddSgemm(2048, 2048, 2048);
    bench.AddSgemm(1024, 1536, 576);
    bench.AddGemm(1024, 1536, 576, DType::kBFloat16);
    bench.AddGemm(1024, 4096, 4096, DType::kBFloat16);
    bench.AddGemm(1024, 4096, 4096, DType::kFloat16);
  }
  for (int64_t n : options.tokens) {
    for (int64_t dim : {64, 128}) {
      bench.AddAttention("dense", MakeDenseIndex(), n, dim, 1);
      bench.AddAttention("a-shape:128,1024", MakeAShapeIndex({128, 1024}), n, dim, 2);
      bench.AddAttention("vertical-slash:500,200", SyntheticVerticalSlash(n, 500, 200), n, dim, 2);
      bench.AddAttention("vertical-slash:1500,120", SyntheticVerticalSlash(n, 1500, 120), n, dim, 2);
      bench.AddAttention("block-sparse:20", SyntheticBlocks(n, 20), n, dim, 2);
      bench.AddLastQuery(n, dim);
    }
  }
  bench.Run();
  bench.Report();
  return 0;
}

}  // namespace
}  // namespace longfill

int main(int argc, char** argv) {
  try {
    return longfill::Main(argc, argv);
  } catch (const std::exception& error) {  // of the standard and JSON libraries
    std::fprintf(stderr, "bench_kernels: %s\n", error.what());
    return 1;
  }
}
