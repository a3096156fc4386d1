#include "models/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

#include "absl/strings/str_cat.h"

namespace longfill {
namespace {

// The formulas are those of transformers' modeling_rope_utils.py (5.0), which follow
//   linear  https://www.reddit.com/r/LocalLLaMA/comments/14fgjqj (kaiokendev),
//   longrope  arXiv 2402.13753; the scale of cos and sin as Phi-3 has it,
//   llama3  the Llama 3.1 release, section on long context in arXiv 2407.21783,
//   yarn    arXiv 2309.00071, sections 3.2 and 3.4; mscale and mscale_all_dim from DeepSeek-V2 (arXiv
//   2405.04434).

constexpr double kTwoPi = 2.0 * std::numbers::pi;

absl::Status CheckAtLeast(const char* key, double value, double least) {
  if (std::isfinite(value) && value >= least) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("rope ", key, " ", value, " must be finite and at least ", least));
}

absl::Status CheckPositive(const char* key, double value) {
  if (std::isfinite(value) && value > 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("rope ", key, " ", value, " must be finite and above 0"));
}

absl::Status CheckLongRope(const RopeConfig& rope) {
  LF_RETURN_IF_ERROR(CheckPositive("factor", rope.factor));
  // Its logarithm divides that of the factor.
  LF_RETURN_IF_ERROR(CheckAtLeast("original_max_position_embeddings",
                                  static_cast<double>(rope.original_max_position_embeddings), 2.0));
  if (rope.attention_factor.has_value()) {
    LF_RETURN_IF_ERROR(CheckPositive("attention_factor", *rope.attention_factor));
  }
  for (const auto& [name, factors] :
       {std::pair("short_factor", &rope.short_factor), std::pair("long_factor", &rope.long_factor)}) {
    if (static_cast<int64_t>(factors->size()) != rope.rotary_dim / 2) {
      return absl::InvalidArgumentError(
          absl::StrCat("rope ", name, " has ", factors->size(),
                       " numbers, must have rotary_dim / 2 = ", rope.rotary_dim / 2));
    }
    for (const double factor : *factors) LF_RETURN_IF_ERROR(CheckPositive(name, factor));
  }
  return absl::OkStatus();
}

absl::Status Check(const RopeConfig& rope, int64_t num_tokens) {
  if (num_tokens < 0)
    return absl::InvalidArgumentError(absl::StrCat("rope num_tokens ", num_tokens, " is negative"));
  if (rope.rotary_dim < 2 || rope.rotary_dim % 2 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("rope rotary_dim ", rope.rotary_dim, " must be even and positive"));
  }
  if (!std::isfinite(rope.theta) || rope.theta <= 1) {
    return absl::InvalidArgumentError(absl::StrCat("rope theta ", rope.theta, " must be finite and above 1"));
  }
  if (rope.scaling == RopeScaling::kNone) return absl::OkStatus();
  if (rope.scaling == RopeScaling::kLongRope) return CheckLongRope(rope);
  LF_RETURN_IF_ERROR(CheckAtLeast("factor", rope.factor, 1.0));
  if (rope.scaling == RopeScaling::kLinear) return absl::OkStatus();
  LF_RETURN_IF_ERROR(CheckAtLeast("original_max_position_embeddings",
                                  static_cast<double>(rope.original_max_position_embeddings), 1.0));
  if (rope.scaling == RopeScaling::kLlama3) {
    LF_RETURN_IF_ERROR(CheckPositive("low_freq_factor", rope.low_freq_factor));
    if (!std::isfinite(rope.high_freq_factor) || rope.high_freq_factor <= rope.low_freq_factor) {
      return absl::InvalidArgumentError(absl::StrCat("rope high_freq_factor ", rope.high_freq_factor,
                                                     " must be above low_freq_factor ",
                                                     rope.low_freq_factor));
    }
    return absl::OkStatus();
  }
  LF_RETURN_IF_ERROR(CheckPositive("beta_slow", rope.beta_slow));
  if (!std::isfinite(rope.beta_fast) || rope.beta_fast < rope.beta_slow) {
    return absl::InvalidArgumentError(
        absl::StrCat("rope beta_fast ", rope.beta_fast, " must be at least beta_slow ", rope.beta_slow));
  }
  if (rope.attention_factor.has_value()) {
    LF_RETURN_IF_ERROR(CheckPositive("attention_factor", *rope.attention_factor));
  }
  LF_RETURN_IF_ERROR(CheckAtLeast("mscale", rope.mscale.value_or(0.0), 0.0));
  return CheckAtLeast("mscale_all_dim", rope.mscale_all_dim.value_or(0.0), 0.0);
}

