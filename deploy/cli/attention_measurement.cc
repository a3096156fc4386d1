#include "deploy/cli/attention_measurement.h"

#include <algorithm>
#include <cmath>
#include <span>
#include <utility>
#include <variant>

#include "deploy/cli/attention_checker.h"
#include "kernels/sparse/coverage.h"

namespace longfill {
namespace {

constexpr int64_t kPairPiece = 1024;  // row blocks that a task counts
constexpr float kPoison = 1e4F;       // stddev of what results are overwritten with before they are checked

PairCounts CountAllPairs(std::span<const IndexView> indices, int64_t num_tokens, ThreadPool& threads) {
  const int64_t row_blocks = RowBlocksOf(num_tokens);
  const int64_t pieces = (row_blocks + kPairPiece - 1) / kPairPiece;
  std::vector<PairCounts> counts(indices.size() * static_cast<size_t>(pieces));
  threads.ParallelFor(std::ssize(counts), [&](int64_t task, int) {
    const int64_t begin = task % pieces * kPairPiece;
    counts[task] = CountRowBlockPairs(indices[task / pieces], begin, std::min(begin + kPairPiece, row_blocks),
                                      num_tokens);
  });
  PairCounts sum;
  for (const PairCounts& count : counts) {
    sum.published += count.published;
    sum.covered += count.covered;
  }
  return sum;
}

}  // namespace

AttentionMeasurement::AttentionMeasurement(Backend& backend, Backend* generic, ThreadPool& threads,
                                           HostScratch& scratch, AttentionCase of,
                                           const AttentionMeasurementOptions& options)
    : backend_(backend),
      generic_(generic),
      threads_(threads),
      scratch_(scratch),
      case_(std::move(of)),
      options_(options),
      head_elements_(case_.num_tokens * case_.head_dim),
      dtype_(backend.kernels().compute_dtype()) {}

absl::StatusOr<AttentionFigures> AttentionMeasurement::Run(Backend& backend, Backend* generic,
                                                           ThreadPool& threads, HostScratch& scratch,
                                                           AttentionCase of,
                                                           const AttentionMeasurementOptions& options) {
  AttentionMeasurement measurement(backend, generic, threads, scratch, std::move(of), options);
  LF_RETURN_IF_ERROR(measurement.Allocate());
  LF_RETURN_IF_ERROR(measurement.PrepareCalls());
  LF_RETURN_IF_ERROR(measurement.Time());
  LF_RETURN_IF_ERROR(measurement.Count());
  if (options.checked) LF_RETURN_IF_ERROR(measurement.Check());
  return std::move(measurement.figures_);
}

absl::Status AttentionMeasurement::FillRandom(const Buffer& buffer, float stddev, uint64_t seed) {
  return backend_.kernels().FillRandom({.out = buffer.data(),
                                        .dtype = dtype_,
                                        .count = buffer.size_bytes() / DTypeBytes(dtype_),
                                        .stddev = stddev,
                                        .seed = seed},
                                       backend_.stream());
}

absl::Status AttentionMeasurement::Allocate() {
  MemoryResource& memory = backend_.memory();
  const int64_t head_bytes = head_elements_ * DTypeBytes(dtype_);
  LF_ASSIGN_OR_RETURN(q_, memory.Allocate(case_.num_q_heads * head_bytes, "queries"));
  LF_ASSIGN_OR_RETURN(k_, memory.Allocate(case_.num_kv_heads * head_bytes, "keys"));
  LF_ASSIGN_OR_RETURN(v_, memory.Allocate(case_.num_kv_heads * head_bytes, "values"));
  LF_ASSIGN_OR_RETURN(out_, memory.Allocate(case_.num_q_heads * head_bytes, "results"));
  LF_ASSIGN_OR_RETURN(
      lse_,
      memory.Allocate(case_.num_q_heads * case_.num_tokens * DTypeBytes(DType::kFloat32), "lse of results"));
  LF_ASSIGN_OR_RETURN(counters_,
                      memory.Allocate((2 + kMaxBlockFinishTimes) * DTypeBytes(DType::kInt64), "counters"));
  const AttentionBounds bounds = {.num_sequences = 1,
                                  .num_q_heads = case_.num_q_heads,
                                  .num_q_rows = case_.num_tokens,
                                  .head_dim = case_.head_dim};
  int64_t workspace_bytes = backend_.kernels().AttentionWorkspaceBytes(bounds);
  if (generic_ != nullptr) {
    workspace_bytes = std::max(workspace_bytes, generic_->kernels().AttentionWorkspaceBytes(bounds));
  }
  LF_ASSIGN_OR_RETURN(workspace_, memory.Allocate(workspace_bytes, "the workspace of attention"));
  LF_RETURN_IF_ERROR(FillRandom(q_, 1, options_.seed));
  LF_RETURN_IF_ERROR(FillRandom(k_, 1, options_.seed + 1));
  return FillRandom(v_, 1, options_.seed + 2);
}

absl::StatusOr<std::unique_ptr<IndexSteps>> AttentionMeasurement::PrepareIndex(int64_t call) {
  const int64_t dim = case_.head_dim;
  IndexProblem problem;
  problem.num_tokens = case_.num_tokens;
  problem.num_q_heads = case_.num_q_heads;
  problem.num_kv_heads = case_.num_kv_heads;
  problem.head_dim = dim;
  problem.coverage = options_.coverage;
  const int64_t first_row = case_.num_tokens - problem.num_queries();
  problem.last_q = {Advance(q_.data(), first_row * dim, dtype_), head_elements_, dim};
  problem.k = {k_.data(), head_elements_, dim};
  for (int64_t head = 0; head < case_.num_q_heads && !case_.patterns.empty(); ++head) {
    const HeadPattern& pattern = case_.patterns[call * case_.num_q_heads + head];
    if (const auto* budget = std::get_if<VerticalSlash>(&pattern); budget != nullptr) {
      problem.heads.push_back(static_cast<int32_t>(head));
      problem.budgets.push_back(*budget);
    }
  }
  if (problem.heads.empty()) return nullptr;
  return IndexSteps::Create(backend_, std::move(problem));
}

absl::Status AttentionMeasurement::PrepareCalls() {
  for (int64_t number = 0; number < case_.num_calls(); ++number) {
    Call call;
    LF_ASSIGN_OR_RETURN(call.index, PrepareIndex(number));
    std::vector<SparseIndex> built;
    std::span<const SparseIndex> indices = built;
    if (!case_.indices.empty()) {
      indices = std::span(case_.indices).subspan(number * case_.num_q_heads, case_.num_q_heads);
    } else {  // all heads select
      LF_RETURN_IF_ERROR(call.index->RunAll());
      for (int64_t head = 0; head < case_.num_q_heads; ++head) {
        LF_ASSIGN_OR_RETURN(DiagonalColumnIndex index, call.index->DownloadIndex(static_cast<size_t>(head)));
        built.emplace_back(std::move(index));
      }
      indices = built;
    }
    for (const SparseIndex& index : indices) LF_RETURN_IF_ERROR(ValidateIndex(index, case_.num_tokens));
    call.packed = std::make_unique<PackedIndices>(indices);
    call.host = call.packed->Views(call.packed->data());
    const int64_t bytes = call.packed->size_bytes();
    LF_ASSIGN_OR_RETURN(call.memory, backend_.memory().Allocate(bytes, "indices"));
    LF_RETURN_IF_ERROR(
        backend_.kernels().CopyIn(call.memory.data(), call.packed->data(), bytes, backend_.stream()));
    call.views = call.packed->Views(call.memory.data());
    calls_.push_back(std::move(call));
  }
  return absl::OkStatus();
}

absl::Status AttentionMeasurement::Attend(Backend& backend, const Call& call, bool counted) {
  const int64_t dim = case_.head_dim;
  const AttentionSequence sequence = {.q_begin = 0,
                                      .q_end = case_.num_tokens,
                                      .k_begin = 0,
                                      .k_end = case_.num_tokens,
                                      .q_positions = PositionMap::Contiguous(0),
                                      .num_tokens = case_.num_tokens,
                                      .key_range_begin = 0,
                                      .key_range_end = case_.num_tokens,
                                      .indices = call.views};
  AttentionParams params;
  params.q = {q_.data(), head_elements_, dim};
  params.k = {k_.data(), head_elements_, dim};
  params.v = {v_.data(), head_elements_, dim};
  params.out = {out_.data(), head_elements_, dim};
  params.lse = lse_.as<float>();
  params.lse_head_stride = case_.num_tokens;
  params.num_q_heads = case_.num_q_heads;
  params.num_kv_heads = case_.num_kv_heads;
  params.head_dim = dim;
  params.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(dim)));
  params.sequences = {&sequence, 1};
  if (counted) {
    auto* const counters = counters_.as<int64_t>();
    params.covered_pairs = counters;
    params.computed_pairs = counters + 1;
    params.block_finish_ns = counters + 2;
  }
  return backend.kernels().Attention(params, {workspace_.data(), workspace_.size_bytes()}, backend.stream());
}

