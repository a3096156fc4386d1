#ifndef LONGFILL_MODELS_SEARCH_SCORE_PASS_H_
#define LONGFILL_MODELS_SEARCH_SCORE_PASS_H_

// Scores candidates on every head, layer and sample. The work is units, one for each layer of each sample,
// dealt to the ranks in contiguous parts. A rank runs the forward pass of a sample by itself, up to the last
// layer that it scores; nothing is exchanged but the scores at the end, so they are the bits that one rank
// gets.

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "models/pattern_file.h"
#include "models/search/sample_pass.h"
#include "models/search/search_state.h"
#include "parallel/communicator.h"

namespace longfill {

// [sample][layer][candidate][head]
class ScoreCube {
 public:
  ScoreCube(int64_t num_samples, int64_t num_layers, int64_t num_candidates, int64_t num_heads)
      : num_samples_(num_samples),
        num_layers_(num_layers),
        num_candidates_(num_candidates),
        num_heads_(num_heads),
        scores_(static_cast<size_t>(num_samples * num_layers * num_candidates * num_heads)) {}

  int64_t num_samples() const { return num_samples_; }
  int64_t num_layers() const { return num_layers_; }
  int64_t num_candidates() const { return num_candidates_; }
  int64_t num_heads() const { return num_heads_; }
  const HeadScore& at(int64_t sample, int64_t layer, int64_t candidate, int64_t head) const {
    return scores_[Place(sample, layer, candidate, head)];
  }
  void Set(int64_t sample, int64_t layer, int64_t candidate, int64_t head, const HeadScore& score) {
    scores_[Place(sample, layer, candidate, head)] = score;
  }

 private:
  size_t Place(int64_t sample, int64_t layer, int64_t candidate, int64_t head) const {
    return static_cast<size_t>(((sample * num_layers_ + layer) * num_candidates_ + candidate) * num_heads_ +
                               head);
  }
  int64_t num_samples_, num_layers_, num_candidates_, num_heads_;
  std::vector<HeadScore> scores_;
};

struct ScoreProgress {
  std::string pass;
  int64_t layers_done = 0;  // of this rank's, forward only or scored, in this pass
  int64_t num_layers = 0;
  double seconds = 0;
  double seconds_left = 0;  // judged by what the units so far took, forward alone and scored apart
};

struct ScorePassOptions {
  std::string pass = "score";  // ScoreUnit
  SamplePassOptions sample;
  const SearchState* state = nullptr;                              // nullptr: nothing is kept
  std::function<void(const ScoreProgress& progress)> on_progress;  // may be empty
};

// Every rank calls this with equal samples and candidates, each a pattern for every layer and head. Errors,
// also Cancelled, are agreed on after the layer in which they struck and are the same on all ranks.
absl::StatusOr<ScoreCube> ScoreCandidates(const SearchModel& model,
                                          std::span<const std::vector<int32_t>> samples,
                                          std::span<const PatternSet> candidates, Communicator& world,
                                          const ScorePassOptions& options);

}  // namespace longfill

#endif  // LONGFILL_MODELS_SEARCH_SCORE_PASS_H_
