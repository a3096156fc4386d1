#ifndef LONGFILL_DEPLOY_CLI_INDEX_CHECK_H_
#define LONGFILL_DEPLOY_CLI_INDEX_CHECK_H_

#include <cstdint>
#include <vector>

#include "deploy/cli/index_steps.h"
#include "kernels/base/thread_pool.h"

namespace longfill {

// Inputs of one head on the host.
struct IndexCheckInput {
  std::vector<float> last_q;  // [num_queries, head_dim]
  std::vector<float> k;       // [num_tokens, head_dim]
};

// What the steps and CountPairs have left for place `i` of problem().heads against the definition on the
// host: `samples` scores of each list in fp64 (the result is their largest relative error); the whole
// selection, from the scores as they are; runs and pair counts of that. Internal, naming what differs.
absl::StatusOr<double> CheckIndex(IndexSteps& steps, size_t i, const IndexCheckInput& input, int64_t samples,
                                  ThreadPool& threads);

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_INDEX_CHECK_H_
