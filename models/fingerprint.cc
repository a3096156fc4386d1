#include "models/fingerprint.h"

#include <openssl/evp.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string_view>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

namespace longfill {
namespace {

constexpr int64_t kSampleBytes = 4096;
constexpr int64_t kSamples = 16;

using Digest = std::array<unsigned char, 32>;

class Sha256 {
 public:
  Sha256() : context_(EVP_MD_CTX_new(), &EVP_MD_CTX_free) {
    ok_ = context_ != nullptr && EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1;
  }
  void Add(const void* data, size_t size) { ok_ = ok_ && EVP_DigestUpdate(context_.get(), data, size) == 1; }
  void AddSized(std::string_view text) {
    const uint64_t size = text.size();
    Add(&size, sizeof(size));
    Add(text.data(), text.size());
  }
  absl::StatusOr<Digest> Finish() {
    Digest digest;
    if (!ok_ || EVP_DigestFinal_ex(context_.get(), digest.data(), nullptr) != 1) {
      return absl::InternalError("OpenSSL could not compute SHA-256");
    }
    return digest;
  }

 private:
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
  bool ok_ = false;
};

std::string Hex(const Digest& digest) {
  return absl::BytesToHexString({reinterpret_cast<const char*>(digest.data()), digest.size()});
}

std::string ConfigText(const ModelConfig& config) {
  const RopeConfig& rope = config.rope;
  const auto number = [](double value) { return absl::StrFormat("%.17g", value); };
  const auto optional = [&](std::optional<double> value) {
    return value.has_value() ? number(*value) : "none";
  };
  const auto numbers = [](const std::vector<double>& values) {
    return absl::StrJoin(values, ",",
                         [](std::string* out, double value) { absl::StrAppendFormat(out, "%.17g", value); });
  };
  const std::pair<const char*, std::string> lines[] = {
      {"architecture", config.architecture},
      {"num_layers", absl::StrCat(config.num_layers)},
      {"hidden_size", absl::StrCat(config.hidden_size)},
      {"num_q_heads", absl::StrCat(config.num_q_heads)},
      {"num_kv_heads", absl::StrCat(config.num_kv_heads)},
      {"head_dim", absl::StrCat(config.head_dim)},
      {"intermediate_size", absl::StrCat(config.intermediate_size)},
      {"vocab_size", absl::StrCat(config.vocab_size)},
      {"rms_norm_eps", number(config.rms_norm_eps)},
      {"tie_word_embeddings", absl::StrCat(config.tie_word_embeddings)},
      {"attention_bias", absl::StrCat(config.attention_bias)},
      {"mlp_bias", absl::StrCat(config.mlp_bias)},
      {"activation", absl::StrCat(static_cast<int>(config.activation))},
      {"rope_theta", number(rope.theta)},
      {"rope_form", absl::StrCat(static_cast<int>(rope.form))},
      {"rope_rotary_dim", absl::StrCat(rope.rotary_dim)},
      {"rope_scaling", std::string(RopeScalingName(rope.scaling))},
      {"rope_factor", number(rope.factor)},
      {"rope_original_max_position_embeddings", absl::StrCat(rope.original_max_position_embeddings)},
      {"rope_low_freq_factor", number(rope.low_freq_factor)},
      {"rope_high_freq_factor", number(rope.high_freq_factor)},
      {"rope_beta_fast", number(rope.beta_fast)},
      {"rope_beta_slow", number(rope.beta_slow)},
      {"rope_attention_factor", optional(rope.attention_factor)},
      {"rope_mscale", optional(rope.mscale)},
      {"rope_mscale_all_dim", optional(rope.mscale_all_dim)},
      {"rope_truncate", absl::StrCat(rope.truncate)},
      {"rope_short_factor", numbers(rope.short_factor)},
      {"rope_long_factor", numbers(rope.long_factor)},
      {"layer_windows", absl::StrJoin(config.layer_windows, ",")},
  };
  std::string text = "longfill-model-2\n";
  for (const auto& [key, value] : lines) absl::StrAppend(&text, key, "=", value, "\n");
  if (rope.dual_chunk.chunk_size > 0) {
    absl::StrAppend(&text, "dual_chunk_size=", rope.dual_chunk.chunk_size,
                    "\ndual_chunk_local_size=", rope.dual_chunk.local_size,
                    "\ndual_chunk_original_tokens=", rope.dual_chunk_original_tokens, "\n");
  }
  return text;
}

void AddTensor(const SafetensorsTensor& tensor, Sha256& hash) {
  hash.AddSized(tensor.name);
  hash.AddSized(tensor.stored_dtype);
  hash.AddSized(absl::StrJoin(tensor.shape, ","));
  const std::string_view bytes(reinterpret_cast<const char*>(tensor.bytes.data()), tensor.bytes.size());
  const int64_t size = static_cast<int64_t>(bytes.size());
  if (size <= kSamples * kSampleBytes) {
    hash.AddSized(bytes);
    return;
  }
  for (int64_t i = 0; i < kSamples; ++i) {
    const int64_t begin = (size - kSampleBytes) / (kSamples - 1) * i;
    const int64_t place = i + 1 == kSamples ? size - kSampleBytes : begin;
    hash.AddSized(bytes.substr(static_cast<size_t>(place), kSampleBytes));
  }
}

}  // namespace

absl::StatusOr<std::string> ModelFingerprint(const ModelConfig& config, const ModelWeights& weights) {
  std::vector<const SafetensorsTensor*> tensors;
  for (const auto& file : weights.files()) {
    for (const SafetensorsTensor& tensor : file->tensors()) tensors.push_back(&tensor);
  }
  std::sort(tensors.begin(), tensors.end(),
            [](const SafetensorsTensor* a, const SafetensorsTensor* b) { return a->name < b->name; });
  Sha256 hash;
  hash.AddSized(ConfigText(config));
  for (const SafetensorsTensor* tensor : tensors) AddTensor(*tensor, hash);
  LF_ASSIGN_OR_RETURN(const Digest digest, hash.Finish());
  return Hex(digest);
}

absl::StatusOr<std::vector<std::string>> TokenHashChain(std::span<const int32_t> ids, int64_t page_tokens) {
  if (page_tokens < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("token hash page of ", page_tokens, " tokens, must be at least 1"));
  }
  std::vector<std::string> chain;
  Digest previous{};
  for (size_t begin = 0; begin < ids.size();) {
    const size_t count = std::min(ids.size() - begin, static_cast<size_t>(page_tokens));
    Sha256 hash;
    if (begin > 0) hash.Add(previous.data(), previous.size());
    hash.Add(ids.data() + begin, count * sizeof(int32_t));
    LF_ASSIGN_OR_RETURN(previous, hash.Finish());
    chain.push_back(Hex(previous));
    begin += count;
  }
  return chain;
}

}  // namespace longfill
