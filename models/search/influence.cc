#include "models/search/influence.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "models/pattern_file.h"
#include "models/search/ticks.h"
#include "models/transformer.h"
#include "parallel/parallel_attention.h"
#include "parallel/sparse_index_builder.h"

namespace longfill {
namespace {

using Clock = std::chrono::steady_clock;

// KL(softmax(p) || softmax(q)), in nats.
double Divergence(std::span<const float> p, std::span<const float> q) {
  const auto log_sum = [](std::span<const float> logits) {
    const double highest = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (const float logit : logits) sum += std::exp(logit - highest);
    return highest + std::log(sum);
  };
  const double p_sum = log_sum(p), q_sum = log_sum(q);
  double divergence = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    const double log_p = p[i] - p_sum;
    divergence += std::exp(log_p) * (log_p - (q[i] - q_sum));
  }
  return divergence < 0 ? 0 : divergence;  // but for rounding it is not below
}

// The forward pass of one sample on one rank, from any layer whose input was kept.
class CutPass {
 public:
  static absl::StatusOr<std::unique_ptr<CutPass>> Create(const SearchModel& model,
                                                         const std::vector<int32_t>& ids,
                                                         const SamplePassOptions& options) {
    std::unique_ptr<CutPass> pass(new CutPass(model, ids, options));
    const AttentionGeometry geometry = GeometryOf(model.config);
    LF_ASSIGN_OR_RETURN(pass->transformer_,
                        Transformer::Create(model.config, model.weights, model.backend, pass->plan_, 0));
    LF_ASSIGN_OR_RETURN(SparseIndexBuilder builder, SparseIndexBuilder::Create(model.backend, *pass->single_,
                                                                               geometry, options.coverage));
    pass->builder_ = std::make_unique<SparseIndexBuilder>(std::move(builder));
    LF_ASSIGN_OR_RETURN(pass->attention_,
                        ParallelAttention::Create(model.backend, *pass->single_, Mesh{1, 1}, geometry));
    LF_ASSIGN_OR_RETURN(pass->kept_, model.backend.memory().Allocate(pass->transformer_->hidden_bytes(),
                                                                     "the hidden state before a layer"));
    return pass;
  }
  // What was enqueued uses memory that is given back now.
  ~CutPass() { backend_.stream().Sync().IgnoreError(); }

  absl::Status Embed() { return transformer_->Embed(ids_); }
  absl::Status Keep() { return transformer_->CopyHiddenOut(kept_.data()); }
  absl::Status GoBack() { return transformer_->CopyHiddenIn(kept_.data()); }

  absl::Status RunLayer(int64_t layer, std::span<const HeadPattern> patterns) {
    LayerParallelism parallel{.index_builder = builder_.get(), .attention = attention_.get()};
    parallel.dense_without_room = true;
    LF_RETURN_IF_ERROR(transformer_->RunLayer(layer, patterns, parallel, LoneCallbacks(options_)));
    return backend_.stream().Sync();
  }
  absl::StatusOr<std::vector<float>> NextTokenLogits() {
    std::vector<float> logits(static_cast<size_t>(vocab_size_));
    const int64_t last = plan_.num_tokens() - 1;
    LF_RETURN_IF_ERROR(transformer_->Logits({&last, 1}, logits));
    return logits;
  }

 private:
  CutPass(const SearchModel& model, const std::vector<int32_t>& ids, const SamplePassOptions& options)
      : backend_(model.backend),
        ids_(ids),
        options_(options),
        vocab_size_(model.config.vocab_size),
        plan_(Mesh{1, 1}, std::ssize(ids)),
        single_(CreateSingleCommunicator()) {}

  Backend& backend_;
  const std::vector<int32_t>& ids_;
  const SamplePassOptions& options_;
  const int64_t vocab_size_;
  const ShardPlan plan_;
  const std::unique_ptr<Communicator> single_;
  std::unique_ptr<SparseIndexBuilder> builder_;
  std::unique_ptr<ParallelAttention> attention_;
  std::unique_ptr<Transformer> transformer_;
  Buffer kept_;
};

class InfluencePass {
 public:
  InfluencePass(const SearchModel& model, std::span<const std::vector<int32_t>> samples,
                const HeadPattern& base, Communicator& world, const ScorePassOptions& options)
      : model_(model),
        samples_(samples),
        world_(world),
        options_(options),
        num_layers_(model.config.num_layers),
        num_heads_(model.config.num_q_heads),
        base_(static_cast<size_t>(num_heads_), base),
        ticks_(world),
        units_(static_cast<size_t>(std::ssize(samples) * num_layers_)) {}

