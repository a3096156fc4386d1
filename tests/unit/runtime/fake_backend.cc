#include "tests/unit/runtime/fake_backend.h"

#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/kv/kv_exporter.h"

namespace longfill {

float FakeKvElement(bool key, int64_t layer, int64_t head, int64_t token, int64_t i) {
  return static_cast<float>((((key ? 1 : 2) * 8 + layer) * 4 + head) * 8 + i) +
         static_cast<float>(token % 4096) / 4096.0f;
}

float FakeLogit(int64_t position, int64_t id) {
  return static_cast<float>(position % 1000) + static_cast<float>(id) / 64.0f;
}

class FakeGroup::Rank final : public PrefillBackend {
 public:
  Rank(FakeGroup* group, int rank) : group_(group), rank_(rank) {}

  const ServedModel& model() const override { return group_->model_; }
  absl::Status Validate(const PrefillRequest& request) const override {
    for (const int32_t id : request.token_ids) {
      if (id < 0 || id >= model().vocab_size)
        return absl::InvalidArgumentError(absl::StrCat("token id ", id));
    }
    for (const int64_t position : request.logits_positions) {
      if (position < 0 || position >= static_cast<int64_t>(request.token_ids.size())) {
        return absl::InvalidArgumentError(absl::StrCat("logits position ", position));
      }
    }
    if (request.attention.text == "too-large") return absl::ResourceExhaustedError("needs more memory");
    return absl::OkStatus();
  }
  MemoryPlan PlanMemory(const PrefillRequest&) const override {
    return {.weights_bytes = 7,
            .activation_bytes = 1,
            .index_bytes = 2,
            .attention_bytes = 3,
            .kv_budget_bytes = 6,
            .outside_bytes = 4,
            .logits_bytes = 8,
            .staging_bytes = 9,
            .kv_ring_bytes = 10,
            .kv_store_bytes = 5};
  }
  int64_t LongestPrompt(const PrefillRequest&) const override { return 77; }
  absl::StatusOr<std::vector<std::string>> TokenHashes(std::span<const int32_t> ids) const override {
    return std::vector<std::string>((ids.size() + 127) / 128, std::string(64, 'a'));
  }
  bool healthy() const override {
    std::lock_guard lock(group_->mutex_);
    return group_->aborted_.ok();
  }
  void Abort(const absl::Status& reason) override {
    {
      std::lock_guard lock(group_->mutex_);
      if (group_->aborted_.ok()) group_->aborted_ = reason;
    }
    group_->changed_.notify_all();
  }
  absl::Status KeepAlive() override {
    ++group_->keep_alives;
    return absl::OkStatus();
  }
  absl::Status Shutdown() override {
    ++group_->shutdowns;
    {
      std::lock_guard lock(group_->mutex_);
      group_->shut_down_ = true;
    }
    group_->changed_.notify_all();
    return absl::OkStatus();
  }

  absl::Status Serve(const KvSinkFactory& sink_factory, const std::function<absl::Status()>&,
                     const std::function<void(const absl::Status&)>&) override {
    std::unique_lock lock(group_->mutex_);
    factory_ = sink_factory;
    group_->changed_.notify_all();
    group_->changed_.wait(lock, [this] { return group_->shut_down_ || !group_->aborted_.ok(); });
    return group_->aborted_;
  }

  absl::StatusOr<PrefillResult> Prefill(const PrefillRequest& request, const KvSinkFactory& sink_factory,
                                        const PrefillCallbacks& callbacks) override {
    const ShardPlan plan(model().mesh, static_cast<int64_t>(request.token_ids.size()));
    std::vector<KvTransferSpec> specs;
    std::vector<std::unique_ptr<KvSink>> sinks;
    for (int rank = 0; rank < model().mesh.size(); ++rank) {
      specs.push_back({.request_id = request.request_id,
                       .transfer_id = request.transfer_id,
                       .plan = plan,
                       .rank = rank,
                       .num_layers = model().num_layers,
                       .num_kv_heads = model().num_kv_heads,
                       .head_dim = model().head_dim,
                       .dtype = request.kv_dtype});
      LF_ASSIGN_OR_RETURN(auto sink, (rank == 0 ? sink_factory : FactoryOf(rank))(specs.back()));
      sinks.push_back(std::move(sink));
    }
    const std::unique_ptr<Backend> device = CreateCpuBackend(1);
    KvRing ring;
    std::vector<std::unique_ptr<KvExporter>> exporters;
    for (const auto& sink : sinks) {
      LF_ASSIGN_OR_RETURN(auto exporter, KvExporter::Create(*device, ring, *sink,
                                                            {.num_kv_heads = model().num_kv_heads,
                                                             .head_dim = model().head_dim},
                                                            {.should_stop = callbacks.should_stop}));
      exporters.push_back(std::move(exporter));
    }
    const absl::Status outcome = Run(request, specs, exporters, callbacks);
    for (const auto& sink : sinks) LF_RETURN_IF_ERROR(sink->Finish(outcome));
    LF_RETURN_IF_ERROR(outcome);
    return ResultOf(request);
  }

 private:
  KvSinkFactory FactoryOf(int rank) {
    std::unique_lock lock(group_->mutex_);
    Rank& other = *group_->ranks_[static_cast<size_t>(rank)];
    group_->changed_.wait(lock, [&] { return static_cast<bool>(other.factory_); });
    return other.factory_;
  }

