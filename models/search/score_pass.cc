#include "models/search/score_pass.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "models/search/ticks.h"

namespace longfill {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

class ScorePass {
 public:
  ScorePass(const SearchModel& model, std::span<const std::vector<int32_t>> samples,
            std::span<const PatternSet> candidates, Communicator& world, const ScorePassOptions& options)
      : model_(model),
        samples_(samples),
        candidates_(candidates),
        world_(world),
        options_(options),
        num_layers_(model.config.num_layers),
        num_heads_(model.config.num_q_heads) {
    const int64_t units = std::ssize(samples) * num_layers_;
    begin_ = units * world.rank() / world.size();
    mine_.resize(static_cast<size_t>(units * (world.rank() + 1) / world.size() - begin_));
  }

  absl::StatusOr<ScoreCube> Run() {
    CpuStream stream;
    LF_RETURN_IF_ERROR(AgreeOnStatus(world_, LoadUnits(), stream));
    PlanForwards();
    Ticks ticks(world_);
    LF_RETURN_IF_ERROR(ticks.Start(forward_left_ + scored_left_ * (std::ssize(candidates_) + 1)));
    start_ = Clock::now();
    LF_RETURN_IF_ERROR(ticks.Finish(ScoreSamples(ticks)));
    return Gather();
  }

 private:
  // What a forward pass of a sample has to do here.
  struct Forward {
    int64_t sample = 0;
    int64_t end_layer = 0;
  };

  std::optional<UnitScores>* MineAt(int64_t sample, int64_t layer) {
    const int64_t place = sample * num_layers_ + layer - begin_;
    return place >= 0 && place < std::ssize(mine_) ? &mine_[static_cast<size_t>(place)] : nullptr;
  }
  ScoreUnit UnitAt(int64_t place) const {
    return {options_.pass, (begin_ + place) / num_layers_, (begin_ + place) % num_layers_};
  }

  absl::Status LoadUnits() {
    if (options_.state == nullptr) return absl::OkStatus();
    for (int64_t place = 0; place < std::ssize(mine_); ++place) {
      LF_ASSIGN_OR_RETURN(mine_[static_cast<size_t>(place)],
                          options_.state->Load(UnitAt(place), std::ssize(candidates_), num_heads_));
    }
    return absl::OkStatus();
  }

  void PlanForwards() {
    for (int64_t sample = 0; sample < std::ssize(samples_); ++sample) {
      Forward forward{.sample = sample};
      for (int64_t layer = 0; layer < num_layers_; ++layer) {
        const std::optional<UnitScores>* unit = MineAt(sample, layer);
        if (unit == nullptr || unit->has_value()) continue;
        forward.end_layer = layer + 1;
        ++scored_left_;
      }
      forward_left_ += forward.end_layer;
      if (forward.end_layer > 0) forwards_.push_back(forward);
    }
    forward_left_ -= scored_left_;
  }