// Nothing waits between the runs; one that is not timed comes first.
absl::Status AttentionMeasurement::Time() {
  struct Times {
    std::unique_ptr<Event> begin, built, end;
  };
  for (const Call& call : calls_) {
    if (call.index != nullptr) LF_RETURN_IF_ERROR(call.index->RunAll());
    LF_RETURN_IF_ERROR(Attend(backend_, call));
  }
  std::vector<std::vector<Times>> runs(static_cast<size_t>(options_.repeat));
  for (std::vector<Times>& run : runs) {
    for (const Call& call : calls_) {
      Times times;
      for (std::unique_ptr<Event>* event : {&times.begin, &times.built, &times.end}) {
        LF_ASSIGN_OR_RETURN(*event, backend_.NewEvent());
      }
      LF_RETURN_IF_ERROR(times.begin->Record(backend_.stream()));
      if (call.index != nullptr) LF_RETURN_IF_ERROR(call.index->RunAll());
      LF_RETURN_IF_ERROR(times.built->Record(backend_.stream()));
      LF_RETURN_IF_ERROR(Attend(backend_, call));
      LF_RETURN_IF_ERROR(times.end->Record(backend_.stream()));
      run.push_back(std::move(times));
    }
  }
  LF_RETURN_IF_ERROR(backend_.stream().Sync());
  std::vector<double> index, attention, sum;
  for (const std::vector<Times>& run : runs) {
    double index_seconds = 0;
    double attention_seconds = 0;
    for (const Times& times : run) {
      LF_ASSIGN_OR_RETURN(const double building, times.built->SecondsSince(*times.begin));
      LF_ASSIGN_OR_RETURN(const double attending, times.end->SecondsSince(*times.built));
      index_seconds += building;
      attention_seconds += attending;
    }
    index.push_back(index_seconds);
    attention.push_back(attention_seconds);
    sum.push_back(index_seconds + attention_seconds);
  }
  figures_.index = TimingOf(index);
  figures_.attention = TimingOf(attention);
  figures_.sum = TimingOf(sum);
  return absl::OkStatus();
}

