#ifndef LONGFILL_MODELS_SEARCH_SEARCH_STATE_H_
#define LONGFILL_MODELS_SEARCH_SEARCH_STATE_H_

// What a search has scored so far, in a directory beside its result, so that one that was cut short goes on
// where it was: settings.json, and one file for each unit of work, each written as a whole or not at all.

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/base/status.h"
#include "models/search/layer_scorer.h"

namespace longfill {

// One layer of one sample under every candidate.
struct ScoreUnit {
  std::string pass;  // ScorePassOptions::pass: candidates differ from pass to pass
  int64_t sample = 0;
  int64_t layer = 0;
  friend bool operator==(const ScoreUnit&, const ScoreUnit&) = default;
};

using UnitScores = std::vector<std::vector<HeadScore>>;  // [candidate][head]

// A directory. Several ranks may write units of their own into one; settings are written by one of them
// before.
class SearchState {
 public:
  // Makes the directory with settings.json, or finds there what an earlier search with equal settings left.
  // `settings`: a JSON object, whatever decides the scores. InvalidArgument: the directory belongs to a
  // search with other settings (names the first that differs, with both values), or is none of a search.
  // Other statuses: it cannot be made or written.
  static absl::StatusOr<SearchState> Open(const std::string& directory, const std::string& settings);

  // Whole units only. InvalidArgument: the file is not what Save writes for these shapes.
  absl::StatusOr<std::optional<UnitScores>> Load(const ScoreUnit& unit, int64_t num_candidates,
                                                 int64_t num_heads) const;
  absl::Status Save(const ScoreUnit& unit, const UnitScores& scores) const;

  // The same of the influence of a layer's heads (models/search/influence.h).
  absl::StatusOr<std::optional<std::vector<double>>> LoadInfluence(const ScoreUnit& unit,
                                                                   int64_t num_heads) const;
  absl::Status SaveInfluence(const ScoreUnit& unit, const std::vector<double>& influence) const;

  // The cost table that the search measured itself, so that one that goes on has the same; none: empty text.
  absl::StatusOr<std::string> LoadCostTable() const;
  absl::Status SaveCostTable(const std::string& json) const;

  // Removes the files of a search, and the directory unless others are in it.
  void Remove() const;

 private:
  explicit SearchState(std::string directory) : directory_(std::move(directory)) {}
  std::string PathOf(const ScoreUnit& unit) const;

  std::string directory_;
};

}  // namespace longfill

#endif  // LONGFILL_MODELS_SEARCH_SEARCH_STATE_H_