  absl::StatusOr<std::vector<double>> Run() {
    CpuStream stream;
    LF_RETURN_IF_ERROR(AgreeOnStatus(world_, LoadUnits(), stream));
    CountLayers();
    LF_RETURN_IF_ERROR(ticks_.Start(layers_left_));
    start_ = Clock::now();
    LF_RETURN_IF_ERROR(ticks_.Finish(MeasureSamples()));
    return Gather();
  }

 private:
  using Unit = std::optional<std::vector<double>>;  // [head]

  bool IsMine(size_t place) const { return static_cast<int>(place) % world_.size() == world_.rank(); }
  Unit& UnitAt(int64_t sample, int64_t layer) {
    return units_[static_cast<size_t>(sample * num_layers_ + layer)];
  }
  bool IsLeft(int64_t sample, int64_t layer) const {
    const auto place = static_cast<size_t>(sample * num_layers_ + layer);
    return IsMine(place) && !units_[place].has_value();
  }
  int64_t EndOfLeft(int64_t sample) const {
    int64_t end = num_layers_;
    while (end > 0 && !IsLeft(sample, end - 1)) --end;
    return end;
  }

  absl::Status LoadUnits() {
    if (options_.state == nullptr) return absl::OkStatus();
    for (size_t place = 0; place < units_.size(); ++place) {
      if (!IsMine(place)) continue;
      LF_ASSIGN_OR_RETURN(units_[place], options_.state->LoadInfluence(StateUnit(place), num_heads_));
    }
    return absl::OkStatus();
  }
  ScoreUnit StateUnit(size_t place) const {
    return {options_.pass, static_cast<int64_t>(place) / num_layers_,
            static_cast<int64_t>(place) % num_layers_};
  }

  // Of a sample: the base from the first layer to the end; then again up to the last layer that is left, and
  // from each of these to the end for each head.
  void CountLayers() {
    for (int64_t sample = 0; sample < std::ssize(samples_); ++sample) {
      const int64_t end = EndOfLeft(sample);
      if (end == 0) continue;
      layers_left_ += num_layers_ + end;
      for (int64_t layer = 0; layer < end; ++layer) {
        if (IsLeft(sample, layer)) layers_left_ += num_heads_ * (num_layers_ - layer);
      }
    }
  }

  absl::Status MeasureSamples() {
    for (int64_t sample = 0; sample < std::ssize(samples_); ++sample) {
      if (EndOfLeft(sample) > 0) LF_RETURN_IF_ERROR(MeasureSample(sample));
    }
    return absl::OkStatus();
  }

