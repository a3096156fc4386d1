// prefill_in_process MODEL_DIR NUM_RANKS: prefills a prompt with ranks as threads of this process, prints the
// greedy next token and how many KV rows arrived. The example of README.md.

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "parallel/communicator.h"
#include "runtime/engine/prefill_engine.h"

namespace {

std::atomic<int64_t> rows_received{0};

// Takes the KV cache of one rank and one prompt as it is computed, layer by layer.
class CountingSink : public longfill::KvSink {
 public:
  absl::Status Append(int64_t /*layer*/, int64_t row_begin, int64_t row_end,
                      longfill::HeadsView<const void> /*key*/, longfill::HeadsView<const void> /*value*/,
                      longfill::DType /*dtype*/) override {
    rows_received += row_end - row_begin;
    return absl::OkStatus();
  }
  absl::Status Finish(const absl::Status& /*outcome*/) override { return absl::OkStatus(); }
};

absl::StatusOr<std::unique_ptr<longfill::KvSink>> MakeSink(const longfill::KvTransferSpec& /*spec*/) {
  return std::make_unique<CountingSink>();
}

absl::Status RunRank(const longfill::EngineOptions& options, longfill::Communicator& world) {
  auto engine = longfill::PrefillEngine::Create(options, world);
  if (!engine.ok()) return engine.status();
  if (world.rank() != 0) {
    return (*engine)->Serve(
        MakeSink, [] { return absl::OkStatus(); }, [](const absl::Status&) {});
  }
  longfill::PrefillRequest request;
  request.request_id = "example";
  request.transfer_id = "example";
  for (int i = 0; i < 300; ++i)
    request.token_ids.push_back(i % static_cast<int>((*engine)->config().vocab_size));
  const auto result = (*engine)->Prefill(request, MakeSink, {});
  if (result.ok()) {
    const auto best = std::max_element(result->logits.begin(), result->logits.end()) - result->logits.begin();
    std::printf("next token %td, density %.3f, layers %lld\n", best, result->figures.density,
                static_cast<long long>((*engine)->config().num_layers));
  }
  const absl::Status shutdown = (*engine)->Shutdown();
  return result.ok() ? shutdown : result.status();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const int num_ranks = std::atoi(argv[2]);
  longfill::EngineOptions options;
  options.model_dir = argv[1];
  options.mesh = {num_ranks, 1};
  options.device.ranks_on_host = num_ranks;
  auto world = longfill::CreateInProcessCommunicators(num_ranks, {});
  std::vector<absl::Status> outcome(world.size());
  std::vector<std::thread> ranks;
  for (size_t rank = 0; rank < world.size(); ++rank) {
    ranks.emplace_back([&, rank] { outcome[rank] = RunRank(options, *world[rank]); });
  }
  for (std::thread& rank : ranks) rank.join();
  for (const absl::Status& status : outcome) {
    if (!status.ok()) {
      std::fprintf(stderr, "%s\n", status.ToString().c_str());
      return 1;
    }
  }
  std::printf("KV rows %lld\n", static_cast<long long>(rows_received.load()));
  return 0;
}