  absl::Status ScoreSamples(Ticks& ticks) {
    for (const Forward& forward : forwards_) {
      SampleVisitor visitor;
      visitor.wants = [&](int64_t layer) {
        const std::optional<UnitScores>* unit = MineAt(forward.sample, layer);
        return unit != nullptr && !unit->has_value();
      };
      bool scored = false;
      visitor.look = [&](int64_t layer, const LayerHeads& heads, LayerScorer& scorer) -> absl::Status {
        scored = true;
        LF_ASSIGN_OR_RETURN(*MineAt(forward.sample, layer), ScoreLayer(layer, heads, scorer, ticks));
        if (options_.state == nullptr) return absl::OkStatus();
        return options_.state->Save({options_.pass, forward.sample, layer}, **MineAt(forward.sample, layer));
      };
      visitor.after_layer = [&](int64_t) {
        Progress(std::exchange(scored, false));
        return ticks.Tick(absl::OkStatus());
      };
      LF_RETURN_IF_ERROR(RunSample(model_, samples_[static_cast<size_t>(forward.sample)], forward.end_layer,
                                   options_.sample, visitor));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<UnitScores> ScoreLayer(int64_t layer, const LayerHeads& heads, LayerScorer& scorer,
                                        Ticks& ticks) {
    UnitScores scores;
    for (const PatternSet& candidate : candidates_) {
      LF_ASSIGN_OR_RETURN(std::vector<HeadScore> of_candidate, scorer.Score(heads, candidate.layer(layer)));
      scores.push_back(std::move(of_candidate));
      LF_RETURN_IF_ERROR(ticks.Tick(absl::OkStatus()));
    }
    return scores;
  }

  void Progress(bool scored) {
    int64_t& left = scored ? scored_left_ : forward_left_;
    --left;
    const double now = SecondsSince(start_);
    (scored ? scored_seconds_ : forward_seconds_) += now - last_;
    ++(scored ? scored_done_ : forward_done_);
    last_ = now;
    if (!options_.on_progress) return;
    const auto mean = [](double seconds, int64_t count) {
      return count > 0 ? seconds / static_cast<double>(count) : 0;
    };
    ScoreProgress progress{.pass = options_.pass, .seconds = now};
    progress.layers_done = scored_done_ + forward_done_;
    progress.num_layers = progress.layers_done + scored_left_ + forward_left_;
    progress.seconds_left = mean(scored_seconds_, scored_done_) * static_cast<double>(scored_left_) +
                            mean(forward_seconds_, forward_done_) * static_cast<double>(forward_left_);
    options_.on_progress(progress);
  }

  // Scores are exchanged as bytes between processes of one build.
  absl::StatusOr<ScoreCube> Gather() {
    std::string bytes;
    for (const std::optional<UnitScores>& unit : mine_) {
      for (const std::vector<HeadScore>& candidate : *unit) {
        bytes.append(reinterpret_cast<const char*>(candidate.data()), candidate.size() * sizeof(HeadScore));
      }
    }
    CpuStream stream;
    LF_ASSIGN_OR_RETURN(const std::vector<std::string> all, AllGatherStrings(world_, bytes, stream));
    const std::string joined = [&all] {
      std::string text;
      for (const std::string& piece : all) text += piece;
      return text;
    }();
    ScoreCube cube(std::ssize(samples_), num_layers_, std::ssize(candidates_), num_heads_);
    const size_t count =
        static_cast<size_t>(std::ssize(samples_) * num_layers_ * std::ssize(candidates_) * num_heads_);
    if (joined.size() != count * sizeof(HeadScore)) {
      return absl::InternalError(absl::StrCat("ranks gave ", joined.size(), " bytes of scores, expected ",
                                              count * sizeof(HeadScore)));
    }
    size_t place = 0;
    for (int64_t sample = 0; sample < cube.num_samples(); ++sample) {
      for (int64_t layer = 0; layer < num_layers_; ++layer) {
        for (int64_t candidate = 0; candidate < cube.num_candidates(); ++candidate) {
          for (int64_t head = 0; head < num_heads_; ++head) {
            HeadScore score;
            std::memcpy(&score, joined.data() + place++ * sizeof(HeadScore), sizeof(HeadScore));
            cube.Set(sample, layer, candidate, head, score);
          }
        }
      }
    }
    return cube;
  }

  const SearchModel& model_;
  const std::span<const std::vector<int32_t>> samples_;
  const std::span<const PatternSet> candidates_;
  Communicator& world_;
  const ScorePassOptions& options_;
  const int64_t num_layers_, num_heads_;
  int64_t begin_ = 0;                            // this rank's first unit
  std::vector<std::optional<UnitScores>> mine_;  // its units, as far as they are there
  std::vector<Forward> forwards_;

  Clock::time_point start_;
  double last_ = 0;
  int64_t forward_left_ = 0, scored_left_ = 0;  // layers
  int64_t forward_done_ = 0, scored_done_ = 0;
  double forward_seconds_ = 0, scored_seconds_ = 0;
};

}  // namespace

absl::StatusOr<ScoreCube> ScoreCandidates(const SearchModel& model,
                                          std::span<const std::vector<int32_t>> samples,
                                          std::span<const PatternSet> candidates, Communicator& world,
                                          const ScorePassOptions& options) {
  LF_CHECK(!samples.empty() && !candidates.empty());
  return ScorePass(model, samples, candidates, world, options).Run();
}

}  // namespace longfill
