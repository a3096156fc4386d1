#ifndef LONGFILL_TESTS_UNIT_SEARCH_SEARCH_FIXTURE_H_
#define LONGFILL_TESTS_UNIT_SEARCH_SEARCH_FIXTURE_H_

// A small model on the CPU with random weights that attend unevenly, and prompts for it.

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "kernels/api/backend.h"
#include "models/device_weights.h"
#include "models/search/sample_pass.h"
#include "parallel/communicator.h"
#include "tests/testing/status_matchers.h"

namespace longfill {

// Every rank, or every search, has its own.
struct SmallModel {
  SmallModel() : backend(CreateCpuBackend(1)) {
    config.architecture = "LlamaForCausalLM";
    config.family = "llama";
    config.num_layers = 3;
    config.hidden_size = 64;
    config.num_q_heads = 4;
    config.num_kv_heads = 2;
    config.head_dim = 32;
    config.intermediate_size = 64;
    config.vocab_size = 97;
    config.max_position_embeddings = 4096;
    config.rope.rotary_dim = 32;
    config.initializer_range = 0.3;  // scores that differ
    auto random = RandomWeights(config, *backend, 5);
    LF_EXPECT_OK(random.status());
    weights = *std::move(random);
  }
  SearchModel view() const { return {config, *weights, *backend}; }

  ModelConfig config;
  std::unique_ptr<Backend> backend;
  std::unique_ptr<const ModelWeights> weights;
};

inline std::vector<int32_t> PromptOf(int64_t num_tokens, int32_t step) {
  std::vector<int32_t> ids(static_cast<size_t>(num_tokens));
  for (size_t i = 0; i < ids.size(); ++i) {
    ids[i] = static_cast<int32_t>((i * static_cast<size_t>(step) + i / 7) % 97);
  }
  return ids;
}

inline SamplePassOptions SmallPass() {
  return {.max_rows = 256, .num_threads = 1, .should_stop = [] { return absl::OkStatus(); }};
}

// body(world, rank) on every rank, as threads.
template <typename Body>
void OnRanks(int size, Body body) {
  const auto worlds = CreateInProcessCommunicators(size, {});
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] { body(*worlds[static_cast<size_t>(rank)], rank); });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace longfill

#endif  // LONGFILL_TESTS_UNIT_SEARCH_SEARCH_FIXTURE_H_
