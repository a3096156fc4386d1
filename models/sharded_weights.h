#ifndef LONGFILL_MODELS_SHARDED_WEIGHTS_H_
#define LONGFILL_MODELS_SHARDED_WEIGHTS_H_

// Weights of models that are too large for each rank to have all of them: a rank keeps one part of every
// layer, in equal shares of its bytes, and the ranks gather a layer while the one before it computes.

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/api/backend.h"
#include "kernels/base/memory.h"
#include "kernels/base/status.h"
#include "kernels/base/stream.h"
#include "models/config.h"
#include "models/weight_fill.h"
#include "models/weight_layout.h"
#include "models/weights.h"
#include "parallel/communicator.h"
#include "parallel/stream_timer.h"

namespace longfill {

// As the backend computes with them: in its compute dtype, but on the CPU in the one that all matrices of
// `host` are stored in, if there is one (nullptr: weights without a checkpoint).
WeightDTypes DTypesOfShards(const ModelWeights* host, const ModelConfig& config, const KernelSet& kernels);

// One thread; the main stream is the backend's.
class ShardedWeights {
 public:
  // What of a layer's bytes each of `num_ranks` ranks keeps.
  static int64_t ShardBytes(const WeightLayout& layout, int num_ranks);
  // What Convert and Random take from backend.memory() and keep, on every rank alike and to the byte: what
  // belongs to no layer, this rank's share of every layer, and two whole layers.
  static int64_t PlanBytes(const ModelConfig& config, const WeightDTypes& dtypes, int num_ranks);

  // Local: the share of `rank`, complete at return. Memory and errors of CopyWeights and DrawWeights
  // (weight_fill.h). `backend` outlives the result.
  static absl::StatusOr<std::unique_ptr<ShardedWeights>> Convert(const ModelWeights& host,
                                                                 const ModelConfig& config, Backend& backend,
                                                                 int rank, int num_ranks);
  static absl::StatusOr<std::unique_ptr<ShardedWeights>> Random(const ModelConfig& config, uint64_t seed,
                                                                Backend& backend, int rank, int num_ranks);
  ~ShardedWeights();  // waits for exchanges on their way

  // Collective over the ranks of Convert: `world`, whose calls take memory of the backend, gets a group of
  // its own for the layers.
  absl::Status Connect(Communicator& world);

  // What belongs to no layer.
  const ModelWeights& resident() const { return *resident_; }
  int64_t bytes() const;  // PlanBytes

  // Collective, in one order on all ranks: weights for work that the main stream is given from here until the
  // next call. Enqueues the gathering of the layer, unless the call before has, and of the one after it,
  // which then runs beside that work. An error aborts the group.
  absl::StatusOr<const LayerWeights*> Gather(int64_t layer);

  struct Seconds {
    double communication = 0;  // gathering, with waiting for peers
    double exposed = 0;        // of these, in which the main stream waited
  };
  void ResetSeconds();
  // Since ResetSeconds. The work of the calls since then has run.
  absl::StatusOr<Seconds> TakenSeconds() const;

 private:
  static constexpr int64_t kNoLayer = -1;
  struct Place {
    Buffer memory;  // one layer of the layout
    LayerWeights weights;
    int64_t layer = kNoLayer;  // that it holds, once `gathered` has passed
    std::unique_ptr<Event> gathered;
  };

  ShardedWeights(WeightLayout layout, Backend& backend, int rank, int num_ranks);
  static absl::StatusOr<std::unique_ptr<ShardedWeights>> Create(const ModelConfig& config,
                                                                const WeightDTypes& dtypes, Backend& backend,
                                                                int rank, int num_ranks);
  absl::Status Allocate(const ModelConfig& config);
  std::vector<WeightExtent> OwnExtents() const;
  std::byte* Shard(int64_t layer) const { return shards_.as<std::byte>() + layer * shard_bytes_; }
  absl::Status EnqueueGather(int64_t layer);
  absl::Status GatherIntoPlace(int64_t layer);

  const WeightLayout layout_;
  Backend& backend_;
  const int rank_;
  const int num_ranks_;
  const int64_t num_layers_;
  const int64_t shard_bytes_;
  std::unique_ptr<const ModelWeights> resident_;
  WeightExtent resident_extent_;
  Buffer shards_;                // [num_layers, shard_bytes]
  std::array<Place, 2> places_;  // of layers by turns
  std::unique_ptr<Communicator> group_;
  std::unique_ptr<Stream> exchange_;
  std::unique_ptr<Event> computed_;  // what the main stream was given before a call
  StreamTimer communication_timer_, exposed_timer_;
};

}  // namespace longfill

#endif  // LONGFILL_MODELS_SHARDED_WEIGHTS_H_
