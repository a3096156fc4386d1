// longfill bench shares: the block-share selection of one layer, as the engine runs it and by operation.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "deploy/cli/attention_rows.h"
#include "deploy/cli/bench.h"
#include "deploy/cli/bench_timing.h"
#include "kernels/cpu/e4m3.h"
#include "kernels/sparse/coverage.h"
#include "parallel/communicator.h"
#include "parallel/sparse_index_builder.h"
#include "runtime/engine/engine_device.h"

namespace longfill {
namespace {

constexpr int64_t kCheckedRowBlocks = 4;
constexpr double kShareTolerance = 0.01;  // relative; the contract suite holds the bits to a tighter bound
// On a GPU: tensor cores of sm_90 add products of fp8 with about 13 bits, and an error of a score is one of
// the logarithm of a share.
constexpr double kFp8ShareTolerance = 0.05;

struct BenchOptions : SelectionBenchOptions {
  std::string attention = "block-share:4,0.1";
  float q_stddev = 2;
};

struct ShareFigures {
  int64_t num_tokens = 0;
  Timing index;                                       // of the layer, pairs counted
  std::vector<std::pair<std::string, Timing>> steps;  // of the first KV head and its query heads
  // Of one sweep of these query heads, in the selection; none with two levels, which leave out most of it.
  std::optional<double> score_tflops;
  double density = 0;
  int64_t checked_pairs = 0;  // of a row block and a key block
};

// Queries and keys of one length, and what is measured on them.
class SharesBench {
 public:
  SharesBench(const BenchOptions& options, const BlockShare& pattern, Backend& backend, int64_t num_tokens)
      : options_(options),
        pattern_(pattern),
        backend_(backend),
        kernels_(backend.kernels()),
        stream_(backend.stream()),
        dtype_(kernels_.compute_dtype()),
        num_tokens_(num_tokens),
        num_row_blocks_(RowBlocksOf(num_tokens)),
        num_key_blocks_(num_tokens / kRowBlock),
        words_((num_row_blocks_ + 63) / 64),
        group_(options.num_q_heads / options.num_kv_heads),
        scale_(static_cast<float>(1 / std::sqrt(static_cast<double>(options.head_dim)))),
        min_share_(static_cast<size_t>(group_), static_cast<float>(pattern.min_share)) {}

  absl::StatusOr<ShareFigures> Run() {
    LF_RETURN_IF_ERROR(Allocate());
    ShareFigures figures;
    figures.num_tokens = num_tokens_;
    LF_RETURN_IF_ERROR(TimeIndex(&figures));
    LF_RETURN_IF_ERROR(TimeSteps(&figures));
    LF_ASSIGN_OR_RETURN(figures.checked_pairs, Check());
    if (pattern_.coarse == 0) figures.score_tflops = ScoreFlop() * 1e-12 / figures.steps[1].second.median;
    return figures;
  }

 private:
  int64_t dim() const { return options_.head_dim; }
  int64_t num_representatives() const { return NumRepresentatives(pattern_.samples, pattern_.outliers); }
  // That represent a coarse block.
  int64_t num_coarse_rows() const { return NumRepresentatives(pattern_.samples, pattern_.coarse); }
  int64_t num_coarse_blocks() const { return pattern_.coarse == 0 ? 0 : num_key_blocks_ / kCoarseBlocks; }
  double ScoreFlop() const {
    const int64_t pairs = num_row_blocks_ * (num_row_blocks_ - 1) / 2;  // of a row block and one before it
    return 2.0 * static_cast<double>(dim() * kRowBlock * group_) *
           static_cast<double>(num_representatives()) * static_cast<double>(pairs);
  }
  HeadsView<const void> Heads(const Buffer& rows) const { return {rows.data(), num_tokens_ * dim(), dim()}; }

