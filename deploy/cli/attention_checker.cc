#include "deploy/cli/attention_checker.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "deploy/cli/attention_rows.h"
#include "kernels/base/dtype.h"

namespace longfill {
namespace {

constexpr int64_t kWidenPiece = int64_t{1} << 20;    // elements of a task
constexpr int64_t kComparePiece = int64_t{1} << 22;  // bytes of a task

// What one sampled row adds to a check.
struct RowErrors {
  double error = 0;
  double naive_error = 0;
  double lse_error = 0;
  double naive_lse_error = 0;
  double lse = 0;
};

double AbsoluteError(double got, double want) {
  if (got == want) return 0;  // both infinite
  const double error = std::abs(got - want);
  return std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
}

void Add(const RowErrors& row, AttentionCheck* check) {
  constexpr double kEpsilon = std::numeric_limits<float>::epsilon();
  ++check->rows;
  check->max_error = std::max(check->max_error, row.error);
  check->naive_max_error = std::max(check->naive_max_error, row.naive_error);
  check->square_sum += row.error * row.error;
  check->naive_square_sum += row.naive_error * row.naive_error;
  check->lse_error = std::max(check->lse_error, row.lse_error);
  // A few units in the last place beside twice the naive error, which is chance there.
  const double units = std::isfinite(row.lse) ? 4 * (1 + std::abs(row.lse)) * kEpsilon : 0;
  check->lse_limit = std::max(check->lse_limit, 2 * row.naive_lse_error + units);
}

}  // namespace

absl::StatusOr<void*> HostScratch::Get(const std::string& name, int64_t bytes) {
  Buffer& buffer = buffers_[name];
  if (buffer.size_bytes() < bytes) {
    buffer = Buffer();
    LF_ASSIGN_OR_RETURN(buffer, backend_.host_memory().Allocate(bytes, name));
  }
  return buffer.data();
}

// One head of K or V as fp32 on the host.
absl::StatusOr<const float*> AttentionChecker::FetchHead(const std::string& name, const void* from,
                                                         int64_t head) {
  const int64_t elements = HeadElements();
  const int64_t bytes = elements * DTypeBytes(dtype());
  LF_ASSIGN_OR_RETURN(void* const stored, scratch_.Get(name, bytes));
  LF_ASSIGN_OR_RETURN(void* const wide,
                      scratch_.Get(name + " in fp32", elements * DTypeBytes(DType::kFloat32)));
  LF_RETURN_IF_ERROR(CopyOut(stored, Advance(from, head * elements, dtype()), bytes));
  LF_RETURN_IF_ERROR(backend_.stream().Sync());
  auto* const values = static_cast<float*>(wide);
  threads_.ParallelFor((elements + kWidenPiece - 1) / kWidenPiece, [&](int64_t piece, int) {
    const int64_t begin = piece * kWidenPiece;
    WidenToFloat(Advance(stored, begin, dtype()), dtype(), std::min(kWidenPiece, elements - begin),
                 values + begin);
  });
  return values;
}

absl::Status AttentionChecker::CheckKvHead(std::span<const IndexView> indices, int64_t kv_head,
                                           int64_t rows_per_head, uint64_t seed, AttentionCheck* check) {
  LF_ASSIGN_OR_RETURN(const float* const k, FetchHead("keys", arrays_.k, kv_head));
  LF_ASSIGN_OR_RETURN(const float* const v, FetchHead("values", arrays_.v, kv_head));
  const int64_t group = arrays_.num_q_heads / arrays_.num_kv_heads;
  const int64_t dim = arrays_.head_dim;
  struct Task {
    int64_t head, row;
  };
  std::vector<Task> tasks;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (const int64_t row :
         SampleRows(arrays_.num_tokens, rows_per_head, seed + static_cast<uint64_t>(head))) {
      tasks.push_back({head, row});
    }
  }
  const auto count = static_cast<int64_t>(tasks.size());
  const int64_t row_bytes = dim * DTypeBytes(dtype());
  LF_ASSIGN_OR_RETURN(void* const q_rows, scratch_.Get("query rows", count * row_bytes));
  LF_ASSIGN_OR_RETURN(void* const out_rows, scratch_.Get("result rows", count * row_bytes));
  LF_ASSIGN_OR_RETURN(void* const lse_memory,
                      scratch_.Get("lse of rows", count * DTypeBytes(DType::kFloat32)));
  auto* const lse = static_cast<float*>(lse_memory);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = tasks[i].head * arrays_.num_tokens + tasks[i].row;
    LF_RETURN_IF_ERROR(
        CopyOut(Advance(q_rows, i * dim, dtype()), Advance(arrays_.q, row * dim, dtype()), row_bytes));
    LF_RETURN_IF_ERROR(
        CopyOut(Advance(out_rows, i * dim, dtype()), Advance(arrays_.out, row * dim, dtype()), row_bytes));
    LF_RETURN_IF_ERROR(CopyOut(lse + i, arrays_.lse + row, DTypeBytes(DType::kFloat32)));
  }
  LF_RETURN_IF_ERROR(backend_.stream().Sync());

  std::vector<RowErrors> errors(tasks.size());
  threads_.ParallelFor(count, [&](int64_t i, int) {
    std::vector<float> q(static_cast<size_t>(dim));
    std::vector<float> got(static_cast<size_t>(dim));
    WidenToFloat(Advance(q_rows, i * dim, dtype()), dtype(), dim, q.data());
    WidenToFloat(Advance(out_rows, i * dim, dtype()), dtype(), dim, got.data());
    const RowAnswer answer = ComputeRow({.q = q.data(),
                                         .k = k,
                                         .v = v,
                                         .head_dim = dim,
                                         .num_tokens = arrays_.num_tokens,
                                         .row = tasks[i].row,
                                         .index = indices[tasks[i].head],
                                         .scale = 1 / std::sqrt(static_cast<double>(dim)),
                                         .dtype = dtype()});
    errors[i] = {.error = RelativeError(got, answer.out),
                 .naive_error = RelativeError(answer.naive, answer.out),
                 .lse_error = AbsoluteError(double{lse[i]}, answer.lse),
                 .naive_lse_error = AbsoluteError(double{answer.naive_lse}, answer.lse),
                 .lse = answer.lse};
  });
  for (const RowErrors& row : errors) Add(row, check);
  return absl::OkStatus();
}

