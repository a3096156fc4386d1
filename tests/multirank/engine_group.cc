#include "tests/multirank/engine_group.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "kernels/base/stream.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

bool Asks(const KvTransferSpec& spec, const char* fault) {
  return spec.request_id == absl::StrCat(fault, " on ", spec.rank);
}

}  // namespace

class RecordingSink final : public KvSink {
 public:
  RecordingSink(Recorder& recorder, Communicator& world, std::shared_ptr<RankKv> kv)
      : recorder_(recorder),
        world_(world),
        kv_(std::move(kv)),
        rows_(kv_->spec.plan.NumTokens(world.rank())) {
    const KvTransferSpec& spec = kv_->spec;
    kv_->key.resize(spec.num_layers * spec.num_kv_heads * rows_ * spec.head_dim);
    kv_->value.resize(kv_->key.size());
    kv_->appended.resize(spec.num_layers * rows_);
  }

  absl::Status Append(int64_t layer, int64_t row_begin, int64_t row_end, HeadsView<const void> key,
                      HeadsView<const void> value, DType dtype) override {
    const KvTransferSpec& spec = kv_->spec;
    if (layer == 1) LF_RETURN_IF_ERROR(Fault());
    for (int64_t head = 0; head < spec.num_kv_heads; ++head) {
      for (int64_t row = row_begin; row < row_end; ++row) {
        const int64_t at = ((layer * spec.num_kv_heads + head) * rows_ + row) * spec.head_dim;
        const auto copy = [&](HeadsView<const void> from, std::vector<float>& to) {
          const int64_t offset = head * from.head_stride + (row - row_begin) * from.row_stride;
          WidenToFloat(Advance(from.data, offset, dtype), dtype, spec.head_dim, &to[at]);
        };
        copy(key, kv_->key);
        copy(value, kv_->value);
      }
    }
    for (int64_t row = row_begin; row < row_end; ++row) ++kv_->appended[layer * rows_ + row];
    return absl::OkStatus();
  }

  absl::Status Finish(const absl::Status& outcome) override {
    const std::lock_guard lock(recorder_.mutex_);
    kv_->finished.push_back(outcome);
    if (Asks(kv_->spec, "finish fails")) return absl::DataLossError("the sink cannot end");
    return absl::OkStatus();
  }

 private:
  absl::Status Fault() {
    if (Asks(kv_->spec, "append fails")) return absl::ResourceExhaustedError("the sink is full");
    if (Asks(kv_->spec, "append aborts")) world_.Abort(absl::UnavailableError("this rank gives up"));
    while (Asks(kv_->spec, "append hangs") && !recorder_.released_) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return absl::OkStatus();
  }

  Recorder& recorder_;
  Communicator& world_;
  const std::shared_ptr<RankKv> kv_;
  const int64_t rows_;
};

KvSinkFactory Recorder::Factory(Communicator& world) {
  return [this, &world](const KvTransferSpec& spec) -> absl::StatusOr<std::unique_ptr<KvSink>> {
    if (Asks(spec, "factory fails")) return absl::ResourceExhaustedError("no room for the sink");
    auto kv = std::make_shared<RankKv>();
    kv->spec = spec;
    {
      const std::lock_guard lock(mutex_);
      EXPECT_TRUE(kv_[spec.request_id].emplace(spec.rank, kv).second) << spec.request_id;
    }
    return std::make_unique<RecordingSink>(*this, world, std::move(kv));
  };
}

void Recorder::RequestDone(int rank, const absl::Status& outcome) {
  const std::lock_guard lock(mutex_);
  outcomes_[rank].push_back(outcome);
}

PromptKv Recorder::Join(const std::string& request_id) const {
  const std::lock_guard lock(mutex_);
  PromptKv all;
  for (const auto& [rank, kv] : kv_.at(request_id)) {
    const KvTransferSpec& spec = kv->spec;
    const int64_t num_tokens = spec.plan.num_tokens();
    const int64_t rows = spec.plan.NumTokens(rank);
    all.num_layers = spec.num_layers;
    all.key.resize(spec.num_layers * spec.num_kv_heads * num_tokens * spec.head_dim);
    all.value.resize(all.key.size());
    all.owners.resize(spec.num_layers * num_tokens);
    const PositionMap positions = spec.plan.TokenPositions(rank);
    for (int64_t plane = 0; plane < spec.num_layers * spec.num_kv_heads; ++plane) {
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t from = (plane * rows + row) * spec.head_dim;
        const int64_t to = (plane * num_tokens + positions.Position(row)) * spec.head_dim;
        std::copy_n(&kv->key[from], spec.head_dim, &all.key[to]);
        std::copy_n(&kv->value[from], spec.head_dim, &all.value[to]);
      }
    }
    for (int64_t layer = 0; layer < spec.num_layers; ++layer) {
      for (int64_t row = 0; row < rows; ++row) {
        all.owners[layer * num_tokens + positions.Position(row)] += kv->appended[layer * rows + row];
      }
    }
  }
  return all;
}

