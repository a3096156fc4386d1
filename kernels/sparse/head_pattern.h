#ifndef LONGFILL_KERNELS_SPARSE_HEAD_PATTERN_H_
#define LONGFILL_KERNELS_SPARSE_HEAD_PATTERN_H_

// Which part of the causal attention matrix a query head computes. d below is the distance, query minus key
// position.

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>

#include "kernels/base/status.h"

namespace longfill {

struct Dense {
  friend bool operator==(const Dense&, const Dense&) = default;
};

// Exactly the pairs with key < n_init or 0 <= d < n_local (arXiv 2407.02490, "A-shape"; MInference
// "stream_llm").
struct AShape {
  int64_t n_init = 0;
  int64_t n_local = 0;
  friend bool operator==(const AShape&, const AShape&) = default;
};

// The `vertical` keys and `slash` distances with the largest attention mass from the last 64 queries.
// Clamped at run time to max(vertical, 30) keys and max(slash, 50) distances, both to the length; the first
// 30 keys and the nearest 100 distances are forced and count within; d = 0 is always kept.
struct VerticalSlash {
  int64_t vertical = 0;
  int64_t slash = 0;
  friend bool operator==(const VerticalSlash&, const VerticalSlash&) = default;
};

// For each 64-row query block the `num_blocks` 64-wide key blocks with the largest product of mean query and
// mean key. The diagonal block and block 0 are forced and count within (not in parity coverage).
struct BlockSparse {
  int64_t num_blocks = 0;
  friend bool operator==(const BlockSparse&, const BlockSparse&) = default;
};

using HeadPattern = std::variant<Dense, AShape, VerticalSlash, BlockSparse>;

// InvalidArgument naming the field and value: negative budgets, n_local < 1, vertical + slash < 1, num_blocks
// < 1.
absl::Status Validate(const HeadPattern& pattern);

// "dense", "a-shape:N_INIT,N_LOCAL", "vertical-slash:V,S", "block-sparse:K"; the result has passed Validate.
absl::StatusOr<HeadPattern> ParseHeadPattern(std::string_view text);
std::string ToString(const HeadPattern& pattern);  // inverse of ParseHeadPattern

// Which pairs a selection covers (kernels/sparse/coverage.h).
enum class Coverage : uint8_t {
  kTiles,   // ours: the union, per 64-row block, of the 64-key windows of the selected distances
  kParity,  // exactly what the public MInference kernels cover
};
absl::StatusOr<Coverage> ParseCoverage(std::string_view text);  // "tiles" or "parity"
std::string_view CoverageName(Coverage coverage);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_SPARSE_HEAD_PATTERN_H_
