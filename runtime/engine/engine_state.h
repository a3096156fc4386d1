#ifndef LONGFILL_RUNTIME_ENGINE_ENGINE_STATE_H_
#define LONGFILL_RUNTIME_ENGINE_ENGINE_STATE_H_

// What a PrefillEngine holds from its creation to its end, for the files of this folder.

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "kernels/api/backend.h"
#include "kernels/base/status.h"
#include "kernels/base/stream.h"
#include "models/config.h"
#include "models/sharded_weights.h"
#include "models/weights.h"
#include "parallel/communicator.h"
#include "parallel/parallel_attention.h"
#include "runtime/engine/device_communicator.h"
#include "runtime/engine/engine_device.h"
#include "runtime/engine/memory_plan.h"
#include "runtime/engine/prefill_engine.h"
#include "runtime/kv/kv_exporter.h"

namespace longfill {

struct EngineState {
  EngineState(EngineOptions options_in, Communicator& world_in, std::shared_ptr<Backend> backend_in)
      : options(std::move(options_in)), world(world_in), backend(std::move(backend_in)) {}

  // What one rank can do by itself: first its device, then what lies on it.
  absl::Status OpenDevice();
  absl::Status Load();
  // Collective, between the two: who shares the device, what of it is free, and how devices exchange.
  absl::Status ShareDevice();
  // Collective, after Load succeeded everywhere.
  absl::Status Connect();
  // Collective, once all ranks have run what they will run.
  absl::Status MeasureOutside();

  // Collective: OK everywhere, or everywhere the error of the lowest failing rank. A failure of the
  // collective itself breaks the group.
  absl::Status Agree(const absl::Status& mine);
  // After this the group is of no more use: a collective failed here, or is failing on a peer, or the device
  // is lost.
  absl::Status Break(const absl::Status& reason);
  // Breaks the group if the device is lost.
  absl::Status CheckDevice();

  MemoryPlanInput PlanInput(const PrefillRequest& request, const PatternSet& patterns) const;
  absl::StatusOr<MemoryBudget> Budget() const;
  absl::Status CheckMemory(const PrefillRequest& request, const PatternSet& patterns) const;
  absl::StatusOr<ResolvedAttention> Resolve(const PrefillRequest& request) const;

  EngineOptions options;
  Communicator& world;    // for host memory
  CpuStream host_stream;  // of its calls
  std::shared_ptr<Backend> backend;
  KvRing ring;
  ModelConfig config;
  std::string fingerprint;
  std::unique_ptr<const ModelWeights> replicated_weights;  // one of the two
  std::unique_ptr<ShardedWeights> sharded_weights;
  std::unique_ptr<Communicator> gpu_world;  // on a GPU
  std::unique_ptr<ParallelAttention> attention;
  CommunicatorChoice communicator;
  bool peer_copies = false;                // PeerCopies, as decided
  PeerHosts peer_hosts;                    // then: of the ranks
  std::unique_ptr<Communicator> own_host;  // of host memory; where there are several hosts
  std::string peer_copies_reason;          // why not; empty: nobody asked
  int ranks_on_device = 1;                 // ranks of `world` that compute on this one's device
  int64_t device_bytes_free = 0;           // for this rank, before any of them has loaded its weights
  int64_t outside_bytes = 0;               // MemoryPlan::outside_bytes
  std::atomic<bool> healthy{true};
  bool shut_down = false;

  // Whether keys and values of other hosts come through the memory of this one (PeerKeys).
  bool relayed() const { return peer_copies && peer_hosts.num_hosts() > 1; }
  // The ranks that read one another's memory.
  Communicator& peers() { return own_host != nullptr ? *own_host : world; }

  // Of all layers, or of what belongs to none.
  const ModelWeights& weights() const {
    return sharded_weights != nullptr ? sharded_weights->resident() : *replicated_weights;
  }
  int64_t WeightsBytes() const {
    return sharded_weights != nullptr ? sharded_weights->bytes() : replicated_weights->bytes();
  }

  // For memory of the backend.
  Communicator& device_world() { return gpu_world != nullptr ? *gpu_world : world; }

 private:
  absl::Status LoadWeights();
  absl::Status LoadCheckpoint();
  absl::Status DrawBenchModel();
  absl::Status CheckWeightsFit(const ModelWeights* host) const;
  absl::Status CheckRanksHaveOneModel();
  int CtasBesideExchange() const;
  absl::Status DecidePeerCopies();
  absl::Status FindPeers();
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_ENGINE_ENGINE_STATE_H_
