#ifndef LONGFILL_DEPLOY_CLI_ATTENTION_CHECKER_H_
#define LONGFILL_DEPLOY_CLI_ATTENTION_CHECKER_H_

// Looks at the results of an attention call: sampled rows against fp64, all rows of some heads against other
// runs and other kernels.

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "deploy/cli/attention_figures.h"
#include "kernels/api/backend.h"
#include "kernels/base/thread_pool.h"
#include "kernels/sparse/index_view.h"

namespace longfill {

// Host memory by name, kept from case to case: page-locked memory takes long to get.
class HostScratch {
 public:
  explicit HostScratch(Backend& backend) : backend_(backend) {}
  // At least `bytes`; what it held is lost when it grows.
  absl::StatusOr<void*> Get(const std::string& name, int64_t bytes);

 private:
  Backend& backend_;
  std::map<std::string, Buffer> buffers_;
};

// Inputs and results of one call, dense: head h of x is x + h * num_tokens * head_dim.
struct AttentionArrays {
  int64_t num_tokens = 0;
  int64_t head_dim = 0;
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  const void* out = nullptr;
  const float* lse = nullptr;
};

class AttentionChecker {
 public:
  // Everything outlives it.
  AttentionChecker(Backend& backend, ThreadPool& threads, HostScratch& scratch, const AttentionArrays& arrays)
      : backend_(backend), threads_(threads), scratch_(scratch), arrays_(arrays) {}

  // Compares `rows_per_head` rows of each head with their answers in fp64. indices [num_q_heads] in host
  // memory. Adds to the figures of `check`.
  absl::Status CheckRows(std::span<const IndexView> indices, int64_t rows_per_head, uint64_t seed,
                         AttentionCheck* check);

  // Heads of which all rows are compared; as many as kMaxComparedBytes hold.
  std::vector<int64_t> ComparedHeads() const;
  absl::Status KeepResults();                     // of these heads, for what follows
  absl::StatusOr<bool> ResultsAreKept();          // the same bits
  absl::StatusOr<double> LargestRowDifference();  // from the kept results, relative

 private:
  static constexpr int64_t kMaxComparedBytes = int64_t{1} << 29;

  DType dtype() const { return backend_.kernels().compute_dtype(); }
  int64_t HeadElements() const { return arrays_.num_tokens * arrays_.head_dim; }
  absl::Status CopyOut(void* to, const void* from, int64_t bytes) {
    return backend_.kernels().CopyOut(to, from, bytes, backend_.stream());
  }
  absl::StatusOr<const float*> FetchHead(const std::string& name, const void* from, int64_t head);
  absl::Status CheckKvHead(std::span<const IndexView> indices, int64_t kv_head, int64_t rows_per_head,
                           uint64_t seed, AttentionCheck* check);
  absl::StatusOr<const char*> FetchResults(const std::string& name);

  Backend& backend_;
  ThreadPool& threads_;
  HostScratch& scratch_;
  const AttentionArrays arrays_;
};

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_ATTENTION_CHECKER_H_