absl::Status AttentionMeasurement::CountCall(const Call& call) {
  LF_RETURN_IF_ERROR(backend_.kernels().Zero(counters_.data(), counters_.size_bytes(), backend_.stream()));
  LF_RETURN_IF_ERROR(Attend(backend_, call, /*counted=*/true));
  std::vector<int64_t> counters(2 + kMaxBlockFinishTimes);
  LF_RETURN_IF_ERROR(backend_.kernels().CopyOut(counters.data(), counters_.data(), counters_.size_bytes(),
                                                backend_.stream()));
  LF_RETURN_IF_ERROR(backend_.stream().Sync());
  const PairCounts pairs = CountAllPairs(call.host, case_.num_tokens, threads_);
  figures_.pairs.published += pairs.published;
  figures_.pairs.covered += pairs.covered;
  figures_.computed_pairs += counters[1];
  if (figures_.check) figures_.check->pairs_equal &= counters[0] == pairs.covered;

  std::vector<int64_t> ends(counters.begin() + 2, counters.end());
  std::erase(ends, 0);
  if (ends.empty()) return absl::OkStatus();  // these kernels do not say
  const double call_ns = 1e9 * figures_.attention.median / static_cast<double>(case_.num_calls());
  const int64_t latest = *std::max_element(ends.begin(), ends.end());
  double mean_before_latest = 0;
  for (const int64_t end : ends) {
    mean_before_latest += static_cast<double>(latest - end) / static_cast<double>(ends.size());
  }
  figures_.finish_imbalance = std::max(figures_.finish_imbalance.value_or(0), mean_before_latest / call_ns);
  figures_.thread_blocks = std::max<int64_t>(figures_.thread_blocks, std::ssize(ends));
  return absl::OkStatus();
}

