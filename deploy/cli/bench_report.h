#ifndef LONGFILL_DEPLOY_CLI_BENCH_REPORT_H_
#define LONGFILL_DEPLOY_CLI_BENCH_REPORT_H_

// What `longfill bench prefill` prints: the measured seconds of each part beside those that the rates of the
// card would take.

#include <cstdint>
#include <string>
#include <vector>

#include "models/config.h"
#include "models/pattern_file.h"
#include "runtime/engine/prefill_engine.h"

namespace longfill {

// What a card is taken to do at best; the defaults were measured on one H100 80GB HBM3.
struct CardRates {
  double gemm_tflops = 690;
  double attention_tflops = 590;
  double memory_tbs = 3.0;  // 10^12 bytes a second, read and written
  double copy_gbs = 55;     // 10^9 bytes a second from device to host
};

// Least work of a prefill on one rank, and its seconds at the rates.
struct FloorFigures {
  double gemm_flop = 0;  // projections and MLP, the LM head for one position
  double gemm_seconds = 0;
  double attention_flop = 0;  // of the covered pairs
  double attention_seconds = 0;
  double index_seconds = 0;  // two passes over the keys, of the larger of their bytes and their FLOP
  double other_bytes = 0;    // norms, rotary and activation read and write each value once
  double other_seconds = 0;
  double copy_seconds = 0;  // of K and V, beside all other parts
};

// `selecting_heads`: query heads of all layers whose index is selected from the last queries.
FloorFigures ComputeFloor(const ModelConfig& config, const PrefillFigures& figures, int64_t selecting_heads,
                          const CardRates& rates);

// Heads of a pattern set that select from the last queries.
int64_t SelectingHeads(const PatternSet& patterns);

struct BenchRun {
  bool kv_copied = true;
  PrefillFigures figures;
};

struct BenchReport {
  std::string geometry;
  ModelConfig config;
  int64_t num_tokens = 0;
  uint64_t seed = 0;
  std::string indices;  // the file that is replayed; empty: the index that was built is used
  int64_t selecting_heads = 0;
  CardRates rates;
  double setup_seconds = 0;  // backend and weights
  std::vector<BenchRun> runs;

  // Median over the runs with K and V copied out, divided by that over those without, minus 1; 0 where there
  // are not both.
  double Slowdown(double PrefillFigures::*part) const;

  std::string ToJson() const;
  std::string ToText() const;
};

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_BENCH_REPORT_H_
