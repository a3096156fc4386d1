#include "runtime/scaling/scaling_figures.h"

#include <algorithm>
#include <set>
#include <utility>

namespace longfill {
namespace {

// The first layer that takes as long as `layer`.
int64_t FirstAlike(const PatternSet& patterns, int64_t num_recorded_layers, int64_t layer) {
  for (int64_t other = 0; other < layer; ++other) {
    const bool same_selections =
        num_recorded_layers == 0 || other % num_recorded_layers == layer % num_recorded_layers;
    if (same_selections && std::ranges::equal(patterns.layer(other), patterns.layer(layer))) return other;
  }
  return layer;
}

void Append(const RankSchedule& more, RankSchedule* schedule) {
  const auto exchanges_before = static_cast<int>(schedule->exchanges.size());
  for (ScheduleStep step : more.steps) {
    if (step.kind == ScheduleStep::Kind::kExchange) step.exchange += exchanges_before;
    schedule->steps.push_back(step);
  }
  schedule->exchanges.insert(schedule->exchanges.end(), more.exchanges.begin(), more.exchanges.end());
}

// Of all layers.
Schedule Assemble(const std::vector<RankRecording>& recordings, const LayerChoice& choice,
                  const std::vector<std::vector<int>>& groups) {
  Schedule schedule{.groups = groups, .ranks = {}};
  for (const RankRecording& recording : recordings) {
    RankSchedule rank;
    Append(recording.start.schedule, &rank);
    for (const size_t place : choice.stand_in) Append(recording.layers[place].schedule, &rank);
    schedule.ranks.push_back(std::move(rank));
  }
  return schedule;
}

double Imbalance(const std::vector<RankRecording>& recordings, const LayerChoice& choice) {
  double slowest = 0, all = 0;
  for (const size_t place : choice.stand_in) {
    double most = 0;
    for (const RankRecording& recording : recordings) {
      const double seconds = recording.layers[place].of(WorkPart::kAttention);
      most = std::max(most, seconds);
      all += seconds;
    }
    slowest += most;
  }
  return all > 0 ? slowest * static_cast<double>(recordings.size()) / all : 1;
}

void AddParts(const std::vector<RankRecording>& recordings, const LayerChoice& choice,
              ScalingFigures* figures) {
  for (const RankRecording& recording : recordings) {
    for (size_t part = 0; part < kNumWorkParts; ++part) {
      double seconds = recording.start.seconds[part];
      for (const size_t place : choice.stand_in) seconds += recording.layers[place].seconds[part];
      figures->mean_seconds[part] += seconds / static_cast<double>(recordings.size());
      figures->slowest_seconds[part] = std::max(figures->slowest_seconds[part], seconds);
    }
  }
}

}  // namespace

LayerChoice ChooseLayers(const PatternSet& patterns, int64_t num_recorded_layers, int64_t limit) {
  const int64_t num_layers = patterns.num_layers();
  const int64_t samples = limit > 0 ? std::min(limit, num_layers) : num_layers;
  std::vector<int64_t> stand_in;  // layers
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    const int64_t sample = layer * samples / num_layers;
    const int64_t middle = (2 * sample + 1) * num_layers / (2 * samples);
    stand_in.push_back(FirstAlike(patterns, num_recorded_layers, middle));
  }
  const std::set<int64_t> executed(stand_in.begin(), stand_in.end());
  LayerChoice choice{.executed = {executed.begin(), executed.end()}, .stand_in = {}};
  for (const int64_t layer : stand_in) {
    choice.stand_in.push_back(static_cast<size_t>(std::distance(executed.begin(), executed.find(layer))));
  }
  return choice;
}

absl::StatusOr<ScalingFigures> ComputeScalingFigures(const std::vector<RankRecording>& recordings,
                                                     const LayerChoice& choice,
                                                     const std::vector<std::vector<int>>& groups,
                                                     const LinkRates& links) {
  const Schedule schedule = Assemble(recordings, choice, groups);
  LF_ASSIGN_OR_RETURN(const ScheduleTimes times, Simulate(schedule, links));
  LinkRates instant = LinkRates::Instant();
  instant.ranks_per_node = links.ranks_per_node;
  LF_ASSIGN_OR_RETURN(const ScheduleTimes waiting, Simulate(schedule, instant));
  ScalingFigures figures;
  figures.seconds = times.seconds;
  figures.exposed_communication_seconds = times.seconds - waiting.seconds;
  for (const RankTimes& rank : times.ranks) {
    figures.communication_seconds = std::max(figures.communication_seconds, rank.exchange_seconds);
    figures.bytes.node = std::max(figures.bytes.node, rank.bytes.node);
    figures.bytes.network = std::max(figures.bytes.network, rank.bytes.network);
  }
  figures.imbalance = Imbalance(recordings, choice);
  AddParts(recordings, choice, &figures);
  return figures;
}

}  // namespace longfill
