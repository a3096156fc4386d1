#include "runtime/scaling/rank_recording.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "models/transformer.h"
#include "parallel/index_storage.h"
#include "runtime/scaling/recorded_peers.h"

namespace longfill {
namespace {

// What the first rank selects, all do. Every index has distance 0, which is among the distances of the last
// token.
int FirstToRun(const ShardPlan& plan) { return plan.RankOfToken(plan.num_tokens() - 1); }

absl::Status CheckHead(const HeadPattern& pattern, const ShardPlan& plan, bool replaced) {
  if (std::holds_alternative<BlockSparse>(pattern) || std::holds_alternative<BlockShare>(pattern)) {
    return absl::UnimplementedError("a rank alone cannot select key blocks");
  }
  const auto* lines = std::get_if<VerticalSlash>(&pattern);
  if (lines == nullptr) return absl::OkStatus();
  if (!replaced) {
    return absl::InvalidArgumentError("a rank alone cannot select keys, recorded indices are needed");
  }
  const VerticalSlashBudget budget(*lines, plan.num_tokens());
  const int64_t own_tokens = plan.NumTokens(FirstToRun(plan));
  if (budget.columns <= own_tokens && budget.distances <= own_tokens) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("its budget is beyond the ", own_tokens, " tokens of one rank"));
}

// One rank's layers on a recorded device.
class RankRun {
 public:
  RankRun(const RecordingJob& job, const Mesh& mesh, int rank, MeshGroups& groups, Backend& device,
          LinkTraffic* traffic)
      : job_(job),
        plan_(mesh, static_cast<int64_t>(job.token_ids.size())),
        rank_(rank),
        backend_(device),
        peers_(groups, rank, backend_, traffic),
        world_(peers_.World()),
        memory_of_peers_(MembersOf(job.hosts, mesh, rank), rank, backend_, traffic) {}

  absl::StatusOr<RankRecording> Run() {
    LF_RETURN_IF_ERROR(Create());
    RankRecording recording;
    LF_RETURN_IF_ERROR(Embed());
    LF_ASSIGN_OR_RETURN(recording.start, backend_.recorder().Take());
    LF_RETURN_IF_ERROR(RunLayer(job_.layers.front()).status());
    for (const int64_t layer : job_.layers) {
      LF_ASSIGN_OR_RETURN(RecordedSteps steps, RunLayer(layer));
      recording.layers.push_back(std::move(steps));
    }
    return recording;
  }

 private:
  absl::Status Create() {
    const AttentionGeometry geometry = GeometryOf(job_.config);
    LF_ASSIGN_OR_RETURN(transformer_, Transformer::Create(job_.config, job_.weights, backend_, plan_, rank_));
    LF_ASSIGN_OR_RETURN(index_builder_,
                        SparseIndexBuilder::Create(backend_, *world_, geometry, job_.coverage));
    LF_ASSIGN_OR_RETURN(
        attention_,
        ParallelAttention::Create(backend_, *world_, plan_.mesh(), geometry,
                                  {.ctas_beside_exchange = job_.ctas_beside_exchange, .hosts = job_.hosts}));
    if (!job_.peer_copies || !ParallelAttention::BeginsEarly(plan_.mesh())) return absl::OkStatus();
    return OpenPeers();
  }

  absl::Status OpenPeers() {
    const DType dtype = backend_.kernels().compute_dtype();
    const auto relay_bytes = [&](int rank) {
      return ParallelAttention::RelayBytes(GeometryOf(job_.config), dtype, plan_, job_.hosts, rank);
    };
    const bool relayed = job_.hosts.num_hosts() > 1;
    int64_t most_bytes =
        plan_.MostTokens() * job_.config.num_kv_heads * job_.config.head_dim * DTypeBytes(dtype);
    if (relayed) {
      for (Buffer* buffer : {&relay_k_, &relay_v_}) {
        LF_ASSIGN_OR_RETURN(*buffer, backend_.memory().Allocate(relay_bytes(rank_), "of all hosts"));
      }
      for (const int rank : job_.hosts.RanksOf(0)) most_bytes = std::max(most_bytes, relay_bytes(rank));
    }
    const Buffer* const own[] = {relayed ? &relay_k_ : &transformer_->keys(),
                                 relayed ? &relay_v_ : &transformer_->values()};
    LF_ASSIGN_OR_RETURN(keys_and_values_, memory_of_peers_.Open(own, most_bytes));
    peer_keys_ = {keys_and_values_.get(), relay_k_.data(), relay_v_.data()};
    return absl::OkStatus();
  }

