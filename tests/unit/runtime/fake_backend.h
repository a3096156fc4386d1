#ifndef LONGFILL_TESTS_UNIT_RUNTIME_FAKE_BACKEND_H_
#define LONGFILL_TESTS_UNIT_RUNTIME_FAKE_BACKEND_H_

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "runtime/serving/prefill_backend.h"

namespace longfill {

// Where every element of a fake KV cache belongs, as its value; exact in fp32 for small shapes.
float FakeKvElement(bool key, int64_t layer, int64_t head, int64_t token, int64_t i);
float FakeLogit(int64_t position, int64_t id);

// A group of ranks in one process that computes nothing: rank 0's Prefill fills the sinks of all ranks, layer
// by layer, and asks the script before each.
class FakeGroup {
 public:
  explicit FakeGroup(ServedModel model);
  ~FakeGroup();
  PrefillBackend* rank(int rank);

  // Prompts stop before this layer until it is raised. Default: no stop.
  void HoldBeforeLayer(int64_t layer);
  void Release() { HoldBeforeLayer(1 << 20); }
  // Waits until a prompt is held; false after 10 s.
  bool WaitUntilHeld();
  std::atomic<bool> ignore_stop = false;  // an engine that hangs in a collective
  std::atomic<int> progress_per_layer = 1;
  std::atomic<int> keep_alives = 0;
  std::atomic<int> shutdowns = 0;
  std::function<absl::Status(int64_t layer)> fail_layer;  // set before prompts come

 private:
  class Rank;
  const ServedModel model_;
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::mutex mutex_;
  std::condition_variable changed_;
  int64_t hold_before_ = 1 << 20;
  bool held_ = false;
  absl::Status aborted_;
  bool shut_down_ = false;
};

}  // namespace longfill

#endif  // LONGFILL_TESTS_UNIT_RUNTIME_FAKE_BACKEND_H_
