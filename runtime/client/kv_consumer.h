#ifndef LONGFILL_RUNTIME_CLIENT_KV_CONSUMER_H_
#define LONGFILL_RUNTIME_CLIENT_KV_CONSUMER_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/base/status.h"
#include "runtime/kv/kv_manifest.h"

namespace longfill {

// Checked keys and values of consecutive tokens of one layer: [num_heads, num_tokens, head_dim] of the
// manifest's dtype. The bytes are valid during the call only.
struct KvPageView {
  int rank = 0;
  int64_t layer = 0;
  int64_t head_begin = 0;
  int64_t num_heads = 0;
  int64_t token_begin = 0;  // position in the prompt
  int64_t row_begin = 0;    // the same token's place among the tokens that the rank owns
  int64_t num_tokens = 0;
  std::span<const std::byte> key;
  std::span<const std::byte> value;
};

// Takes a KV cache as it arrives. An error ends the transfer as aborted and, if it still runs, the prefill.
class KvConsumer {
 public:
  virtual ~KvConsumer() = default;
  // Once, before any page.
  virtual absl::Status OnManifest(const KvManifest& manifest) = 0;
  // Pages of one rank come from one thread, in order of layer, then of token, without gaps; those of
  // different ranks come from different threads at once. Blocking here slows that rank's stream only.
  virtual absl::Status OnPage(const KvPageView& page) = 0;
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_CLIENT_KV_CONSUMER_H_