absl::Status AttentionChecker::CheckRows(std::span<const IndexView> indices, int64_t rows_per_head,
                                         uint64_t seed, AttentionCheck* check) {
  for (int64_t kv_head = 0; kv_head < arrays_.num_kv_heads; ++kv_head) {
    LF_RETURN_IF_ERROR(CheckKvHead(indices, kv_head, rows_per_head, seed, check));
  }
  return absl::OkStatus();
}

std::vector<int64_t> AttentionChecker::ComparedHeads() const {
  const int64_t head_bytes = HeadElements() * DTypeBytes(dtype());
  const int64_t count = std::clamp<int64_t>(kMaxComparedBytes / head_bytes, 1, arrays_.num_q_heads);
  std::vector<int64_t> heads;
  for (int64_t i = 0; i < count; ++i) {
    heads.push_back(i * arrays_.num_q_heads / count + i % (arrays_.num_q_heads / count));
  }
  return heads;
}

absl::StatusOr<const char*> AttentionChecker::FetchResults(const std::string& name) {
  const std::vector<int64_t> heads = ComparedHeads();
  const int64_t head_bytes = HeadElements() * DTypeBytes(dtype());
  LF_ASSIGN_OR_RETURN(void* const memory, scratch_.Get(name, std::ssize(heads) * head_bytes));
  auto* to = static_cast<char*>(memory);
  for (const int64_t head : heads) {
    LF_RETURN_IF_ERROR(CopyOut(to, Advance(arrays_.out, head * HeadElements(), dtype()), head_bytes));
    to += head_bytes;
  }
  LF_RETURN_IF_ERROR(backend_.stream().Sync());
  return static_cast<const char*>(memory);
}

absl::Status AttentionChecker::KeepResults() { return FetchResults("kept results").status(); }

absl::StatusOr<bool> AttentionChecker::ResultsAreKept() {
  const int64_t bytes = std::ssize(ComparedHeads()) * HeadElements() * DTypeBytes(dtype());
  LF_ASSIGN_OR_RETURN(const void* const kept, scratch_.Get("kept results", bytes));
  LF_ASSIGN_OR_RETURN(const char* const results, FetchResults("other results"));
  std::atomic<bool> same = true;
  threads_.ParallelFor((bytes + kComparePiece - 1) / kComparePiece, [&](int64_t piece, int) {
    const int64_t begin = piece * kComparePiece;
    const auto size = static_cast<size_t>(std::min(kComparePiece, bytes - begin));
    if (std::memcmp(static_cast<const char*>(kept) + begin, results + begin, size) != 0) same = false;
  });
  return same.load();
}

absl::StatusOr<double> AttentionChecker::LargestRowDifference() {
  const int64_t dim = arrays_.head_dim;
  const int64_t num_rows = std::ssize(ComparedHeads()) * arrays_.num_tokens;
  LF_ASSIGN_OR_RETURN(const void* const kept,
                      scratch_.Get("kept results", num_rows * dim * DTypeBytes(dtype())));
  LF_ASSIGN_OR_RETURN(const char* const results, FetchResults("other results"));
  constexpr int64_t kRows = 4096;  // of a task
  std::vector<double> largest(static_cast<size_t>((num_rows + kRows - 1) / kRows), 0);
  threads_.ParallelFor(std::ssize(largest), [&](int64_t piece, int) {
    std::vector<float> got(static_cast<size_t>(dim));
    std::vector<float> other(static_cast<size_t>(dim));
    for (int64_t row = piece * kRows; row < std::min((piece + 1) * kRows, num_rows); ++row) {
      WidenToFloat(Advance(kept, row * dim, dtype()), dtype(), dim, got.data());
      WidenToFloat(Advance(results, row * dim, dtype()), dtype(), dim, other.data());
      const std::vector<double> want(other.begin(), other.end());
      largest[piece] = std::max(largest[piece], RelativeError(got, want));
    }
  });
  return *std::max_element(largest.begin(), largest.end());
}

}  // namespace longfill
