#ifndef LONGFILL_RUNTIME_ENGINE_ATTENTION_SPEC_H_
#define LONGFILL_RUNTIME_ENGINE_ATTENTION_SPEC_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "kernels/base/status.h"
#include "models/config.h"
#include "models/pattern_file.h"

namespace longfill {

// What a request asks for: "auto", one pattern for all heads ("dense", "a-shape:128,1024", ...), or the text
// of a pattern file. A value, sent to every rank; reads no file.
struct AttentionSpec {
  std::string text =
      "auto";  // "auto", a uniform pattern, or the name of the pattern file that `pattern_json` came from
  std::string pattern_json;  // contents of a pattern file in the published form; empty: none
  // Block-share heads of a layer whose lists have no room (ShareSelector::HadNoRoom) see all keys there, and
  // PrefillFigures says how many; otherwise the prompt fails. Of what nobody asked for by name.
  bool dense_without_room = false;
};

// What "auto" gives all heads of long prompts without a pattern file: right for questions anywhere in the
// prompt and for weight that is spread thinly (models/SELECTION.md). Dual chunk attention has no block-share:
// models with it get kUnlistedHeadPattern.
inline constexpr BlockShare kAutoPattern{.outliers = 8, .min_share = 0.01, .samples = 8, .fp8 = true};

// Parses a command-line SPEC: "auto" and uniform patterns as they are, anything else as the path of a pattern
// file, which is read here. InvalidArgument for neither, naming the text.
absl::StatusOr<AttentionSpec> ReadAttentionSpec(std::string_view text);

// patterns.json of a model directory, if there is one.
absl::StatusOr<std::optional<AttentionSpec>> ReadModelPatterns(const std::string& model_dir);

// "auto" is resolved by length and by what the engine was given (prefill_engine.h); `resolved` says by what.
struct ResolvedAttention {
  AttentionSpec spec;    // never "auto"
  PatternSet patterns;   // one pattern for each layer and query head
  std::string resolved;  // for example "dense (auto: 4096 tokens < 32768)", "block-share:8,0.01,8,fp8
                         // (auto)", "dense, windows of 4096 in 32 layers"
};

struct AttentionDefaults {
  int64_t dense_below = 32768;
  std::optional<AttentionSpec> patterns;        // --patterns, already read
  std::optional<AttentionSpec> model_patterns;  // patterns.json of the model directory, already read
};

// What "auto" becomes for a model under these defaults, in words: "dense below 32768 tokens, else
// block-share:8,0.01,8,fp8".
std::string DescribeAuto(const AttentionDefaults& defaults, const ModelConfig& config);

// For a prompt of num_tokens on a model; in layers with a sliding window the patterns are what BoundByWindow
// makes of them.
absl::StatusOr<ResolvedAttention> ResolveAttention(const AttentionSpec& spec,
                                                   const AttentionDefaults& defaults, int64_t num_tokens,
                                                   const ModelConfig& config);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_ENGINE_ATTENTION_SPEC_H_
