// prefill_over_grpc HOST:PORT: sends a prompt to a service, takes its KV cache as it is computed, prints the
// greedy next token. The example of README.md.

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <numeric>
#include <vector>

#include "runtime/client/prefill_client.h"

namespace {

// Pages come checked, from one thread for each rank.
class CountingConsumer : public longfill::KvConsumer {
 public:
  absl::Status OnManifest(const longfill::KvManifest& manifest) override {
    std::printf("%lld layers from %zu ranks\n", static_cast<long long>(manifest.num_layers),
                manifest.shards.size());
    return absl::OkStatus();
  }
  absl::Status OnPage(const longfill::KvPageView& page) override {
    rows += page.num_tokens;
    return absl::OkStatus();
  }
  std::atomic<int64_t> rows{0};
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const auto client = longfill::PrefillClient::Connect(argv[1]);
  if (!client.ok()) {
    std::fprintf(stderr, "%s\n", client.status().ToString().c_str());
    return 1;
  }
  std::vector<int32_t> ids(90);
  std::iota(ids.begin(), ids.end(), 1);
  longfill::SubmitOptions options;
  options.attention.text = "dense";
  CountingConsumer consumer;
  const auto prefilled = (*client)->Prefill(ids, options, &consumer);
  if (!prefilled.ok()) {
    std::fprintf(stderr, "%s\n", prefilled.status().ToString().c_str());
    return 1;
  }
  const auto best =
      std::max_element(prefilled->logits.begin(), prefilled->logits.end()) - prefilled->logits.begin();
  std::printf("next token %td, KV rows %lld\n", best, static_cast<long long>(consumer.rows.load()));
  return 0;
}
