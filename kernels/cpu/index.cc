#include "kernels/cpu/index.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/workspace.h"
#include "kernels/sparse/coverage.h"

namespace longfill {
namespace {

// Row blocks that are counted together: a fraction of a millisecond each.
constexpr int64_t kRowBlocksPerTask = 64;

// Calls take(position) for the bits that are set, ascending, until it returns false.
template <typename Take>
void ForBits(const uint64_t* words, int64_t num_words, const Take& take) {
  for (int64_t w = 0; w < num_words; ++w) {
    for (uint64_t word = words[w]; word != 0; word &= word - 1) {
      if (!take(w * 64 + std::countr_zero(word))) return;
    }
  }
}

// Fills the lists of one head as far as they fit.
class HeadBuilder {
 public:
  HeadBuilder(const IndexBuffers& out, bool with_runs) : out_(out), with_runs_(with_runs) {}

  IndexCounts Build(const uint64_t* columns, const uint64_t* distances, int64_t num_words) {
    ForBits(columns, num_words, [this](int64_t column) { return AddColumn(column); });
    if (num_words == 0 || (distances[0] & 1) == 0) AddDistance(0);
    ForBits(distances, num_words, [this](int64_t distance) { return AddDistance(distance); });
    if (with_runs_) AddRuns();
    return counts_;
  }

 private:
  bool AddColumn(int64_t column) {
    if (counts_.columns == out_.column_capacity) return Overflow();
    out_.columns[counts_.columns++] = static_cast<int32_t>(column);
    return true;
  }

  bool AddDistance(int64_t distance) {
    if (counts_.distances == out_.distance_capacity) return Overflow();
    out_.distances[counts_.distances++] = static_cast<int32_t>(distance);
    return true;
  }

  void AddRuns() {
    const std::vector<DistanceRun> runs =
        CoarseRuns({out_.distances, static_cast<size_t>(counts_.distances)});
    counts_.runs = static_cast<int32_t>(std::min<int64_t>(std::ssize(runs), out_.run_capacity));
    std::copy_n(runs.begin(), counts_.runs, out_.runs);
    if (counts_.runs < std::ssize(runs)) Overflow();
  }

  bool Overflow() {
    counts_.overflow = 1;
    return false;
  }

  const IndexBuffers& out_;
  const bool with_runs_;
  IndexCounts counts_;
};

}  // namespace

absl::Status CpuBuildIndex(const BuildIndexParams& params, ThreadPool& pool) {
  LF_RETURN_IF_ERROR(CheckAtLeast("build index", "words_per_list", params.words_per_list, 0));
  for (const IndexBuffers& out : params.out) {
    const int64_t least = std::min({out.column_capacity, out.distance_capacity, out.run_capacity});
    LF_RETURN_IF_ERROR(CheckAtLeast("build index", "capacity", least, 0));
  }
  pool.ParallelFor(static_cast<int64_t>(params.out.size()), [&](int64_t head, int) {
    const uint64_t* columns = params.bits + 2 * head * params.words_per_list;
    const IndexBuffers& out = params.out[static_cast<size_t>(head)];
    HeadBuilder builder(out, params.coverage == Coverage::kTiles);
    *out.counts = builder.Build(columns, columns + params.words_per_list, params.words_per_list);
  });
  return absl::OkStatus();
}

absl::Status CpuCountPairs(const CountPairsParams& params, ThreadPool& pool) {
  LF_RETURN_IF_ERROR(CheckAtLeast("count pairs", "num_tokens", params.num_tokens, 0));
  LF_RETURN_IF_ERROR(CheckCountedRows(params));
  const auto num_heads = static_cast<int64_t>(params.indices.size());
  const int64_t num_rows = params.CountedRows();
  const int64_t row_blocks = RowBlocksOf(num_rows);
  const int64_t stretches = (row_blocks + kRowBlocksPerTask - 1) / kRowBlocksPerTask;
  std::fill_n(params.counts, num_heads, PairCounts{});
  pool.ParallelFor(num_heads * stretches, [&](int64_t task, int) {
    const int64_t head = task / stretches;
    const int64_t begin = task % stretches * kRowBlocksPerTask;
    const PairCounts pairs = CountRowBlockPairs(params.indices[static_cast<size_t>(head)], begin,
                                                std::min(row_blocks, begin + kRowBlocksPerTask), num_rows);
    PairCounts& out = params.counts[head];
    std::atomic_ref<int64_t>(out.published).fetch_add(pairs.published, std::memory_order_relaxed);
    std::atomic_ref<int64_t>(out.covered).fetch_add(pairs.covered, std::memory_order_relaxed);
  });
  return absl::OkStatus();
}

}  // namespace longfill