  absl::Status Allocate() {
    LF_ASSIGN_OR_RETURN(q_, Random(options_.num_q_heads, options_.q_stddev, options_.seed, "queries"));
    LF_ASSIGN_OR_RETURN(k_, Random(options_.num_kv_heads, 1, options_.seed + 1, "keys"));
    const auto allocate = [this](int64_t bytes, const char* what) {
      return backend_.memory().Allocate(bytes, what);
    };
    LF_ASSIGN_OR_RETURN(
        representatives_,
        allocate(num_representatives() * num_key_blocks_ * dim() * DTypeBytes(dtype_), "representatives"));
    LF_ASSIGN_OR_RETURN(coarse_,
                        allocate(num_coarse_rows() * num_coarse_blocks() * dim() * DTypeBytes(dtype_),
                                 "coarse representatives"));
    LF_ASSIGN_OR_RETURN(bits_, allocate(group_ * num_row_blocks_ * words_ * 8, "bits of row blocks"));
    LF_ASSIGN_OR_RETURN(row_offsets_, allocate(group_ * (num_row_blocks_ + 1) * 8, "row offsets"));
    LF_ASSIGN_OR_RETURN(key_blocks_, allocate(Capacity() * 4, "lists of key blocks"));
    LF_ASSIGN_OR_RETURN(num_entries_, allocate(8, "the number of entries"));
    LF_ASSIGN_OR_RETURN(workspace_,
                        allocate(std::max(kernels_.ShareSelectionWorkspaceBytes(BoundsOf(SelectionParams())),
                                          kernels_.BuildBlockListsWorkspaceBytes(group_, num_row_blocks_)),
                                 "the workspace of selection"));
    return absl::OkStatus();
  }

  absl::StatusOr<Buffer> Random(int64_t num_heads, float stddev, uint64_t seed, const char* what) {
    const int64_t count = num_heads * num_tokens_ * dim();
    LF_ASSIGN_OR_RETURN(Buffer buffer, backend_.memory().Allocate(count * DTypeBytes(dtype_), what));
    LF_RETURN_IF_ERROR(kernels_.FillRandom(
        {.out = buffer.data(), .dtype = dtype_, .count = count, .stddev = stddev, .seed = seed}, stream_));
    return buffer;
  }

  int64_t Capacity() const { return ShareListCapacity(num_tokens_, group_); }
  Workspace workspace() const { return {workspace_.data(), workspace_.size_bytes()}; }

  // As the engine builds it.
  absl::Status TimeIndex(ShareFigures* figures) {
    const std::unique_ptr<Communicator> single = CreateSingleCommunicator();
    const AttentionGeometry geometry = {options_.num_q_heads, options_.num_kv_heads, dim(), scale_};
    LF_ASSIGN_OR_RETURN(SparseIndexBuilder builder,
                        SparseIndexBuilder::Create(backend_, *single, geometry, Coverage::kTiles));
    const std::vector<HeadPattern> patterns(static_cast<size_t>(options_.num_q_heads), pattern_);
    std::vector<double> seconds;
    for (int run = 0; run <= options_.repeat; ++run) {
      LF_ASSIGN_OR_RETURN(const LayerIndex layer,
                          builder.Build(ShardPlan({1, 1}, num_tokens_), Heads(q_), Heads(k_), patterns));
      if (run > 0) seconds.push_back(layer.seconds);  // the first one warms up
      int64_t covered = 0;
      for (const PairCounts& pairs : layer.pairs) covered += pairs.covered;
      figures->density = static_cast<double>(covered) / static_cast<double>(options_.num_q_heads) /
                         static_cast<double>(CausalPairs(num_tokens_));
    }
    figures->index = TimingOf(seconds);
    return absl::OkStatus();
  }