std::vector<absl::Status> Recorder::Finished(const std::string& request_id, int rank) const {
  const std::lock_guard lock(mutex_);
  const auto request = kv_.find(request_id);
  if (request == kv_.end() || !request->second.contains(rank)) return {};
  return request->second.at(rank)->finished;
}

std::vector<absl::Status> Recorder::Outcomes(int rank) const {
  const std::lock_guard lock(mutex_);
  const auto found = outcomes_.find(rank);
  return found == outcomes_.end() ? std::vector<absl::Status>() : found->second;
}

std::vector<absl::Status> WithEngine(const GroupOptions& options, Recorder& recorder,
                                     const std::function<void(PrefillEngine& engine)>& rank0) {
  const int size = options.mesh.size();
  auto ranks = CreateInProcessCommunicators(size, {.timeout = options.timeout});
  std::vector<absl::Status> served(size - 1);
  const auto play = [&](Communicator& world) {
    const int rank = world.rank();
    LF_ASSERT_OK_AND_ASSIGN(const auto engine,
                            PrefillEngine::Create({.model_dir = options.model_dir,
                                                   .mesh = options.mesh,
                                                   .device = {.kind = options.device,
                                                              .ordinal = options.ordinal,
                                                              .ranks_on_host = size,
                                                              .local_rank = rank},
                                                   .communicator = options.communicator,
                                                   .attention = options.attention,
                                                   .kv_export = options.kv_export,
                                                   .memory_limit_bytes = options.memory_limit_bytes},
                                                  world));
    if (rank == 0) {
      rank0(*engine);
      LF_EXPECT_OK(engine->Shutdown());
      return;
    }
    const auto should_stop = [&] {
      return options.should_stop ? options.should_stop(rank, world) : absl::OkStatus();
    };
    served[rank - 1] = engine->Serve(recorder.Factory(world), should_stop, [&](const absl::Status& outcome) {
      recorder.RequestDone(rank, outcome);
    });
    EXPECT_EQ(engine->healthy(), served[rank - 1].ok()) << "rank " << rank << " " << served[rank - 1];
  };
  std::vector<std::thread> threads;
  for (int rank = 1; rank < size; ++rank) threads.emplace_back([&, rank] { play(*ranks[rank]); });
  play(*ranks[0]);
  for (std::thread& thread : threads) thread.join();
  return served;
}

absl::StatusOr<PrefillResult> Prefill(PrefillEngine& engine, Recorder& recorder,
                                      const PrefillRequest& request, const PrefillCallbacks& callbacks) {
  return engine.Prefill(request, recorder.Factory(engine.world()), callbacks);
}

std::string GoldenModel(const std::string& name) {
  // Where a test program runs away from its sources (tests/gpu), the environment says where the models are.
  const char* elsewhere = std::getenv("LONGFILL_GOLDEN_DIR");
  if (elsewhere != nullptr) return absl::StrCat(elsewhere, "/", name);
  return absl::StrCat(LONGFILL_SOURCE_DIR, "/tests/golden/data/", name);
}

PrefillRequest MakeRequest(const std::string& request_id, std::vector<int32_t> ids,
                           const std::string& attention, Coverage coverage) {
  PrefillRequest request;
  request.request_id = request_id;
  request.transfer_id = "transfer of " + request_id;
  request.token_ids = std::move(ids);
  request.attention.text = attention;
  request.coverage = coverage;
  return request;
}

std::vector<int32_t> RandomIds(int64_t num_tokens, int64_t vocab_size, uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int32_t> uniform(0, static_cast<int32_t>(vocab_size - 1));
  std::vector<int32_t> ids(num_tokens);
  for (int32_t& id : ids) id = uniform(random);
  return ids;
}

void ExpectNear(const std::vector<float>& got, const std::vector<float>& expected, double tolerance,
                const std::string& what) {
  ASSERT_EQ(got.size(), expected.size()) << what;
  double largest = 0, worst = 0;
  size_t worst_index = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_TRUE(std::isfinite(got[i])) << what << " [" << i << "]";
    largest = std::max(largest, std::abs(static_cast<double>(expected[i])));
    const double error = std::abs(static_cast<double>(got[i]) - expected[i]);
    if (error > worst) {
      worst = error;
      worst_index = i;
    }
  }
  EXPECT_LE(worst, tolerance * largest)
      << what << ": worst at index " << worst_index << " of " << got.size() << ", got " << got[worst_index]
      << ", expected " << expected[worst_index];
}

}  // namespace longfill