  static std::vector<int> MembersOf(const PeerHosts& hosts, const Mesh& mesh, int rank) {
    if (hosts.num_hosts() > 1) return hosts.RanksOf(hosts.HostOf(rank));
    std::vector<int> all(static_cast<size_t>(mesh.size()));
    std::iota(all.begin(), all.end(), 0);
    return all;
  }

  absl::Status Embed() {
    const PositionMap positions = plan_.TokenPositions(rank_);
    std::vector<int32_t> ids(static_cast<size_t>(plan_.NumTokens(rank_)));
    for (size_t row = 0; row < ids.size(); ++row) {
      ids[row] = job_.token_ids[static_cast<size_t>(positions.Position(static_cast<int64_t>(row)))];
    }
    return transformer_->Embed(ids);
  }

  absl::StatusOr<RecordedSteps> RunLayer(int64_t layer) {
    LayerParallelism parallel{.index_builder = &*index_builder_,
                              .attention = attention_.get(),
                              .peers = keys_and_values_ != nullptr ? &peer_keys_ : nullptr};
    if (job_.replacement != nullptr) {
      parallel.replace_index = [this](int64_t of, LayerIndex* index) {
        return job_.replacement->Replace(of, index);
      };
    }
    const LayerCallbacks callbacks{
        .on_kv = [](int64_t, int64_t, HeadsView<const void>,
                    HeadsView<const void>) { return absl::OkStatus(); },
        .should_stop = job_.should_stop,
        .agree = [this](const absl::Status& mine) { return AgreeOnStatus(*world_, mine, host_); }};
    LF_RETURN_IF_ERROR(transformer_->RunLayer(layer, job_.patterns.layer(layer), parallel, callbacks));
    return backend_.recorder().Take();
  }

  const RecordingJob& job_;
  const ShardPlan plan_;
  const int rank_;
  RecordedBackend backend_;
  RecordedRank peers_;
  const std::unique_ptr<Communicator> world_;
  RecordedPeers memory_of_peers_;
  CpuStream host_;
  std::unique_ptr<Transformer> transformer_;
  Buffer relay_k_, relay_v_;                     // where there are several hosts
  std::unique_ptr<PeerMemory> keys_and_values_;  // of all ranks of the host
  PeerKeys peer_keys_;
  std::optional<SparseIndexBuilder> index_builder_;
  std::unique_ptr<ParallelAttention> attention_;
};

}  // namespace

absl::Status CheckRunsAlone(const ModelConfig& config, const PatternSet& patterns, const ShardPlan& plan,
                            bool replaced) {
  if (config.rope.dual_chunk.Splits(plan.num_tokens())) {
    return absl::UnimplementedError(absl::StrCat("dual chunk attention, which the model computes beyond ",
                                                 config.rope.dual_chunk.chunk_len(),
                                                 " tokens, is not run rank by rank"));
  }
  for (int64_t layer = 0; layer < patterns.num_layers(); ++layer) {
    for (int64_t head = 0; head < patterns.num_heads(); ++head) {
      const HeadPattern& pattern = patterns.at(layer, head);
      const absl::Status status = CheckHead(pattern, plan, replaced);
      if (status.ok()) continue;
      return Annotate(status, absl::StrCat("mesh ", ToString(plan.mesh()), ", layer ", layer, ", head ", head,
                                           ": ", ToString(pattern)));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<RankRecording>> RecordRanks(const RecordingJob& job, const Mesh& mesh,
                                                       MeshGroups& groups, Backend& device,
                                                       LinkTraffic* traffic) {
  const int first = FirstToRun(ShardPlan(mesh, static_cast<int64_t>(job.token_ids.size())));
  std::vector<RankRecording> recordings(static_cast<size_t>(mesh.size()));
  for (int i = 0; i < mesh.size(); ++i) {
    const int rank = (first + i) % mesh.size();
    absl::StatusOr<RankRecording> recording = RankRun(job, mesh, rank, groups, device, traffic).Run();
    if (traffic != nullptr) LF_RETURN_IF_ERROR(traffic->Stop());
    if (!recording.ok()) return Annotate(recording.status(), absl::StrCat(ToString(mesh), ", rank ", rank));
    recordings[static_cast<size_t>(rank)] = *std::move(recording);
  }
  return recordings;
}

}  // namespace longfill
