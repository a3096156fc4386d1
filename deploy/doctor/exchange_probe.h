#ifndef LONGFILL_DEPLOY_DOCTOR_EXCHANGE_PROBE_H_
#define LONGFILL_DEPLOY_DOCTOR_EXCHANGE_PROBE_H_

// Measures a group through its communicator. All functions are collective; an error is the communicator's,
// each of whose calls has its deadline.

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels/base/status.h"
#include "kernels/base/stream.h"
#include "parallel/communicator.h"

namespace longfill {

// What is wrong with reductions over host memory, "a sum of integers: ..."; empty: they are right here. Sums
// and maxima of integers against closed forms, of fp64 against the same additions in the order of ranks.
absl::StatusOr<std::string> CheckReductions(Communicator& communicator);

// Median seconds of a reduction of one integer, of the slowest rank.
absl::StatusOr<double> MeasureLatency(Communicator& communicator);

// A message from one rank to another while every rank sends one, best of several.
struct LinkRate {
  int from = 0;
  int to = 0;
  double bytes_per_second = 0;  // until the receiver has it all
  bool intact = true;           // the bytes that came were those sent
};
// Of every pair in up to 16 ranks; beyond, of each rank and those 1, 2, 4, ... behind it. Known on all ranks.
absl::StatusOr<std::vector<LinkRate>> MeasureLinks(Communicator& communicator, int64_t bytes);

struct ClockOffset {
  double seconds = 0;      // that the clock is ahead of rank 0's
  double uncertainty = 0;  // plus or minus, half of the way there and back
};
// By rank, on all ranks; `wall_seconds` reads this rank's clock.
absl::StatusOr<std::vector<ClockOffset>> MeasureClocks(Communicator& communicator,
                                                       const std::function<double()>& wall_seconds);
double WallSeconds();  // of this host, since the epoch

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_DOCTOR_EXCHANGE_PROBE_H_
