#ifndef LONGFILL_MODELS_FINGERPRINT_H_
#define LONGFILL_MODELS_FINGERPRINT_H_

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "kernels/base/status.h"
#include "models/config.h"
#include "models/weights.h"

namespace longfill {

inline constexpr int64_t kTokenHashPage = 128;

// 64 hex digits that say which model made a KV cache: SHA-256 over, each preceded by its length,
//  1. the text "longfill-model-2" and one "key=value" line for every field of the config that decides K and V
//     (architecture, all widths and counts, rms_norm_eps, activation, biases, tying, windows, every
//     field of RopeConfig, those of dual chunks where it has them; not max_position_embeddings, dtype of
//     config.json or anything of the tokenizer);
//  2. every stored tensor in name order: name, dtype, shape and a content sample, which is its first 4096
//  bytes, its
//     last 4096 and 4096-byte samples at 14 even steps between (all bytes of a tensor of up to 65536);
// How a checkpoint is cut into shards, shard names and header padding do not count. A file of 100 GB is
// fingerprinted by reading some tens of MB. Weights that differ only in bytes that are not sampled have the
// same fingerprint: it tells models apart, it does not prove integrity.
absl::StatusOr<std::string> ModelFingerprint(const ModelConfig& config, const ModelWeights& weights);

// One hash of 64 hex digits a page: hash_i = SHA-256(hash_{i-1} as 32 bytes || ids of page i as little-endian
// int32), with no bytes for hash_{-1}. The last page may be short. Two prompts share a prefix of whole pages
// exactly when their hashes are equal up to there. No ids, no hashes. InvalidArgument: page_tokens < 1.
absl::StatusOr<std::vector<std::string>> TokenHashChain(std::span<const int32_t> ids,
                                                        int64_t page_tokens = kTokenHashPage);

}  // namespace longfill

#endif  // LONGFILL_MODELS_FINGERPRINT_H_
