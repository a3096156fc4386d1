#ifndef LONGFILL_MODELS_PATTERN_FILE_H_
#define LONGFILL_MODELS_PATTERN_FILE_H_

// Attention patterns of a whole model, and the JSON form in which MInference publishes them: a list with one
// object for each layer that maps a query-head number (a string) to [type, vertical_size, slash_size, score].
//   "vertical_and_slash"  VerticalSlash{vertical_size, slash_size}
//   "stream_llm"          AShape{n_init = vertical_size, n_local = slash_size}
//   "block_sparse"        BlockSparse{100}: its published dispatcher keeps 100 blocks whatever the sizes say
// A head that is not listed is VerticalSlash{1000, 6096}, as published.
//
// Our own form is the published one with one object more at the end of the list, which readers of the
// published form, who index the list by layer, never look at:
//   {"longfill": {
//     "version": 1,
//     "model": {"name": "Yi-9B-200K", "fingerprint": HASH},
//     "calibration": {"sha256": HASH},
//     "search": {...},
//     "score": "recall",
//     "exact": {"3": {"17": "dense"}}}}
// HASH is 64 hex digits: the fingerprint that of models/fingerprint.h, the other that of what the search was
// calibrated on. "search" has the settings of the search, in any form. Scores are recalls in [0, 1]. "exact"
// maps layer and head to a pattern, as ParseHeadPattern reads it, where the published form has no words for
// it; the list has a stand-in there: block_sparse for BlockSparse{K}, else vertical_and_slash 1000 / 6096.
// All keys are required, and no others are known but, in version 2, this one:
//     "shorter": [{"max_tokens": 65536, "layers": [...], "exact": {...}}, ...]
// Patterns for shorter prompts, each for those of at most so many tokens, ascending; longer prompts have the
// patterns of the list itself. "layers" has the published form.

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/base/status.h"
#include "kernels/sparse/head_pattern.h"

namespace longfill {

inline constexpr VerticalSlash kUnlistedHeadPattern{1000, 6096};
inline constexpr int64_t kPublishedNumBlocks = 100;
inline constexpr int64_t kMaxPatternFileBytes = int64_t{16} << 20;  // the largest published one has 0.3 MB

// Where the patterns of a file of our own form come from.
struct PatternProvenance {
  std::string model_name;          // as the search knew it; to find the file by, not to check
  std::string model_fingerprint;   // 64 hex digits
  std::string calibration_sha256;  // 64 hex digits
  std::string search_json;  // settings of the search: a JSON object, in the form that nlohmann::json dumps

  bool operator==(const PatternProvenance&) const = default;
};

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
  // Of a file with sets for shorter prompts: that of a prompt of so many tokens, which is part of this one;
  // else this one.
  const PatternSet& For(int64_t num_tokens) const;
  int64_t num_shorter() const { return static_cast<int64_t>(shorter_.size()); }
  int64_t max_tokens_of(int64_t shorter) const { return max_tokens_[shorter]; }
  const PatternSet& shorter(int64_t number) const { return shorter_[number]; }
  // For prompts of at most so many tokens, more than those of the sets before; of the same shape.
  void AddShorter(int64_t max_tokens, PatternSet patterns);
  // Of a file of our own form, whose scores are recalls; absent for the published form.
  const std::optional<PatternProvenance>& provenance() const { return provenance_; }
  void set_provenance(std::optional<PatternProvenance> provenance) { provenance_ = std::move(provenance); }

  friend bool operator==(const PatternSet& a, const PatternSet& b);

 private:
  int64_t num_layers_ = 0;
  int64_t num_heads_ = 0;
  std::vector<HeadPattern> patterns_;          // [num_layers, num_heads], each has passed Validate
  std::vector<std::optional<double>> scores_;  // [num_layers, num_heads]
  std::optional<PatternProvenance> provenance_;
  std::vector<int64_t> max_tokens_;  // of shorter_
  std::vector<PatternSet> shorter_;
};

// From either form, for a model of num_layers and num_heads query heads. InvalidArgument names `source`,
// layer, head, the value and what was expected: another number of layers, heads that the model does not have
// or that are listed twice, unknown types, sizes that are not integers >= 0, an "exact" pattern whose
// stand-in says something else, anything that is not strict JSON of these forms. Unimplemented: another
// version of ours.
absl::StatusOr<PatternSet> ParsePatterns(std::string_view json, std::string_view source, int64_t num_layers,
                                         int64_t num_heads);
// NotFound or another I/O status for a file that cannot be read, InvalidArgument above kMaxPatternFileBytes.
absl::StatusOr<PatternSet> LoadPatternFile(const std::string& path, int64_t num_layers, int64_t num_heads);

// Our form if there is provenance, else the published one. Every head is listed; without a score it is null,
// which ParsePatterns reads back. InvalidArgument for what the form cannot say: in the published one dense
// heads and block-sparse heads with another number of blocks than 100; in ours scores that are no recalls,
// and hashes or settings that are none.
absl::StatusOr<std::string> FormatPatterns(const PatternSet& patterns);
// Replaces `path` as a whole or leaves it as it was.
absl::Status WritePatternFile(const PatternSet& patterns, const std::string& path);

}  // namespace longfill

#endif  // LONGFILL_MODELS_PATTERN_FILE_H_