  absl::Status MeasureSample(int64_t sample) {
    const std::vector<int32_t>& ids = samples_[static_cast<size_t>(sample)];
    LF_ASSIGN_OR_RETURN(const std::unique_ptr<CutPass> pass, CutPass::Create(model_, ids, options_.sample));
    LF_RETURN_IF_ERROR(pass->Embed());
    LF_RETURN_IF_ERROR(RunToEnd(*pass, 0, base_));
    LF_ASSIGN_OR_RETURN(const std::vector<float> whole, pass->NextTokenLogits());
    LF_RETURN_IF_ERROR(pass->Embed());
    for (int64_t layer = 0, end = EndOfLeft(sample); layer < end; ++layer) {
      if (IsLeft(sample, layer)) {
        LF_RETURN_IF_ERROR(pass->Keep());
        LF_ASSIGN_OR_RETURN(std::vector<double> influence,
                            CutHeads(*pass, layer, whole, CutPattern(std::ssize(ids))));
        if (options_.state != nullptr) {
          LF_RETURN_IF_ERROR(options_.state->SaveInfluence({options_.pass, sample, layer}, influence));
        }
        UnitAt(sample, layer) = std::move(influence);
      }
      LF_RETURN_IF_ERROR(RunLayer(*pass, layer, base_));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::vector<double>> CutHeads(CutPass& pass, int64_t layer, std::span<const float> whole,
                                               const HeadPattern& cut) {
    std::vector<double> influence;
    for (int64_t head = 0; head < num_heads_; ++head) {
      std::vector<HeadPattern> patterns = base_;
      patterns[static_cast<size_t>(head)] = cut;
      LF_RETURN_IF_ERROR(RunToEnd(pass, layer, patterns));
      LF_ASSIGN_OR_RETURN(const std::vector<float> logits, pass.NextTokenLogits());
      LF_RETURN_IF_ERROR(pass.GoBack());
      influence.push_back(Divergence(whole, logits));
      if (!std::isfinite(influence.back())) {
        return absl::InternalError(absl::StrCat("layer ", layer, ", head ", head,
                                                ": without its far keys the next token has a divergence of ",
                                                influence.back()));
      }
    }
    return influence;
  }

  // The first of these layers with `patterns`, those after it with the base.
  absl::Status RunToEnd(CutPass& pass, int64_t layer, std::span<const HeadPattern> patterns) {
    for (int64_t l = layer; l < num_layers_; ++l) {
      LF_RETURN_IF_ERROR(RunLayer(pass, l, l == layer ? patterns : base_));
    }
    return absl::OkStatus();
  }
  absl::Status RunLayer(CutPass& pass, int64_t layer, std::span<const HeadPattern> patterns) {
    LF_RETURN_IF_ERROR(pass.RunLayer(layer, patterns));
    --layers_left_;
    ++layers_done_;
    if (options_.on_progress) {
      const double seconds = std::chrono::duration<double>(Clock::now() - start_).count();
      options_.on_progress(
          {.pass = options_.pass,
           .layers_done = layers_done_,
           .num_layers = layers_done_ + layers_left_,
           .seconds = seconds,
           .seconds_left = seconds / static_cast<double>(layers_done_) * static_cast<double>(layers_left_)});
    }
    return ticks_.Tick(absl::OkStatus());
  }

  // Each rank's units, one behind the other, as bytes between processes of one build.
  absl::StatusOr<std::vector<double>> Gather() {
    std::string bytes;
    for (size_t place = 0; place < units_.size(); ++place) {
      if (!IsMine(place)) continue;
      bytes.append(reinterpret_cast<const char*>(units_[place]->data()),
                   units_[place]->size() * sizeof(double));
    }
    CpuStream stream;
    LF_ASSIGN_OR_RETURN(const std::vector<std::string> all, AllGatherStrings(world_, bytes, stream));
    const size_t unit_bytes = static_cast<size_t>(num_heads_) * sizeof(double);
    std::vector<double> influence(static_cast<size_t>(num_layers_ * num_heads_), 0.0);
    for (size_t place = 0; place < units_.size(); ++place) {
      const std::string& of_rank = all[place % all.size()];
      const size_t offset = place / all.size() * unit_bytes;
      if (offset + unit_bytes > of_rank.size()) {
        return absl::InternalError(absl::StrCat("rank ", place % all.size(), " gave ", of_rank.size(),
                                                " bytes of influence, expected ", offset + unit_bytes));
      }
      std::vector<double> unit(static_cast<size_t>(num_heads_));
      std::memcpy(unit.data(), of_rank.data() + offset, unit_bytes);
      const size_t first = place % static_cast<size_t>(num_layers_) * unit.size();
      for (size_t head = 0; head < unit.size(); ++head) {
        influence[first + head] += unit[head] / static_cast<double>(samples_.size());
      }
    }
    return influence;
  }

  const SearchModel& model_;
  const std::span<const std::vector<int32_t>> samples_;
  Communicator& world_;
  const ScorePassOptions& options_;
  const int64_t num_layers_, num_heads_;
  const std::vector<HeadPattern> base_;
  Ticks ticks_;
  std::vector<Unit> units_;  // [sample][layer], this rank's as far as they are there
  Clock::time_point start_;
  int64_t layers_left_ = 0, layers_done_ = 0;
};

}  // namespace

AShape CutPattern(int64_t num_tokens) {
  return {std::min<int64_t>(64, num_tokens / 32), std::clamp<int64_t>(num_tokens / 8, 1, 1024)};
}

absl::StatusOr<std::vector<double>> MeasureInfluence(const SearchModel& model,
                                                     std::span<const std::vector<int32_t>> samples,
                                                     const HeadPattern& base, Communicator& world,
                                                     const ScorePassOptions& options) {
  LF_CHECK(!samples.empty());
  return InfluencePass(model, samples, base, world, options).Run();
}

std::vector<size_t> DecisiveHeads(std::span<const double> influence, double share) {
  std::vector<size_t> places;
  double all = 0;
  for (size_t place = 0; place < influence.size(); ++place) {
    if (influence[place] < kLeastInfluence) continue;
    places.push_back(place);
    all += influence[place];
  }
  std::stable_sort(places.begin(), places.end(),
                   [&](size_t a, size_t b) { return influence[a] > influence[b]; });
  double sum = 0;
  size_t count = 0;
  while (count < places.size() && sum < share * all) sum += influence[places[count++]];
  places.resize(count);
  std::sort(places.begin(), places.end());
  return places;
}

}  // namespace longfill
