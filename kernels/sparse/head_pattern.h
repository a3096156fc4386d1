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

// The key blocks to which some row of a 64-row query block gives a share of at least min_share (tau). A key
// block of 64 keys is represented by its mean and by the `outliers` (R) keys farthest from that mean; its
// score for a row is the largest scaled product of the row's query with them, and the softmax of a row's
// scores over the blocks that lie wholly before it are their shares. Block 0 and the nearest 4 blocks, the
// diagonal one included, are forced. Every row votes and nothing is ranked, so lists have any length and
// questions anywhere in the prompt are served alike.
//
// With `samples` (S) shares estimate what part of a row's softmax a block has, so that weight which is spread
// thinly counts as well. In place of the mean stand S keys of the block, number 64 (i + 1/2) / S of it for i
// < S; ln(64 / S) is added to the products with them, since each stands for so many keys, and not to those
// with outliers, which are still the farthest from the mean; and the keys of the row's own block, up to its
// own, are in its softmax, each by its own product.
//
// With `coarse` (C) there are two levels, for prompts so long that scores of all blocks take longer than the
// attention that they leave. A coarse block is kCoarseBlocks key blocks; it is represented by the mean of
// their means, or by S of their 8 S samples (CoarseSample), and by C of their representatives, each the one
// that is farthest from all of these before it. Scores of coarse blocks and the softmax over those that lie
// wholly before the row's block are as for key blocks, own keys included where there are samples; a sample
// stands for 512 / S keys here. A coarse block is open to a 64-row query block if some row gives it a
// share of at least kOpenFactor * tau, and so are the key blocks behind the last coarse block that is wholly
// before. Only blocks that are open have scores, and a share is exp(score) over the larger of the two levels'
// sums, which run over open blocks and over all coarse blocks.
//
// With `fp8` both factors of every product of queries and keys are rounded to 8 bits first, E4M3 of the OCP
// specification (sign, 4 bits of exponent, 3 of mantissa; to nearest even, subnormals kept). A power of two
// brings the largest element into [128, 256) before, and is taken out of the product: one for the queries of
// a row block, one for what represents a block, one for the keys of a row block. None is above
// 2^kMostFp8Power, so that elements below 2^-40 count for little and zeros have one. What is infinite or no
// number has no rounding that backends share.
struct BlockShare {
  int64_t outliers = 0;
  double min_share = 0;
  int64_t samples = 0;  // 0: the mean; else a power of two
  int64_t coarse = 0;   // 0: one level
  bool fp8 = false;     // scores
  friend bool operator==(const BlockShare&, const BlockShare&) = default;
};
// Together with samples: more than a quarter of a block is as dear as attention itself.
inline constexpr int64_t kMaxOutliers = 16;
inline constexpr double kLeastShare = 1e-30;        // min_share is fp32 in kernels
inline constexpr int64_t kForcedNearestBlocks = 4;  // of BlockShare
inline constexpr int64_t kCoarseBlocks = 8;         // key blocks of a coarse block
inline constexpr double kOpenFactor = 0.5;
inline constexpr int kMostFp8Power = 47;
// Of a key block.
constexpr int64_t NumRepresentatives(int64_t samples, int64_t outliers) {
  return (samples == 0 ? 1 : samples) + outliers;
}
// The key of a block that is its sample number i.
constexpr int64_t SampledKey(int64_t samples, int64_t i) { return 64 / samples * i + 32 / samples; }
// Of a coarse block: its sample number i is sample `sample` of its key block number `block`, the (8 i + 4)-th
// of all samples of its blocks, block after block.
struct CoarseSample {
  constexpr CoarseSample(int64_t samples, int64_t i)
      : block((kCoarseBlocks * i + kCoarseBlocks / 2) / samples),
        sample((kCoarseBlocks * i + kCoarseBlocks / 2) % samples) {}
  int64_t block;
  int64_t sample;
};

using HeadPattern = std::variant<Dense, AShape, VerticalSlash, BlockSparse, BlockShare>;

// InvalidArgument naming the field and value: negative budgets, n_local < 1, vertical + slash < 1, num_blocks
// < 1, outliers and samples above kMaxOutliers, samples that are no power of two, coarse and
// samples above kMaxOutliers, min_share not in [kLeastShare, 1].
absl::Status Validate(const HeadPattern& pattern);

// What a head with this pattern computes in a layer whose queries see the `window` keys up to their own alone
// (0: all before them): nothing outside of the window, which is exact. The pattern itself where the window
// holds the prompt; the nearest min(n_local, window) distances for an A-shape without sink; for every other
// pattern the whole window, as AShape{0, window}, which is at least what the pattern selects inside of it.
HeadPattern BoundByWindow(const HeadPattern& pattern, int64_t window, int64_t num_tokens);

// "dense", "a-shape:N_INIT,N_LOCAL", "vertical-slash:V,S", "block-sparse:K", "block-share:R,TAU",
// "block-share:R,TAU,S" or "block-share:R,TAU,S,C" (TAU a decimal number), these of block-share also with
// ",fp8" behind them; the result has passed Validate.
absl::StatusOr<HeadPattern> ParseHeadPattern(std::string_view text);
std::string ToString(const HeadPattern& pattern);  // inverse of ParseHeadPattern

// Which pairs a selection covers (kernels/sparse/coverage.h).
enum class Coverage : uint8_t {
  kTiles,  // ours: whole 64-key pieces over the windows of the selected distances, the same in all row blocks
  kParity,  // exactly what the public MInference kernels cover
};
absl::StatusOr<Coverage> ParseCoverage(std::string_view text);  // "tiles" or "parity"
std::string_view CoverageName(Coverage coverage);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_SPARSE_HEAD_PATTERN_H_