  absl::Status Represent() {
    return kernels_.Representatives({.k = Heads(k_),
                                     .num_heads = 1,
                                     .num_keys = num_tokens_,
                                     .head_dim = dim(),
                                     .num_outliers = pattern_.outliers,
                                     .num_samples = pattern_.samples,
                                     .out = representatives_.data()},
                                    stream_);
  }
  absl::Status RepresentCoarse() {
    return kernels_.CoarseRepresentatives({.representatives = representatives_.data(),
                                           .num_representatives = num_representatives(),
                                           .num_samples = pattern_.samples,
                                           .num_key_blocks = num_key_blocks_,
                                           .head_dim = dim(),
                                           .num_coarse = pattern_.coarse,
                                           .out = coarse_.data()},
                                          stream_);
  }
  ShareSelectionParams SelectionParams() const {
    return {.q = Heads(q_),
            .num_heads = group_,
            .num_rows = num_tokens_,
            .representatives = representatives_.data(),
            .num_representatives = num_representatives(),
            .num_samples = pattern_.samples,
            .own_k = k_.data(),
            .own_k_row_stride = dim(),
            .num_key_blocks = num_key_blocks_,
            .coarse = coarse_.data(),
            .num_coarse = pattern_.coarse,
            .fp8 = pattern_.fp8,
            .head_dim = dim(),
            .scale = scale_,
            .min_share = min_share_,
            .bits = bits_.as<uint64_t>(),
            .words_per_row = words_};
  }
  absl::Status Select() { return kernels_.SelectByShare(SelectionParams(), workspace(), stream_); }
  absl::Status MakeLists() {
    LF_RETURN_IF_ERROR(kernels_.Zero(num_entries_.data(), 8, stream_));
    return kernels_.BuildBlockLists({.bits = bits_.as<uint64_t>(),
                                     .words_per_row = words_,
                                     .num_heads = group_,
                                     .num_row_blocks = num_row_blocks_,
                                     .row_offsets = row_offsets_.as<int64_t>(),
                                     .row_offsets_stride = num_row_blocks_ + 1,
                                     .key_blocks = key_blocks_.as<int32_t>(),
                                     .capacity = Capacity(),
                                     .num_entries = num_entries_.as<int64_t>()},
                                    workspace(), stream_);
  }

