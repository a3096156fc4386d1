#ifndef LONGFILL_RUNTIME_SCALING_RANK_RECORDING_H_
#define LONGFILL_RUNTIME_SCALING_RANK_RECORDING_H_

// The ranks of a prefill, each run alone on one device and written down.

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "kernels/api/backend.h"
#include "models/config.h"
#include "models/pattern_file.h"
#include "models/weights.h"
#include "parallel/mesh.h"
#include "runtime/engine/prefill_engine.h"
#include "runtime/scaling/link_traffic.h"
#include "runtime/scaling/recorded_communicator.h"
#include "runtime/scaling/step_recorder.h"

namespace longfill {

// What all ranks of all meshes have in common. Everything outlives the recordings.
struct RecordingJob {
  const ModelConfig& config;
  const ModelWeights& weights;  // in the memory of the device
  const PatternSet& patterns;
  Coverage coverage = Coverage::kTiles;
  std::span<const int32_t> token_ids;  // of the whole prompt
  // After its Begin; nullptr: patterns have no heads whose keys are selected.
  IndexReplacement* replacement = nullptr;
  std::vector<int64_t> layers;   // to run, ascending, not empty
  int ctas_beside_exchange = 0;  // ParallelAttentionOptions
  // Keys and values come from peers (ParallelAttentionParams), on meshes where they can; the ranks of each
  // mesh, which are alike (PeerHosts::CheckAlike).
  bool peer_copies = false;
  PeerHosts hosts;
  std::function<absl::Status()> should_stop;
};

// InvalidArgument or Unimplemented, naming mesh, layer, head and pattern, where ranks cannot run without
// their peers: heads that select keys, unless recorded indices replace what they select; block-sparse and
// block-share heads; dual chunks; a budget beyond the tokens of the rank that selects for all, among its own.
absl::Status CheckRunsAlone(const ModelConfig& config, const PatternSet& patterns, const ShardPlan& plan,
                            bool replaced);

struct RankRecording {
  RecordedSteps start;                // embedding
  std::vector<RecordedSteps> layers;  // [job.layers]
};

// Runs the code of the engine's layers as each rank of the mesh, one after the other: [ranks]. The first
// layer runs once more before that, so that kernels are loaded and memory is there. K and V stay on the
// device, and there is no LM head. Works on the main stream of `device` and streams beside it, and takes the
// memory of one rank at a time. Precondition: CheckRunsAlone passed. `groups`: of the mesh, not used before.
// `traffic` may be nullptr.
absl::StatusOr<std::vector<RankRecording>> RecordRanks(const RecordingJob& job, const Mesh& mesh,
                                                       MeshGroups& groups, Backend& device,
                                                       LinkTraffic* traffic);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_SCALING_RANK_RECORDING_H_
