#ifndef LONGFILL_PARALLEL_PARALLEL_ATTENTION_H_
#define LONGFILL_PARALLEL_PARALLEL_ATTENTION_H_

// Attention of one layer over a mesh {sequence, head}, plain or in dual chunks (dual_chunk.h): tokens to
// heads inside the head group, keys and values gathered over the sequence group, attention, heads back to
// tokens. One path for all meshes; groups of one copy nothing. KV heads are exchanged and computed in rounds:
// while one computes on the main stream, the next one is exchanged on a stream of its own. What is exchanged
// before anything computes can begin early (Begin), beside the query projection and the index.

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "kernels/api/backend.h"
#include "kernels/sparse/index_view.h"
#include "parallel/attention_geometry.h"
#include "parallel/attention_layout.h"
#include "parallel/communicator.h"
#include "parallel/mesh.h"
#include "parallel/peer_memory.h"
#include "parallel/stream_timer.h"

namespace longfill {

// Keys and values where peers read them, instead of an exchange: by copy engines, which leave all
// multiprocessors to attention. The ranks wait for one another before and after.
struct PeerKeys {
  // On one host: k and v of all ranks, buffers 0 and 1, each dense from its start. On several: relay_k and
  // relay_v of this host's ranks, in the order of PeerHosts::RanksOf.
  const PeerMemory* memory = nullptr;
  // On several hosts (ParallelAttentionOptions::hosts), RelayBytes each: to which every rank gathers what the
  // ranks at its place on all hosts have, and from which its neighbours read it, so that a row crosses the
  // network once for each host.
  void* relay_k = nullptr;
  void* relay_v = nullptr;
};

// Activations are memory of the backend, of its compute dtype.
struct ParallelAttentionParams {
  HeadsView<const void> q;     // [num_q_heads, local tokens, head_dim], rows as plan.TokenPositions(rank)
  HeadsView<const void> k, v;  // [num_kv_heads, local tokens, head_dim]
  // Where BeginsEarly; nullptr, on all ranks: keys and values are exchanged.
  const PeerKeys* peers = nullptr;
  // [chunks, num_q_heads], equal on all ranks (LayerIndex::heads); one chunk unless dual chunks split the
  // prompt.
  std::span<const IndexView> indices;
  // [num_q_heads], equal on all ranks (LayerIndex::pairs); decide the placement and the length of launches.
  std::span<const PairCounts> pairs;
  // Where dual chunks split the prompt, q is not rotated and this says how it is: RotateQueries
  // (dual_chunk.h).
  RotaryParams query_rotary;
  void* out = nullptr;  // [local tokens, num_q_heads * head_dim], token-major, overwritten
  // Query heads to compute, ascending, equal on all ranks; empty: all. What `out` holds of others stays.
  std::span<const int32_t> heads;
  // Positions of the prompt, ascending, equal on all ranks, whose lse is wanted
  // (ParallelAttentionStats::sampled_lse); empty: no lse is formed.
  std::span<const int64_t> sampled;
  // Asked between launches, of which at most two are on their way; once true, the rest of the compute is
  // skipped here. May be empty.
  std::function<bool()> should_stop;
};

struct ParallelAttentionStats {
  double attention_seconds = 0;      // all on the device
  double communication_seconds = 0;  // exchanges with their packing and waiting for peers
  double exposed_seconds = 0;        // in which attention waited for exchanges
  int64_t covered_pairs = 0;         // of this rank
  int64_t computed_pairs = 0;
  // [num_q_heads, params.sampled.size()], natural log: of what this rank has computed, else -infinity, so
  // that the maximum over all ranks is the whole. Empty where none was wanted.
  std::vector<float> sampled_lse;
};

struct ParallelAttentionOptions {
  int64_t round_bytes = 0;  // AttentionLayout; 0: that of the device
  // AttentionParams::cta_limit while an exchange runs beside attention and needs SMs; 0: none is left to it.
  int ctas_beside_exchange = 0;
  // The same while only peers' memory is read.
  int ctas_beside_peers = 0;
  PeerHosts hosts;  // of the ranks; those of one host may be peers
};

class ParallelAttention {
 public:
  ~ParallelAttention();