  absl::Status TimeSteps(ShareFigures* figures) {
    std::vector<std::pair<const char*, std::function<absl::Status()>>> steps = {
        {"representatives", [this] { return Represent(); }},
        {"selection", [this] { return Select(); }},
        {"lists", [this] { return MakeLists(); }}};
    if (pattern_.coarse > 0) {
      steps.insert(steps.begin() + 1, {"coarse representatives", [this] { return RepresentCoarse(); }});
    }
    LF_ASSIGN_OR_RETURN(const std::unique_ptr<Event> begin, backend_.NewEvent());
    LF_ASSIGN_OR_RETURN(const std::unique_ptr<Event> end, backend_.NewEvent());
    for (const auto& [name, step] : steps) {
      std::vector<double> seconds;
      for (int run = 0; run < options_.repeat; ++run) {
        LF_RETURN_IF_ERROR(begin->Record(stream_));
        LF_RETURN_IF_ERROR(step());
        LF_RETURN_IF_ERROR(end->Record(stream_));
        LF_RETURN_IF_ERROR(stream_.Sync());
        LF_ASSIGN_OR_RETURN(const double once, end->SecondsSince(*begin));
        seconds.push_back(once);
      }
      figures->steps.emplace_back(name, TimingOf(seconds));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::vector<float>> DownloadRows(const void* from, int64_t count) {
    std::vector<char> stored(static_cast<size_t>(count * DTypeBytes(dtype_)));
    LF_RETURN_IF_ERROR(kernels_.CopyOut(stored.data(), from, std::ssize(stored), stream_));
    LF_RETURN_IF_ERROR(stream_.Sync());
    std::vector<float> values(static_cast<size_t>(count));
    WidenToFloat(stored.data(), dtype_, count, values.data());
    return values;
  }

  double Tolerance() const {
    return pattern_.fp8 && kernels_.device() == DeviceKind::kCuda ? kFp8ShareTolerance : kShareTolerance;
  }

  // With fp8, rounds each block of rows [num_rows, num_blocks, dim] by itself.
  void RoundBlocks(int64_t num_rows, int64_t num_blocks, std::vector<float>* rows) const {
    for (int64_t b = 0; pattern_.fp8 && b < num_blocks; ++b) {
      float* const first = rows->data() + b * dim();
      const int64_t stride = num_blocks * dim();
      RoundToE4m3({first, stride, first, stride, num_rows, dim()});
    }
  }

  // A few row blocks of the last query head of the first KV head, against shares in fp64 of the device's
  // representatives. Returns how many pairs of a row block and a key block were decided.
  absl::StatusOr<int64_t> Check() {
    LF_ASSIGN_OR_RETURN(
        std::vector<float> representatives,
        DownloadRows(representatives_.data(), num_representatives() * num_key_blocks_ * dim()));
    LF_ASSIGN_OR_RETURN(std::vector<float> coarse,
                        DownloadRows(coarse_.data(), num_coarse_rows() * num_coarse_blocks() * dim()));
    RoundBlocks(num_representatives(), num_key_blocks_, &representatives);
    RoundBlocks(num_coarse_rows(), num_coarse_blocks(), &coarse);
    int64_t decided = 0;
    for (int64_t i = 1; i <= kCheckedRowBlocks; ++i) {
      const int64_t m = std::max<int64_t>(0, num_row_blocks_ * i / kCheckedRowBlocks - 1);
      const int64_t first_row = m * kRowBlock;
      const int64_t num_rows = std::min(kRowBlock, num_tokens_ - first_row);
      const int64_t head = group_ - 1;
      LF_ASSIGN_OR_RETURN(std::vector<float> q,
                          DownloadRows(Advance(q_.data(), (head * num_tokens_ + first_row) * dim(), dtype_),
                                       num_rows * dim()));
      std::vector<uint64_t> bits(static_cast<size_t>(words_));
      LF_RETURN_IF_ERROR(kernels_.CopyOut(
          bits.data(), bits_.as<uint64_t>() + (head * num_row_blocks_ + m) * words_, words_ * 8, stream_));
      LF_RETURN_IF_ERROR(stream_.Sync());
      LF_ASSIGN_OR_RETURN(std::vector<float> own_k,
                          DownloadRows(Advance(k_.data(), first_row * dim(), dtype_), num_rows * dim()));
      RoundBlocks(num_rows, 1, &q);
      RoundBlocks(num_rows, 1, &own_k);
      const Bounds shares = LargestShares({q, own_k, num_rows}, m, representatives, coarse);
      for (int64_t b = 1; b + kForcedNearestBlocks <= m; ++b) {
        const bool kept = (bits[b / 64] >> (b % 64) & 1) != 0;
        const bool must = shares.least[b] > pattern_.min_share * (1 + Tolerance());
        const bool may = shares.most[b] > pattern_.min_share * (1 - Tolerance());
        if (must != may) continue;
        if (kept != must) {
          return absl::InternalError(absl::StrCat("row block ", m, kept ? " keeps" : " drops", " key block ",
                                                  b, ", whose largest share is in [", shares.least[b], ", ",
                                                  shares.most[b], "]"));
        }
        ++decided;
      }
    }
    return decided;
  }

  // The queries and keys [num_rows, dim] of a row block.
  struct RowsOfBlock {
    const std::vector<float>& q;
    const std::vector<float>& k;
    int64_t num_rows = 0;
  };
  // What represents the blocks of a level, [count, num_blocks, dim].
  struct Level {
    const std::vector<float>& representatives;
    int64_t count = 0;
    int64_t num_blocks = 0;
    int64_t block_keys = kRowBlock;
  };
  double Score(const float* q, const Level& level, int64_t block) const {
    const int64_t num_samples = pattern_.samples;
    const double sample_bonus =
        num_samples == 0 ? 0
                         : std::log(static_cast<double>(level.block_keys) / static_cast<double>(num_samples));
    double score = -INFINITY;
    for (int64_t r = 0; r < level.count; ++r) {
      const float* representative = level.representatives.data() + (r * level.num_blocks + block) * dim();
      const double bonus = r < num_samples ? sample_bonus : 0;
      score = std::max(score, scale_ * Dot<double>(q, representative, dim()) + bonus);
    }
    return score;
  }

  // With samples, the scores of the keys of the row block up to the row's own.
  std::vector<double> OwnScores(const RowsOfBlock& rows, int64_t row) const {
    std::vector<double> scores;
    for (int64_t key = 0; pattern_.samples > 0 && key <= row; ++key) {
      scores.push_back(scale_ * Dot<double>(rows.q.data() + row * dim(), rows.k.data() + key * dim(), dim()));
    }
    return scores;
  }

  // log of the sum of exp(score).
  static double LogSum(const std::vector<double>& scores) {
    const double highest = scores.empty() ? -INFINITY : *std::ranges::max_element(scores);
    if (highest == -INFINITY) return highest;
    double sum = 0;
    for (const double score : scores) sum += std::exp(score - highest);
    return highest + std::log(sum);
  }

  // Between which values: not the same where rounding may open a coarse block or close it.
  struct Bounds {
    std::vector<double> least, most;
  };
  // The largest share that a row gives each of the first `num_blocks` key blocks, by the definition
  // (head_pattern.h).
  Bounds LargestShares(const RowsOfBlock& rows, int64_t num_blocks, const std::vector<float>& representatives,
                       const std::vector<float>& coarse) const {
    const Level level = {representatives, num_representatives(), num_key_blocks_};
    const CoarseShares of_coarse = SharesOfCoarse(rows, num_blocks, coarse);
    const auto opens_at = [&](int64_t block, double share) {
      const int64_t c = block / kCoarseBlocks;
      return c >= std::ssize(of_coarse.largest) || of_coarse.largest[c] >= share;
    };
    const double open_share = kOpenFactor * pattern_.min_share;
    const std::vector<double> none(static_cast<size_t>(num_blocks), 0);
    Bounds bounds = {none, none};
    for (int64_t row = 0; row < rows.num_rows; ++row) {
      const float* q = rows.q.data() + row * dim();
      std::vector<double> open, may_be_open;  // scores, of others -infinity
      for (int64_t b = 0; b < num_blocks; ++b) {
        const bool may_be = opens_at(b, open_share * (1 - Tolerance()));
        may_be_open.push_back(may_be ? Score(q, level, b) : -INFINITY);
        open.push_back(opens_at(b, open_share * (1 + Tolerance())) ? may_be_open[b] : -INFINITY);
      }
      const std::vector<double> own = OwnScores(rows, row);
      open.insert(open.end(), own.begin(), own.end());
      may_be_open.insert(may_be_open.end(), own.begin(), own.end());
      const double least_sum = std::max(of_coarse.log_sums[row], LogSum(open));
      const double most_sum = std::max(of_coarse.log_sums[row], LogSum(may_be_open));
      for (int64_t b = 0; b < num_blocks; ++b) {
        bounds.least[b] = std::max(bounds.least[b], std::exp(open[b] - most_sum));
        bounds.most[b] = std::max(bounds.most[b], std::exp(may_be_open[b] - least_sum));
      }
    }
    return bounds;
  }

  struct CoarseShares {
    std::vector<double> largest;   // that a row gives each coarse block
    std::vector<double> log_sums;  // of each row
  };
  CoarseShares SharesOfCoarse(const RowsOfBlock& rows, int64_t num_key_blocks,
                              const std::vector<float>& coarse) const {
    const Level level = {coarse, num_coarse_rows(), num_coarse_blocks(), kCoarseBlocks * kRowBlock};
    const int64_t num_blocks = pattern_.coarse == 0 ? 0 : num_key_blocks / kCoarseBlocks;
    CoarseShares shares;
    shares.largest.resize(static_cast<size_t>(num_blocks), 0);
    for (int64_t row = 0; row < rows.num_rows; ++row) {
      std::vector<double> scores;
      for (int64_t c = 0; c < num_blocks; ++c) {
        scores.push_back(Score(rows.q.data() + row * dim(), level, c));
      }
      const std::vector<double> own = OwnScores(rows, row);
      scores.insert(scores.end(), own.begin(), own.end());
      shares.log_sums.push_back(LogSum(scores));
      for (int64_t c = 0; c < num_blocks; ++c) {
        shares.largest[c] = std::max(shares.largest[c], std::exp(scores[c] - shares.log_sums[row]));
      }
    }
    return shares;
  }

  const BenchOptions& options_;
  const BlockShare pattern_;
  Backend& backend_;
  KernelSet& kernels_;
  Stream& stream_;
  const DType dtype_;
  const int64_t num_tokens_, num_row_blocks_, num_key_blocks_, words_;
  const int64_t group_;  // query heads of a KV head
  const float scale_;
  const std::vector<float> min_share_;
  Buffer q_, k_, representatives_, coarse_, bits_, row_offsets_, key_blocks_, num_entries_, workspace_;
};

nlohmann::ordered_json ToJson(const ShareFigures& figures) {
  nlohmann::ordered_json steps = nlohmann::ordered_json::object();
  for (const auto& [name, timing] : figures.steps) steps[name] = ToJson(timing);
  nlohmann::ordered_json json = {{"tokens", figures.num_tokens},
                                 {"index_seconds", ToJson(figures.index)},
                                 {"step_seconds", std::move(steps)}};
  if (figures.score_tflops) json["score_tflops"] = *figures.score_tflops;
  json["density"] = figures.density;
  json["checked_pairs"] = figures.checked_pairs;
  return json;
}

std::string TextOf(const ShareFigures& figures) {
  std::string text = absl::StrFormat("%d tokens: density %.4f, %d decisions checked\n", figures.num_tokens,
                                     figures.density, figures.checked_pairs);
  const auto line = [&](const std::string& name, const Timing& timing) {
    text += absl::StrFormat("  %-24s", name) + ToText(timing) + "\n";
  };
  line("index of the layer", figures.index);
  text += "  the first KV head:\n";
  for (const auto& [name, timing] : figures.steps) line(name, timing);
  if (figures.score_tflops) {
    text += absl::StrFormat("  %.1f TFLOP/s on one sweep of scores\n", *figures.score_tflops);
  }
  return text;
}

absl::StatusOr<BlockShare> PatternOf(const BenchOptions& options) {
  LF_RETURN_IF_ERROR(CheckHeads(options.num_q_heads, options.num_kv_heads));
  LF_RETURN_IF_ERROR(CheckKernels(options.kernels, options.device));
  LF_ASSIGN_OR_RETURN(const HeadPattern pattern, ParseHeadPattern(options.attention));
  if (const auto* shares = std::get_if<BlockShare>(&pattern)) return *shares;
  return absl::InvalidArgumentError(
      absl::StrCat("--attention ", options.attention, " is not block-share:R,TAU[,S[,C]][,fp8]"));
}

absl::Status Measure(const BenchOptions& options, const StopSignals& signals) {
  LF_ASSIGN_OR_RETURN(const BlockShare pattern, PatternOf(options));
  LF_ASSIGN_OR_RETURN(const std::shared_ptr<Backend> backend, MakeSelectionBackend(options));
  nlohmann::ordered_json cases = nlohmann::ordered_json::array();
  if (!options.json) std::printf("%s, %s\n", backend->facts().name.c_str(), ToString(pattern).c_str());
  for (const int64_t num_tokens : options.tokens) {
    LF_RETURN_IF_ERROR(signals.ShouldStop());
    LF_ASSIGN_OR_RETURN(const ShareFigures figures,
                        SharesBench(options, pattern, *backend, num_tokens).Run());
    cases.push_back(ToJson(figures));
    if (!options.json) std::printf("%s", TextOf(figures).c_str());
    std::fflush(stdout);
  }
  if (options.json) {
    const nlohmann::ordered_json report = {
        {"device", backend->facts().name}, {"attention", ToString(pattern)},
        {"q_heads", options.num_q_heads},  {"kv_heads", options.num_kv_heads},
        {"head_dim", options.head_dim},    {"q_stddev", options.q_stddev},
        {"repeat", options.repeat},        {"cases", std::move(cases)}};
    std::printf("%s\n", report.dump(1).c_str());
  }
  return FlushOutput();
}

int BenchShares(BenchOptions options, CommandContext& context) {
  if (context.launch.parallel) return Report(absl::InvalidArgumentError("bench shares runs on one rank"));
  if (options.device.threads == 0) options.device.threads = DefaultThreads(1);
  return Report(Measure(options, *context.signals));
}

}  // namespace

Command AddBenchShares(CLI::App& bench) {
  CLI::App* app =
      bench.add_subcommand("shares", "Time and check a layer's block-share selection on random Q and K");
  auto options = std::make_shared<BenchOptions>();
  AddSelectionBenchOptions(*app, *options);
  app->add_option("--attention", options->attention, "of every head (default: block-share:4,0.1)")
      ->type_name("block-share:R,TAU[,S[,C]][,fp8]");
  app->add_option(
         "--q-stddev", options->q_stddev,
         "of the queries' elements, those of keys have 1: the standard deviation of scores (default: 2)")
      ->type_name("S")
      ->check(CLI::Range(0.001, 1000.0));
  return {app, [options](CommandContext& context) { return BenchShares(*options, context); }};
}

}  // namespace longfill