  absl::Status Run(const PrefillRequest& request, const std::vector<KvTransferSpec>& specs,
                   const std::vector<std::unique_ptr<KvExporter>>& exporters,
                   const PrefillCallbacks& callbacks) {
    callbacks.on_accepted({.resolved = request.attention.text + " (fake)"});
    const int64_t num_tokens = static_cast<int64_t>(request.token_ids.size());
    for (int64_t layer = 0; layer < model().num_layers; ++layer) {
      LF_RETURN_IF_ERROR(Hold(layer, callbacks));
      if (group_->fail_layer) LF_RETURN_IF_ERROR(group_->fail_layer(layer));
      for (size_t rank = 0; rank < exporters.size(); ++rank) {
        LF_RETURN_IF_ERROR(AppendLayer(specs[rank], layer, *exporters[rank]));
      }
      for (int i = 0; i < group_->progress_per_layer; ++i) {
        callbacks.on_progress({.total_tokens = num_tokens,
                               .processed_tokens = num_tokens * (layer + 1) / model().num_layers,
                               .layers_done = layer + 1,
                               .num_layers = model().num_layers,
                               .seconds = 0.001});
      }
    }
    return absl::OkStatus();
  }

  absl::Status Hold(int64_t layer, const PrefillCallbacks& callbacks) {
    std::unique_lock lock(group_->mutex_);
    while (true) {
      if (!group_->ignore_stop) {
        lock.unlock();
        const absl::Status stop = callbacks.should_stop();
        lock.lock();
        if (stop.ok() && !group_->aborted_.ok()) return group_->aborted_;
        LF_RETURN_IF_ERROR(stop);
      }
      if (layer < group_->hold_before_) break;
      group_->held_ = true;
      group_->changed_.notify_all();
      group_->changed_.wait_for(lock, std::chrono::milliseconds(2));
    }
    group_->held_ = false;
    return absl::OkStatus();
  }

  // In two pieces, as an engine that works in chunks.
  absl::Status AppendLayer(const KvTransferSpec& spec, int64_t layer, KvExporter& exporter) {
    const PositionMap positions = spec.plan.TokenPositions(spec.rank);
    const int64_t num_rows = spec.plan.NumTokens(spec.rank);
    const int64_t middle = num_rows / 2;
    for (const auto& [begin, end] : {std::pair{int64_t{0}, middle}, std::pair{middle, num_rows}}) {
      const size_t count = static_cast<size_t>(spec.num_kv_heads * (end - begin) * spec.head_dim);
      std::vector<float> key(count), value(count);
      size_t next = 0;
      for (int64_t head = 0; head < spec.num_kv_heads; ++head) {
        for (int64_t row = begin; row < end; ++row) {
          for (int64_t i = 0; i < spec.head_dim; ++i, ++next) {
            key[next] = FakeKvElement(true, layer, head, positions.Position(row), i);
            value[next] = FakeKvElement(false, layer, head, positions.Position(row), i);
          }
        }
      }
      const int64_t stride = (end - begin) * spec.head_dim;
      LF_RETURN_IF_ERROR(exporter.OnKv(layer, begin, end,
                                       HeadsView<const float>{key.data(), stride, spec.head_dim},
                                       HeadsView<const float>{value.data(), stride, spec.head_dim}));
    }
    return absl::OkStatus();
  }

  PrefillResult ResultOf(const PrefillRequest& request) {
    PrefillResult result;
    result.positions = request.logits_positions;
    if (result.positions.empty()) result.positions = {static_cast<int64_t>(request.token_ids.size()) - 1};
    for (const int64_t position : result.positions) {
      for (int64_t id = 0; id < model().vocab_size; ++id) result.logits.push_back(FakeLogit(position, id));
    }
    result.figures.tokens = static_cast<int64_t>(request.token_ids.size());
    result.figures.ranks = model().mesh.size();
    result.figures.mesh = model().mesh;
    result.figures.attention = request.attention.text;
    result.figures.density = 0.25;
    result.figures.covered_pairs = 11;
    result.figures.rank_covered_pairs = {5, 6};
    result.figures.kv_bytes = 13;
    result.figures.gemm_seconds = 1.5;
    result.figures.other_seconds = 2.5;
    result.figures.exposed_copy_seconds = 3.5;
    result.figures.peak_device_bytes = 14;
    result.figures.planned_device_bytes = 15;
    result.figures.outside_device_bytes = 16;
    result.figures.device = "fake device";
    result.figures.communicator = "fake communicator";
    result.figures.exposed_communication_seconds = 0.25;
    result.figures.compute_dtype = model().compute_dtype;
    if (request.recall.on()) {
      result.figures.recall = {.rows = 16,
                               .min_recall = request.recall.min_recall,
                               .mean = 0.75,
                               .min = 0.5,
                               .min_layer = 1,
                               .min_head = 2,
                               .recomputed = 1,
                               .seconds = 4.5,
                               .pair_share = 0.125,
                               .layers = {{}, {.watched = true, .heads = {1, 0.5}}}};
      result.figures.recall.layers[1].recomputed = {{.head = 1,
                                                     .pattern = VerticalSlash{60, 100},
                                                     .recall_before = 0.25,
                                                     .recall = 0.5,
                                                     .density = 0.0625}};
    }
    return result;
  }

  FakeGroup* const group_;
  const int rank_;
  KvSinkFactory factory_;  // guarded by the group's mutex
};

FakeGroup::FakeGroup(ServedModel model) : model_(std::move(model)) {
  for (int rank = 0; rank < model_.mesh.size(); ++rank) ranks_.push_back(std::make_unique<Rank>(this, rank));
}

FakeGroup::~FakeGroup() = default;

PrefillBackend* FakeGroup::rank(int rank) { return ranks_[static_cast<size_t>(rank)].get(); }

void FakeGroup::HoldBeforeLayer(int64_t layer) {
  {
    std::lock_guard lock(mutex_);
    hold_before_ = layer;
  }
  changed_.notify_all();
}

bool FakeGroup::WaitUntilHeld() {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, std::chrono::seconds(10), [this] { return held_; });
}

}  // namespace longfill
