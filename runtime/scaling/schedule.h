#ifndef LONGFILL_RUNTIME_SCALING_SCHEDULE_H_
#define LONGFILL_RUNTIME_SCALING_SCHEDULE_H_

// What several ranks give to the streams of their devices, and when it all would end. A value and a pure
// function of it.

#include <cstdint>
#include <vector>

#include "kernels/base/status.h"
#include "runtime/scaling/link_model.h"

namespace longfill {

inline constexpr int kHostStream = -1;  // a call that blocks the host
inline constexpr int kMainStream = 0;

struct ScheduleStep {
  enum class Kind : uint8_t {
    kWork,      // `seconds` on `stream`
    kRecord,    // `event` is where `stream` is now
    kWait,      // `stream` waits for `event`, which is past if it was never recorded
    kHostWait,  // the host waits for `event`
    kHostSync,  // the host waits for `stream`
    kExchange,  // call number `exchange` of the rank's exchanges, on `stream` or the host
    kPeerCopy,  // `bytes` from a peer of the rank's node, on `stream`
  };
  Kind kind = Kind::kWork;
  int stream = kMainStream;
  int event = 0;
  int exchange = 0;
  double seconds = 0;
  int64_t bytes = 0;
};

struct ScheduledExchange {
  int group = 0;  // of Schedule::groups
  ExchangeCall call;
};

// One rank, in the order in which its host gave the steps.
struct RankSchedule {
  std::vector<ScheduleStep> steps;
  std::vector<ScheduledExchange> exchanges;
};

struct Schedule {
  std::vector<std::vector<int>> groups;  // members, ranks of the world in the order of the group
  std::vector<RankSchedule> ranks;
};

struct RankTimes {
  double end_seconds = 0;        // when its host and all of its streams are through
  double main_work_seconds = 0;  // of the main stream
  double exchange_seconds = 0;   // on the links, without waiting for peers
  LinkBytes bytes;               // on its links
};

struct ScheduleTimes {
  double seconds = 0;  // of the last rank
  std::vector<RankTimes> ranks;
};

// Runs the schedule. The rules:
// - steps of one stream follow one another, streams of a rank run side by side, and no step begins before the
//   host has given it; giving takes no time;
// - the n-th call of a group is the n-th of each of its members. It begins when the last of them is there and
//   the links of all are free: exchanges of one rank do not share its links, but follow one another in the
//   order given. It ends for all members at once;
// - copies from peers come at the rate of the link, beside exchanges, which are small then.
// Internal, naming rank, group and call: members whose calls differ in kind, or ranks that wait for a call
// that a peer never makes.
absl::StatusOr<ScheduleTimes> Simulate(const Schedule& schedule, const LinkRates& links);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_SCALING_SCHEDULE_H_
