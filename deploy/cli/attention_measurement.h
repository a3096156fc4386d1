#ifndef LONGFILL_DEPLOY_CLI_ATTENTION_MEASUREMENT_H_
#define LONGFILL_DEPLOY_CLI_ATTENTION_MEASUREMENT_H_

// Times the attention of one case on random Q, K and V, and checks its answers.

#include <cstdint>
#include <memory>
#include <vector>

#include "deploy/cli/attention_case.h"
#include "deploy/cli/attention_checker.h"
#include "deploy/cli/attention_figures.h"
#include "deploy/cli/index_steps.h"
#include "kernels/api/backend.h"
#include "kernels/base/thread_pool.h"

namespace longfill {

struct AttentionMeasurementOptions {
  Coverage coverage = Coverage::kTiles;
  int repeat = 5;
  int bit_runs = 10;
  int64_t sample_rows = 4096;  // of a case, over all heads
  bool checked = true;
  uint64_t seed = 1;
};

// The calls of one case share Q, K, V and results; their indices differ. Work goes to the main stream of
// `backend`.
class AttentionMeasurement {
 public:
  // `generic`, of the same device, or nullptr: its results are compared.
  static absl::StatusOr<AttentionFigures> Run(Backend& backend, Backend* generic, ThreadPool& threads,
                                              HostScratch& scratch, AttentionCase of,
                                              const AttentionMeasurementOptions& options);

 private:
  struct Call {                         // the heads of one call of the case
    std::unique_ptr<IndexSteps> index;  // nullptr: no head selects
    std::unique_ptr<PackedIndices> packed;
    Buffer memory;                 // a copy of it on the device
    std::vector<IndexView> views;  // [num_q_heads], there
    std::vector<IndexView> host;   // [num_q_heads], of `packed`
  };
  AttentionMeasurement(Backend& backend, Backend* generic, ThreadPool& threads, HostScratch& scratch,
                       AttentionCase of, const AttentionMeasurementOptions& options);
  absl::Status Allocate();
  absl::Status FillRandom(const Buffer& buffer, float stddev, uint64_t seed);
  absl::StatusOr<std::unique_ptr<IndexSteps>> PrepareIndex(int64_t call);
  absl::Status PrepareCalls();
  absl::Status Attend(Backend& backend, const Call& call, bool counted = false);  // counted: into counters_
  absl::Status Time();
  absl::Status Count();
  absl::Status CountCall(const Call& call);
  absl::Status CheckCall(const Call& call, uint64_t seed);
  absl::Status Check();

  Backend& backend_;
  Backend* generic_;
  ThreadPool& threads_;
  HostScratch& scratch_;
  const AttentionCase case_;
  const AttentionMeasurementOptions options_;
  const int64_t head_elements_;  // num_tokens * head_dim
  const DType dtype_;
  Buffer q_, k_, v_, out_, lse_, workspace_;
  Buffer counters_;  // int64: covered pairs, computed pairs, [kMaxBlockFinishTimes] ends
  std::vector<Call> calls_;
  AttentionFigures figures_;
};

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_ATTENTION_MEASUREMENT_H_
