#ifndef LONGFILL_DEPLOY_CLI_ATTENTION_FIGURES_H_
#define LONGFILL_DEPLOY_CLI_ATTENTION_FIGURES_H_

// What `longfill bench attention` found out about one case.

#include <cmath>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "deploy/cli/bench_timing.h"
#include "kernels/sparse/index_view.h"

namespace longfill {

// Answers against what they have to be. Errors of rows are Euclidean, relative to the row.
struct AttentionCheck {
  int64_t rows = 0;  // against fp64
  double max_error = 0, naive_max_error = 0;
  double square_sum = 0, naive_square_sum = 0;  // of the errors of all rows
  double lse_error = 0, lse_limit = 0;          // absolute
  int64_t compared_heads = 0;  // all rows of these heads: bits of several runs, other kernels
  int bit_runs = 0;
  bool bits_equal = true;
  std::optional<double> generic_difference;  // of a row, at most; empty: not compared
  bool pairs_equal = true;                   // the kernel's covered pairs are those of the index

  double rms_error() const { return rows > 0 ? std::sqrt(square_sum / static_cast<double>(rows)) : 0; }
  double naive_rms_error() const {
    return rows > 0 ? std::sqrt(naive_square_sum / static_cast<double>(rows)) : 0;
  }
  // Results may have twice the naive error, two of them may be twice as far apart.
  double max_limit() const;
  double rms_limit() const;
  double generic_limit() const { return 2 * max_limit(); }
  bool Passed() const;
};

struct AttentionFigures {
  std::string name;
  std::string source;
  int64_t num_tokens = 0, head_dim = 0;
  int64_t num_heads = 0, num_calls = 0, num_kv_heads = 0;  // KV heads of a call
  bool index_built = false;      // index is of heads that select, and part of the sum
  Timing index, attention, sum;  // of all calls
  PairCounts pairs;
  int64_t computed_pairs = 0;
  // Latest minus mean end of a thread block, over the time of the call; of the worst call.
  std::optional<double> finish_imbalance;
  int64_t thread_blocks = 0;
  std::optional<AttentionCheck> check;

  double Tflops(int64_t pair_count, double seconds) const;
  // FLOP of the published pairs over index and attention.
  double EffectiveTflops() const { return Tflops(pairs.published, sum.median); }

  // `reference_tflops` 0: there is none, and no ratios.
  nlohmann::ordered_json ToJson(double reference_tflops) const;
  std::string ToText(double reference_tflops) const;
};

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_ATTENTION_FIGURES_H_
