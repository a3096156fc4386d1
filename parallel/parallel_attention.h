#ifndef LONGFILL_PARALLEL_PARALLEL_ATTENTION_H_
#define LONGFILL_PARALLEL_PARALLEL_ATTENTION_H_

// Attention of one layer over a mesh {sequence, head}: tokens to heads inside the head group, keys and values
// gathered over the sequence group, attention, heads back to tokens. One path for all meshes; groups of one
// copy nothing.

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "kernels/api/backend.h"
#include "kernels/sparse/index_view.h"
#include "parallel/attention_geometry.h"
#include "parallel/communicator.h"
#include "parallel/mesh.h"
#include "parallel/stream_timer.h"

namespace longfill {

// Activations are memory of the backend, of its compute dtype.
struct ParallelAttentionParams {
  HeadsView<const void> q;     // [num_q_heads, local tokens, head_dim], rows as plan.TokenPositions(rank)
  HeadsView<const void> k, v;  // [num_kv_heads, local tokens, head_dim]
  std::span<const IndexView> indices;  // [num_q_heads], equal on all ranks (LayerIndex::heads)
  // [num_q_heads], equal on all ranks (LayerIndex::pairs); decide the placement and the length of launches.
  std::span<const PairCounts> pairs;
  void* out = nullptr;  // [local tokens, num_q_heads * head_dim], token-major, overwritten
  // Asked between launches, of which at most two are on their way; once true, the rest of the compute is
  // skipped here. May be empty.
  std::function<bool()> should_stop;
};

struct ParallelAttentionStats {
  double attention_seconds = 0;      // both on the device
  double communication_seconds = 0;  // exchanges with their packing and waiting
  int64_t covered_pairs = 0;         // of this rank
  int64_t computed_pairs = 0;
};

class ParallelAttention {
 public:
  // Every rank of `world` calls this with an equal mesh and geometry; splits `world` into head and sequence
  // groups. `backend` and `world`, whose calls take memory of the backend, outlive the result.
  // InvalidArgument when the mesh does not match world.size().
  static absl::StatusOr<std::unique_ptr<ParallelAttention>> Create(Backend& backend, Communicator& world,
                                                                   const Mesh& mesh,
                                                                   const AttentionGeometry& geometry);

  // Every rank calls this with an equal plan, whose mesh is the one of Create. Works on the backend's main
  // stream and waits for it at the end, for the pair counts. Bad arguments and missing memory are agreed on
  // before the first exchange and leave the group usable; a later error aborts it, and peers return
  // Unavailable. Cancelled: should_stop said so here. This rank has still taken part in every exchange, so
  // that the group stays in step and usable; `out` is then undefined here and on peers, which the caller
  // settles by agreeing on cancellation.
  absl::StatusOr<ParallelAttentionStats> Run(const ShardPlan& plan, const ParallelAttentionParams& params);

  // Bytes of the backend's memory that Run takes, on the rank that needs most. Allocates nothing.
  static int64_t PlanBytes(const KernelSet& kernels, const AttentionGeometry& geometry,
                           const ShardPlan& plan);

 private:
  class AttentionRun;

  ParallelAttention(Backend& backend, Communicator& world, const Mesh& mesh,
                    const AttentionGeometry& geometry)
      : backend_(backend),
        world_(world),
        mesh_(mesh),
        geometry_(geometry),
        attention_timer_(backend),
        communication_timer_(backend) {}

  Backend& backend_;
  Communicator& world_;
  const Mesh mesh_;
  const AttentionGeometry geometry_;
  std::unique_ptr<Communicator> head_group_;      // equal sequence index, ordered by head index
  std::unique_ptr<Communicator> sequence_group_;  // equal head index, ordered by sequence index
  std::array<std::unique_ptr<Event>, 2> launch_ended_;
  StreamTimer attention_timer_;
  StreamTimer communication_timer_;
  std::array<int64_t, 2> counts_{};  // of the last Run: covered, computed
};

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_PARALLEL_ATTENTION_H_
