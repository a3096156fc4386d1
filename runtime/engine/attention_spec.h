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
};

// Parses a command-line SPEC: "auto" and uniform patterns as they are, anything else as the path of a pattern
// file, which is read here. InvalidArgument for neither, naming the text.
absl::StatusOr<AttentionSpec> ReadAttentionSpec(std::string_view text);

// patterns.json of a model directory, if there is one.
absl::StatusOr<std::optional<AttentionSpec>> ReadModelPatterns(const std::string& model_dir);

// "auto" is resolved by length and by what the engine was given (prefill_engine.h); `resolved` says by what.
struct ResolvedAttention {
  AttentionSpec spec;    // never "auto"
  PatternSet patterns;   // one pattern for each layer and query head
  std::string resolved;  // for example "dense (auto: 4096 tokens < 32768)", "vertical-slash:1000,6096
                         // (auto)", "dense, windows of 4096 in 32 layers"
};

struct AttentionDefaults {
  int64_t dense_below = 32768;
  std::optional<AttentionSpec> patterns;        // --patterns, already read
  std::optional<AttentionSpec> model_patterns;  // patterns.json of the model directory, already read
};

// What "auto" becomes under these defaults, in words: "dense below 32768 tokens, else
// vertical-slash:1000,6096".
std::string DescribeAuto(const AttentionDefaults& defaults);

// For a prompt of num_tokens on a model; in layers with a sliding window the patterns are what BoundByWindow
// makes of them.
absl::StatusOr<ResolvedAttention> ResolveAttention(const AttentionSpec& spec,
                                                   const AttentionDefaults& defaults, int64_t num_tokens,
                                                   const ModelConfig& config);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_ENGINE_ATTENTION_SPEC_H_
