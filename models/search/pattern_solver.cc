#include "models/search/pattern_solver.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "absl/strings/str_cat.h"

namespace longfill {
namespace {

using Heads = std::span<const std::vector<HeadOption>>;

// One head goes from an option to the next one of its hull.
struct Step {
  size_t head = 0;
  size_t option = 0;  // where it comes to
  double seconds = 0;
  double value = 0;
  double slope = 0;  // never above that of the head's step before, also where rounding would have it so
};

// The options of a head from the cheapest to the most valuable one, slopes falling.
std::vector<size_t> UpperHull(const std::vector<HeadOption>& options) {
  std::vector<size_t> order(options.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    if (options[a].seconds != options[b].seconds) return options[a].seconds < options[b].seconds;
    return options[a].value > options[b].value;
  });
  std::vector<size_t> hull;
  for (const size_t next : order) {
    if (!hull.empty() && options[next].value <= options[hull.back()].value) continue;
    while (hull.size() >= 2) {
      const HeadOption& a = options[hull[hull.size() - 2]];
      const HeadOption& b = options[hull.back()];
      const HeadOption& c = options[next];
      // b is on the hull only if it lies above the line from a to c.
      if ((b.value - a.value) * (c.seconds - a.seconds) > (c.value - a.value) * (b.seconds - a.seconds))
        break;
      hull.pop_back();
    }
    hull.push_back(next);
  }
  return hull;
}

struct Walk {
  std::vector<size_t> cheapest;  // of each head
  std::vector<Step> steps;       // the best first
};

Walk MakeWalk(Heads heads) {
  LF_CHECK(!heads.empty());
  Walk walk;
  for (size_t head = 0; head < heads.size(); ++head) {
    LF_CHECK(!heads[head].empty());
    const std::vector<size_t> hull = UpperHull(heads[head]);
    walk.cheapest.push_back(hull.front());
    double slope = std::numeric_limits<double>::infinity();
    for (size_t i = 1; i < hull.size(); ++i) {
      const HeadOption& from = heads[head][hull[i - 1]];
      const HeadOption& to = heads[head][hull[i]];
      const double seconds = to.seconds - from.seconds;
      const double value = to.value - from.value;
      slope = std::min(slope, value / seconds);
      walk.steps.push_back({head, hull[i], seconds, value, slope});
    }
  }
  std::stable_sort(walk.steps.begin(), walk.steps.end(),
                   [](const Step& a, const Step& b) { return a.slope > b.slope; });
  return walk;
}

// Summed anew, in the order of the heads, so that equal choices have equal sums.
TradeOffPoint Sum(Heads heads, const std::vector<size_t>& options) {
  TradeOffPoint sum;
  for (size_t head = 0; head < heads.size(); ++head) {
    sum.seconds += heads[head][options[head]].seconds;
    sum.mean_value += heads[head][options[head]].value;
  }
  sum.mean_value /= static_cast<double>(heads.size());
  return sum;
}

// The single change of one head that `gain` says is worth most, above 0; false: there is none.
template <typename Gain>
bool ImproveOnce(Heads heads, std::vector<size_t>* options, Gain gain) {
  double best = 0;
  size_t best_head = 0, best_option = 0;
  for (size_t head = 0; head < heads.size(); ++head) {
    const HeadOption& now = heads[head][(*options)[head]];
    for (size_t option = 0; option < heads[head].size(); ++option) {
      const HeadOption& other = heads[head][option];
      const double worth = gain(other.seconds - now.seconds, other.value - now.value);
      if (worth <= best) continue;
      best = worth;
      best_head = head;
      best_option = option;
    }
  }
  if (best > 0) (*options)[best_head] = best_option;
  return best > 0;
}

absl::StatusOr<PatternChoice> ChooseWithin(Heads heads, const Walk& walk, double most_seconds) {
  PatternChoice choice{walk.cheapest, Sum(heads, walk.cheapest)};
  if (choice.reached.seconds > most_seconds) {
    return absl::InvalidArgumentError(absl::StrCat("the cheapest candidates take ", choice.reached.seconds,
                                                   " s, and the target is ", most_seconds, " s"));
  }
  for (const Step& step : walk.steps) {
    if (choice.reached.seconds + step.seconds > most_seconds) break;
    choice.options[step.head] = step.option;
    choice.reached.seconds += step.seconds;
  }
  do {
    choice.reached = Sum(heads, choice.options);
  } while (ImproveOnce(heads, &choice.options, [&](double seconds, double value) {
    return choice.reached.seconds + seconds <= most_seconds ? value : 0;
  }));
  return choice;
}

absl::StatusOr<PatternChoice> ChooseWithValue(Heads heads, const Walk& walk, double least_value) {
  PatternChoice choice{walk.cheapest, Sum(heads, walk.cheapest)};
  for (const Step& step : walk.steps) {
    if (choice.reached.mean_value >= least_value) break;
    choice.options[step.head] = step.option;
    choice.reached = Sum(heads, choice.options);
  }
  if (choice.reached.mean_value < least_value) {
    return absl::InvalidArgumentError(absl::StrCat("the most valuable candidates reach ",
                                                   choice.reached.mean_value, ", and the target is ",
                                                   least_value));
  }
  const auto num_heads = static_cast<double>(heads.size());
  std::vector<size_t> options = choice.options;
  while (ImproveOnce(heads, &options, [&](double seconds, double value) {
    return choice.reached.mean_value + value / num_heads >= least_value ? -seconds : 0;
  })) {
    const TradeOffPoint reached = Sum(heads, options);
    if (reached.mean_value < least_value) break;  // by the rounding of a sum
    choice = {options, reached};
  }
  return choice;
}

}  // namespace

std::vector<TradeOffPoint> TradeOffCurve(Heads heads) {
  const Walk walk = MakeWalk(heads);
  TradeOffPoint point = Sum(heads, walk.cheapest);
  std::vector<TradeOffPoint> curve = {point};
  for (const Step& step : walk.steps) {
    point.seconds += step.seconds;
    point.mean_value += step.value / static_cast<double>(heads.size());
    curve.push_back(point);
  }
  return curve;
}

absl::StatusOr<PatternChoice> ChoosePatterns(Heads heads, const SolverTarget& target) {
  LF_CHECK(target.most_seconds.has_value() != target.least_value.has_value());
  const Walk walk = MakeWalk(heads);
  if (target.most_seconds) return ChooseWithin(heads, walk, *target.most_seconds);
  return ChooseWithValue(heads, walk, *target.least_value);
}

}  // namespace longfill
