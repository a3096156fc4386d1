#ifndef LONGFILL_RUNTIME_KV_KV_MANIFEST_H_
#define LONGFILL_RUNTIME_KV_KV_MANIFEST_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/base/status.h"
#include "parallel/mesh.h"
#include "runtime/kv/kv_sink.h"

namespace longfill {

// What one rank owns of a prompt's KV cache: all layers, all KV heads, these tokens.
struct KvShard {
  int rank = 0;
  std::string endpoint;                  // HOST:PORT of its KV service; empty where the KV is in files
  std::vector<TokenRange> token_ranges;  // ascending, disjoint; row r of the shard is the r-th token of these
};

// A file of a KV cache written by ranks: key and value, each [kv_heads, tokens, head_dim].
struct KvFile {
  std::string name;  // relative to the manifest
  int64_t layer_begin = 0, layer_end = 0;
  int64_t head_begin = 0, head_end = 0;
  int rank = 0;
  std::vector<TokenRange> token_ranges;
};

// Everything a consumer needs to place the pages of one prompt (design section 6). Keys are post-RoPE.
struct KvManifest {
  static constexpr int kVersion = 1;
  std::string request_id;
  std::string transfer_id;
  std::string instance_epoch;
  std::string architecture;
  std::string model_fingerprint;
  std::vector<std::string>
      token_hashes;  // hex SHA-256 chain over pages of page_tokens ids (models/fingerprint.h)
  int64_t page_tokens = kTokenBlock;
  int64_t num_tokens = 0;
  int64_t num_layers = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  // Of a model with dual chunk attention (parallel/dual_chunk.h), its chunk_len: the key of token p is
  // rotated at p mod this, and carries the scale of a prompt of num_tokens (models/rope.h). 0: it is rotated
  // at p. In the JSON only where it is not 0, so that a reader that does not know it refuses.
  int64_t rotary_chunk_tokens = 0;
  DType dtype = DType::kFloat32;
  std::string layout = "HND";   // [kv_heads, tokens, head_dim]
  std::vector<KvShard> shards;  // one for each rank
  std::vector<KvFile> files;    // batch job only

  // JSON with one key for each field; unknown keys are refused when read, so that a version difference is
  // noticed.
  std::string ToJson() const;
  static absl::StatusOr<KvManifest> FromJson(std::string_view json);
};

// The files of a batch job: kv-layer-LLL-rank-RRR.safetensors for every layer and every rank that owns
// tokens.
std::vector<KvFile> BatchFiles(const ShardPlan& plan, int64_t num_layers, int64_t num_kv_heads);
std::string KvFileName(int64_t layer, int rank);

// Writes kv-layer-LLL-rank-RRR.safetensors of this rank into `directory`, a layer at a time, each under a
// temporary name until it is whole. After an error its files are removed.
KvSinkFactory MakeKvFileSinkFactory(std::string directory);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_KV_KV_MANIFEST_H_
