#ifndef LONGFILL_TESTS_MULTIRANK_ENGINE_GROUP_H_
#define LONGFILL_TESTS_MULTIRANK_ENGINE_GROUP_H_

// A prefill engine on ranks that are threads of the test, with sinks that remember what they were given.

#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "runtime/engine/prefill_engine.h"

namespace longfill {

// What one rank's sink of one request received.
struct RankKv {
  KvTransferSpec spec;
  std::vector<float> key, value;  // [layers, kv_heads, local rows, head_dim]
  std::vector<int> appended;      // [layers, local rows]: how often
  std::vector<absl::Status> finished;
};

// K and V of a whole prompt, put together from all ranks.
struct PromptKv {
  int64_t num_layers = 0;
  std::vector<float> key, value;  // [layers, kv_heads, tokens, head_dim]
  std::vector<int> owners;        // [layers, tokens]: a rank owns all KV heads of a token
};

// The ranks' shared memory of a test. Thread-safe. Faults are asked for by the id of the request, so that
// every rank knows them:
//   "factory fails on R"   the sink factory of rank R fails
//   "append fails on R"    the sink of rank R fails in layer 1
//   "finish fails on R"    the sink of rank R fails to end
//   "append aborts on R"   the sink of rank R aborts the communicator in layer 1
//   "append hangs on R"    the sink of rank R blocks in layer 1 until Release()
class Recorder {
 public:
  KvSinkFactory Factory(Communicator& world);
  void RequestDone(int rank, const absl::Status& outcome);
  void Release() { released_ = true; }

  // Once the request is over on all ranks.
  PromptKv Join(const std::string& request_id) const;
  std::vector<absl::Status> Finished(const std::string& request_id, int rank) const;
  std::vector<absl::Status> Outcomes(int rank) const;  // of the requests that rank R > 0 took part in

 private:
  friend class RecordingSink;
  mutable std::mutex mutex_;
  std::map<std::string, std::map<int, std::shared_ptr<RankKv>>> kv_;
  std::map<int, std::vector<absl::Status>> outcomes_;
  std::atomic<bool> released_{false};
};

struct GroupOptions {
  std::string model_dir;
  Mesh mesh;
  DeviceKind device = DeviceKind::kCpu;
  int ordinal = -1;  // of the GPU of all ranks; -1: they are dealt over those that there are
  DeviceCommunicatorOptions communicator;
  AttentionDefaults attention;
  KvExportOptions kv_export;
  std::chrono::milliseconds timeout{60000};
  int64_t memory_limit_bytes = int64_t{1} << 40;
  // Asked on the ranks other than 0; may be empty.
  std::function<absl::Status(int rank, Communicator& world)> should_stop;
};

// Creates the engine on every rank, serves on the others, runs `rank0` and shuts down. Returns what Serve
// returned on ranks 1, 2, ...; fails the test if an engine cannot be created.
std::vector<absl::Status> WithEngine(const GroupOptions& options, Recorder& recorder,
                                     const std::function<void(PrefillEngine& engine)>& rank0);

// Rank 0's call with the recorder's sink.
absl::StatusOr<PrefillResult> Prefill(PrefillEngine& engine, Recorder& recorder,
                                      const PrefillRequest& request, const PrefillCallbacks& callbacks = {});

std::string GoldenModel(const std::string& name);  // a folder of tests/golden/data
PrefillRequest MakeRequest(const std::string& request_id, std::vector<int32_t> ids,
                           const std::string& attention, Coverage coverage = Coverage::kTiles);
std::vector<int32_t> RandomIds(int64_t num_tokens, int64_t vocab_size, uint32_t seed);

// |got - expected| <= tolerance * largest |expected|, element by element.
void ExpectNear(const std::vector<float>& got, const std::vector<float>& expected, double tolerance,
                const std::string& what);

}  // namespace longfill

#endif  // LONGFILL_TESTS_MULTIRANK_ENGINE_GROUP_H_