  // Every rank of `world` calls this with an equal mesh and geometry; splits `world` into head and sequence
  // groups, and with several hosts into those that relay. `backend` and `world`, whose calls take memory of
  // the backend, outlive the result. InvalidArgument when the mesh does not match world.size(),
  // FailedPrecondition of PeerHosts::CheckAlike.
  static absl::StatusOr<std::unique_ptr<ParallelAttention>> Create(
      Backend& backend, Communicator& world, const Mesh& mesh, const AttentionGeometry& geometry,
      const ParallelAttentionOptions& options = {});

  // Whether there is something to begin early: keys and values are gathered over a sequence group, in rounds
  // that do not depend on the index. Where heads are exchanged, their placement does.
  static bool BeginsEarly(const Mesh& mesh) { return mesh.sequence > 1 && mesh.head == 1; }
  // Where BeginsEarly: every rank calls this with an equal plan once k and v are enqueued on the main stream.
  // The first round is gathered beside what comes after. `params`: k, v, peers and sampled count, which Run
  // gets again, with no `heads`. Takes the memory of Run, which gives it back, or Drop does. Errors as those
  // of Run.
  absl::Status Begin(const ShardPlan& plan, const ParallelAttentionParams& params);
  // Gives up what was begun, if anything was: the main stream waits for it. To be called where Run will not
  // be.
  absl::Status Drop();

  // Every rank calls this with an equal plan, whose mesh is the one of Create. Goes on with what was begun.
  // Works on the backend's main stream and one beside it, and waits for both at the end, for the pair counts.
  // Bad arguments and missing memory are agreed on before the first exchange and leave the group usable; a
  // later error aborts it, and peers return Unavailable. Cancelled: should_stop said so here. This rank has
  // still taken part in every exchange, so that the group stays in step and usable; `out` is then undefined
  // here and on peers, which the caller settles by agreeing on cancellation.
  absl::StatusOr<ParallelAttentionStats> Run(const ShardPlan& plan, const ParallelAttentionParams& params);

  // Bytes of each of PeerKeys::relay_k and relay_v; 0 on one host.
  static int64_t RelayBytes(const AttentionGeometry& geometry, DType dtype, const ShardPlan& plan,
                            const PeerHosts& hosts, int rank);
  // Bytes of the backend's memory that Run takes, on the rank that needs most. Allocates nothing.
  static int64_t PlanBytes(const KernelSet& kernels, const AttentionGeometry& geometry, const ShardPlan& plan,
                           const AttentionLayout::Options& options = {});

 private:
  class AttentionRun;

  ParallelAttention(Backend& backend, Communicator& world, const Mesh& mesh,
                    const AttentionGeometry& geometry, const ParallelAttentionOptions& options);
  int64_t OwnRelayBytes(const ShardPlan& plan) const;

  Backend& backend_;
  Communicator& world_;
  const Mesh mesh_;
  const AttentionGeometry geometry_;
  const ParallelAttentionOptions options_;
  std::unique_ptr<Communicator> head_group_;      // equal sequence index, ordered by head index
  std::unique_ptr<Communicator> sequence_group_;  // equal head index, ordered by sequence index
  // Equal places on their hosts, ordered by host; nullptr where there is one host, or no use for it.
  std::unique_ptr<Communicator> relay_group_;
  std::unique_ptr<Stream> exchange_stream_, copy_stream_;
  std::array<std::unique_ptr<Event>, 2> launch_ended_;
  // Between the streams: where each takes over from the other, and of rounds by turns.
  std::unique_ptr<Event> inputs_ready_, exchanges_ended_, relayed_, copied_;
  std::array<std::unique_ptr<Event>, 2> received_, attended_;
  StreamTimer attention_timer_;
  StreamTimer communication_timer_;
  StreamTimer exposed_timer_;
  std::array<int64_t, 2> counts_{};  // of the last Run: covered, computed
  std::vector<float> sampled_lse_;   // of the last Run: [computed heads, own sampled rows]
  std::unique_ptr<AttentionRun> begun_;
};

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_PARALLEL_ATTENTION_H_