absl::Status AttentionMeasurement::Count() {
  figures_.name = case_.name;
  figures_.source = case_.source;
  figures_.num_tokens = case_.num_tokens;
  figures_.head_dim = case_.head_dim;
  figures_.num_heads = case_.num_heads();
  figures_.num_calls = case_.num_calls();
  figures_.num_kv_heads = case_.num_kv_heads;
  figures_.index_built = calls_[0].index != nullptr;
  if (options_.checked) figures_.check.emplace();
  for (const Call& call : calls_) LF_RETURN_IF_ERROR(CountCall(call));
  return absl::OkStatus();
}

absl::Status AttentionMeasurement::CheckCall(const Call& call, uint64_t seed) {
  AttentionCheck& check = *figures_.check;
  AttentionChecker checker(backend_, threads_, scratch_,
                           {.num_tokens = case_.num_tokens,
                            .head_dim = case_.head_dim,
                            .num_q_heads = case_.num_q_heads,
                            .num_kv_heads = case_.num_kv_heads,
                            .q = q_.data(),
                            .k = k_.data(),
                            .v = v_.data(),
                            .out = out_.data(),
                            .lse = lse_.as<float>()});
  LF_RETURN_IF_ERROR(FillRandom(out_, kPoison, seed));
  LF_RETURN_IF_ERROR(Attend(backend_, call));
  const int64_t rows_per_head = (options_.sample_rows + case_.num_heads() - 1) / case_.num_heads();
  LF_RETURN_IF_ERROR(checker.CheckRows(call.host, rows_per_head, seed, &check));
  LF_RETURN_IF_ERROR(checker.KeepResults());
  check.compared_heads += std::ssize(checker.ComparedHeads());
  check.bit_runs = options_.bit_runs;
  for (int run = 1; run < options_.bit_runs; ++run) {
    LF_RETURN_IF_ERROR(Attend(backend_, call));
    LF_ASSIGN_OR_RETURN(const bool same, checker.ResultsAreKept());
    check.bits_equal = check.bits_equal && same;
  }
  if (generic_ == nullptr) return absl::OkStatus();
  LF_RETURN_IF_ERROR(FillRandom(out_, kPoison, seed));
  LF_RETURN_IF_ERROR(backend_.stream().Sync());
  LF_RETURN_IF_ERROR(Attend(*generic_, call));
  LF_RETURN_IF_ERROR(generic_->stream().Sync());
  LF_ASSIGN_OR_RETURN(const double difference, checker.LargestRowDifference());
  check.generic_difference = std::max(check.generic_difference.value_or(0), difference);
  return absl::OkStatus();
}

absl::Status AttentionMeasurement::Check() {
  uint64_t seed = options_.seed + 1000;
  for (const Call& call : calls_) LF_RETURN_IF_ERROR(CheckCall(call, seed++));
  return absl::OkStatus();
}

}  // namespace longfill
