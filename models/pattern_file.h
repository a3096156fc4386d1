#ifndef LONGFILL_MODELS_PATTERN_FILE_H_
#define LONGFILL_MODELS_PATTERN_FILE_H_

// Attention patterns of a whole model, and the JSON form in which MInference publishes them: a list with one
// object for each layer that maps a query-head number (a string) to [type, vertical_size, slash_size, score].
//   "vertical_and_slash"  VerticalSlash{vertical_size, slash_size}
//   "stream_llm"          AShape{n_init = vertical_size, n_local = slash_size}
//   "block_sparse"        BlockSparse{100}: its published dispatcher keeps 100 blocks whatever the sizes say
// A head that is not listed is VerticalSlash{1000, 6096}, as published.

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/status.h"
#include "kernels/sparse/head_pattern.h"

namespace longfill {

inline constexpr VerticalSlash kUnlistedHeadPattern{1000, 6096};
inline constexpr int64_t kPublishedNumBlocks = 100;
inline constexpr int64_t kMaxPatternFileBytes = int64_t{16} << 20;  // the largest published one has 0.3 MB

// One pattern for each (layer, query head), and the score that a pattern search gave it: a recall (about 0.3
// to 1) or a count of differing elements, as the file has it. A value.
class PatternSet {
 public:
  PatternSet() = default;
  static PatternSet Uniform(const HeadPattern& pattern, int64_t num_layers, int64_t num_heads);

  int64_t num_layers() const { return num_layers_; }
  int64_t num_heads() const { return num_heads_; }
  std::span<const HeadPattern> layer(int64_t layer) const {
    return std::span(patterns_).subspan(layer * num_heads_, num_heads_);
  }
  const HeadPattern& at(int64_t layer, int64_t head) const { return patterns_[layer * num_heads_ + head]; }
  std::optional<double> score(int64_t layer, int64_t head) const {
    return scores_[layer * num_heads_ + head];
  }
  void Set(int64_t layer, int64_t head, const HeadPattern& pattern,
           std::optional<double> score = std::nullopt);

  friend bool operator==(const PatternSet&, const PatternSet&) = default;

 private:
  int64_t num_layers_ = 0;
  int64_t num_heads_ = 0;
  std::vector<HeadPattern> patterns_;          // [num_layers, num_heads], each has passed Validate
  std::vector<std::optional<double>> scores_;  // [num_layers, num_heads]
};

// From the published form, for a model of num_layers and num_heads query heads. InvalidArgument names
// `source`, layer, head, the value and what was expected: another number of layers, heads that the model does
// not have or that are listed twice, unknown types, sizes that are not integers >= 0, anything that is not
// strict JSON of this form.
absl::StatusOr<PatternSet> ParsePatterns(std::string_view json, std::string_view source, int64_t num_layers,
                                         int64_t num_heads);
// NotFound or another I/O status for a file that cannot be read, InvalidArgument above kMaxPatternFileBytes.
absl::StatusOr<PatternSet> LoadPatternFile(const std::string& path, int64_t num_layers, int64_t num_heads);

// Every head is listed; without a score it is null, which ParsePatterns reads back. InvalidArgument for what
// the form cannot say: dense heads, and block-sparse heads with another number of blocks than 100.
absl::StatusOr<std::string> FormatPatterns(const PatternSet& patterns);
// Replaces `path` as a whole or leaves it as it was.
absl::Status WritePatternFile(const PatternSet& patterns, const std::string& path);

}  // namespace longfill

#endif  // LONGFILL_MODELS_PATTERN_FILE_H_
