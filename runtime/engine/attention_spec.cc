#include "runtime/engine/attention_spec.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "models/json_input.h"

namespace longfill {
namespace {

constexpr std::string_view kAuto = "auto";

// Says so in `resolved` where a window cuts patterns.
void ApplyWindows(const ModelConfig& config, int64_t num_tokens, ResolvedAttention& resolved) {
  int64_t layers = 0;
  int64_t widest = 0;
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    const int64_t window = config.WindowOf(layer);
    if (window == 0 || window >= num_tokens) continue;
    ++layers;
    widest = std::max(widest, window);
    for (int64_t head = 0; head < config.num_q_heads; ++head) {
      const HeadPattern bounded = BoundByWindow(resolved.patterns.at(layer, head), window, num_tokens);
      resolved.patterns.Set(layer, head, bounded, resolved.patterns.score(layer, head));
    }
  }
  if (layers > 0) absl::StrAppend(&resolved.resolved, ", windows of ", widest, " in ", layers, " layers");
}

// Says so in `resolved`, and refuses what dual chunk attention does not have.
absl::Status ApplyDualChunks(const ModelConfig& config, int64_t num_tokens, ResolvedAttention& resolved) {
  const DualChunk& dual_chunk = config.rope.dual_chunk;
  if (!dual_chunk.Splits(num_tokens)) return absl::OkStatus();
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    LF_RETURN_IF_ERROR(CheckDualChunkPatterns(resolved.patterns.layer(layer), Coverage::kTiles));
  }
  absl::StrAppend(&resolved.resolved, ", in dual chunks of ", dual_chunk.chunk_len());
  return absl::OkStatus();
}

absl::StatusOr<ResolvedAttention> Resolve(AttentionSpec spec, std::string_view why, int64_t num_tokens,
                                          const ModelConfig& config) {
  ResolvedAttention resolved;
  std::string of_length;
  if (spec.pattern_json.empty()) {
    LF_ASSIGN_OR_RETURN(const HeadPattern pattern, ParseHeadPattern(spec.text));
    resolved.patterns = PatternSet::Uniform(pattern, config.num_layers, config.num_q_heads);
  } else {
    LF_ASSIGN_OR_RETURN(const PatternSet all,
                        ParsePatterns(spec.pattern_json, spec.text, config.num_layers, config.num_q_heads));
    resolved.patterns = all.For(num_tokens);
    for (int64_t i = 0; i < all.num_shorter() && of_length.empty(); ++i) {
      if (num_tokens <= all.max_tokens_of(i)) {
        of_length = absl::StrCat(", for up to ", all.max_tokens_of(i), " tokens");
      }
    }
  }
  resolved.resolved = absl::StrCat(spec.text, std::string(why), of_length);
  ApplyWindows(config, num_tokens, resolved);
  LF_RETURN_IF_ERROR(ApplyDualChunks(config, num_tokens, resolved));
  resolved.spec = std::move(spec);
  return resolved;
}

// What "auto" means for prompts that are not dense.
AttentionSpec LongPromptSpec(const AttentionDefaults& defaults, const ModelConfig& config) {
  if (defaults.patterns.has_value()) return *defaults.patterns;
  if (defaults.model_patterns.has_value()) return *defaults.model_patterns;
  const bool dual_chunks = config.rope.dual_chunk.chunk_size > 0;
  if (dual_chunks) return {.text = ToString(kUnlistedHeadPattern)};
  return {.text = ToString(kAutoPattern), .dense_without_room = true};
}

}  // namespace

absl::StatusOr<std::optional<AttentionSpec>> ReadModelPatterns(const std::string& model_dir) {
  const std::string path = model_dir + "/patterns.json";
  if (!std::filesystem::exists(path)) return std::nullopt;
  LF_ASSIGN_OR_RETURN(AttentionSpec spec, ReadAttentionSpec(path));
  return spec;
}

absl::StatusOr<AttentionSpec> ReadAttentionSpec(std::string_view text) {
  AttentionSpec spec;
  spec.text = text;
  if (text == kAuto) return spec;
  const absl::StatusOr<HeadPattern> pattern = ParseHeadPattern(text);
  if (pattern.ok()) return spec;
  absl::StatusOr<std::string> json = ReadSmallFile(spec.text, kMaxPatternFileBytes);
  if (json.ok()) {
    spec.pattern_json = *std::move(json);
    if (spec.pattern_json.empty()) {
      return absl::InvalidArgumentError(absl::StrCat("pattern file ", spec.text, " is empty"));
    }
    return spec;
  }
  if (!absl::IsNotFound(json.status())) return json.status();
  if (text.find(':') != std::string_view::npos) return pattern.status();  // meant as a pattern
  return absl::InvalidArgumentError(absl::StrCat("attention \"", spec.text, "\" is neither a pattern (",
                                                 pattern.status().message(), ") nor a pattern file"));
}

std::string DescribeAuto(const AttentionDefaults& defaults, const ModelConfig& config) {
  return absl::StrCat("dense below ", defaults.dense_below, " tokens, else ",
                      LongPromptSpec(defaults, config).text);
}

absl::StatusOr<ResolvedAttention> ResolveAttention(const AttentionSpec& spec,
                                                   const AttentionDefaults& defaults, int64_t num_tokens,
                                                   const ModelConfig& config) {
  if (spec.text != kAuto) return Resolve(spec, "", num_tokens, config);
  if (num_tokens < defaults.dense_below) {
    return Resolve({.text = "dense"},
                   absl::StrCat(" (auto: ", num_tokens, " tokens < ", defaults.dense_below, ")"), num_tokens,
                   config);
  }
  return Resolve(LongPromptSpec(defaults, config), " (auto)", num_tokens, config);
}

}  // namespace longfill