// Wavelengths that the original context holds high_freq_factor times stay, those that it holds less than
// low_freq_factor times are divided, between them a linear blend.
double Llama3Frequency(const RopeConfig& rope, double frequency) {
  const double original = static_cast<double>(rope.original_max_position_embeddings);
  const double turns = original * frequency / kTwoPi;
  if (turns > rope.high_freq_factor) return frequency;
  if (turns < rope.low_freq_factor) return frequency / rope.factor;
  const double smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
  return (1.0 - smooth) * frequency / rope.factor + smooth * frequency;
}

// The (fractional) pair of dimensions that makes `turns` turns over the original context.
double YarnCorrectionDim(const RopeConfig& rope, double turns) {
  const double original = static_cast<double>(rope.original_max_position_embeddings);
  return static_cast<double>(rope.rotary_dim) * std::log(original / (turns * kTwoPi)) /
         (2.0 * std::log(rope.theta));
}

void ScaleYarn(const RopeConfig& rope, std::vector<double>& inv_freq) {
  double low = YarnCorrectionDim(rope, rope.beta_fast);
  double high = YarnCorrectionDim(rope, rope.beta_slow);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, static_cast<double>(rope.rotary_dim - 1));
  if (low == high) high += 0.001;
  for (size_t i = 0; i < inv_freq.size(); ++i) {
    const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    inv_freq[i] = inv_freq[i] / rope.factor * ramp + inv_freq[i] * (1.0 - ramp);
  }
}

// Factors count as fp32 numbers, as transformers holds them.
void ScaleLongRope(const RopeConfig& rope, int64_t num_tokens, std::vector<double>& inv_freq) {
  const std::vector<double>& factors =
      num_tokens > rope.original_max_position_embeddings ? rope.long_factor : rope.short_factor;
  for (size_t i = 0; i < inv_freq.size(); ++i) {
    inv_freq[i] /= static_cast<double>(static_cast<float>(factors[i]));
  }
}

double LongRopeAttentionScale(const RopeConfig& rope) {
  if (rope.attention_factor.has_value()) return *rope.attention_factor;
  if (rope.factor <= 1.0) return 1.0;
  return std::sqrt(1.0 + std::log(rope.factor) /
                             std::log(static_cast<double>(rope.original_max_position_embeddings)));
}

double YarnMscale(double factor, double mscale) {
  return factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

double YarnAttentionScale(const RopeConfig& rope) {
  if (rope.attention_factor.has_value()) return *rope.attention_factor;
  const double mscale = rope.mscale.value_or(0.0);
  const double mscale_all_dim = rope.mscale_all_dim.value_or(0.0);
  if (mscale != 0.0 && mscale_all_dim != 0.0) {
    return YarnMscale(rope.factor, mscale) / YarnMscale(rope.factor, mscale_all_dim);
  }
  return YarnMscale(rope.factor, 1.0);
}

// Its square multiplies scores: arXiv 2501.15383, "attention scaling", after YaRN.
double DualChunkScale(const RopeConfig& rope, int64_t num_tokens) {
  if (rope.dual_chunk_original_tokens == 0) return 1.0;
  return YarnMscale(static_cast<double>(num_tokens) / static_cast<double>(rope.dual_chunk_original_tokens),
                    1.0);
}

}  // namespace

absl::StatusOr<RotaryTable> BuildRotaryTable(const RopeConfig& rope, int64_t num_tokens) {
  LF_RETURN_IF_ERROR(Check(rope, num_tokens));
  RotaryTable table;
  table.inv_freq.resize(static_cast<size_t>(rope.rotary_dim / 2));
  for (size_t i = 0; i < table.inv_freq.size(); ++i) {
    const double exponent = 2.0 * static_cast<double>(i) / static_cast<double>(rope.rotary_dim);
    table.inv_freq[i] = std::pow(rope.theta, -exponent);
  }
  switch (rope.scaling) {
    case RopeScaling::kNone:
      break;
    case RopeScaling::kLinear:
      for (double& frequency : table.inv_freq) frequency /= rope.factor;
      break;
    case RopeScaling::kLlama3:
      for (double& frequency : table.inv_freq) frequency = Llama3Frequency(rope, frequency);
      break;
    case RopeScaling::kYarn:
      ScaleYarn(rope, table.inv_freq);
      table.attention_scale = static_cast<float>(YarnAttentionScale(rope));
      break;
    case RopeScaling::kLongRope:
      ScaleLongRope(rope, num_tokens, table.inv_freq);
      table.attention_scale = static_cast<float>(LongRopeAttentionScale(rope));
      break;
  }
  table.attention_scale *= static_cast<float>(DualChunkScale(rope, num_tokens));
  for (double& frequency : table.inv_freq) frequency = static_cast<double>(static_cast<float>(frequency));
  return table;
}

}  // namespace longfill
