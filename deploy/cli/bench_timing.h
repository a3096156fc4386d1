#ifndef LONGFILL_DEPLOY_CLI_BENCH_TIMING_H_
#define LONGFILL_DEPLOY_CLI_BENCH_TIMING_H_

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "kernels/base/median.h"

namespace longfill {

// Seconds of one thing, measured several times.
struct Timing {
  double median = 0;
  double least = 0;
  double most = 0;

  double Spread() const { return median > 0 ? (most - least) / median : 0; }
};

// Precondition: not empty.
inline Timing TimingOf(const std::vector<double>& seconds) {
  const auto [least, most] = std::minmax_element(seconds.begin(), seconds.end());
  return {Median(seconds), *least, *most};
}

inline nlohmann::ordered_json ToJson(const Timing& timing) {
  return {{"median", timing.median}, {"min", timing.least}, {"max", timing.most}};
}

// "  12.345 ms (12.301 to 12.402)"
inline std::string ToText(const Timing& timing) {
  return absl::StrFormat("%10.3f ms (%.3f to %.3f)", 1e3 * timing.median, 1e3 * timing.least,
                         1e3 * timing.most);
}

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_BENCH_TIMING_H_
