#include "runtime/scaling/schedule.h"

#include <algorithm>
#include <map>

#include "absl/strings/str_cat.h"

namespace longfill {
namespace {

// Clocks of one rank.
struct Clocks {
  double host = 0;
  double links_free = 0;
  std::map<int, double> streams;
  std::map<int, double> events;
  size_t next_step = 0;

  // When work that is given now can begin.
  double Ready(int stream) {
    if (stream == kHostStream) return host;
    return std::max(host, streams[stream]);
  }
  void Set(int stream, double time) {
    if (stream == kHostStream) {
      host = time;
    } else {
      streams[stream] = time;
    }
  }
};

// A call that not all members have come to.
struct Meeting {
  struct Arrival {
    int rank = 0;
    int stream = 0;
    double ready = 0;
    const ExchangeCall* call = nullptr;
  };
  std::vector<Arrival> arrivals;
};

class Simulation {
 public:
  Simulation(const Schedule& schedule, const LinkRates& links)
      : schedule_(schedule),
        links_(links),
        clocks_(schedule.ranks.size()),
        waiting_(schedule.ranks.size(), false),
        times_{.ranks = std::vector<RankTimes>(schedule.ranks.size())},
        meetings_(schedule.groups.size()) {}

  absl::StatusOr<ScheduleTimes> Run() {
    bool moved = true;
    while (moved) {
      moved = false;
      for (size_t rank = 0; rank < clocks_.size(); ++rank) {
        LF_ASSIGN_OR_RETURN(const bool went, Advance(static_cast<int>(rank)));
        moved = moved || went;
      }
    }
    for (size_t rank = 0; rank < clocks_.size(); ++rank) LF_RETURN_IF_ERROR(Finish(rank));
    return std::move(times_);
  }

 private:
  // Until the rank waits for peers in an exchange. Whether it took a step.
  absl::StatusOr<bool> Advance(int rank) {
    Clocks& clocks = clocks_[rank];
    const std::vector<ScheduleStep>& steps = schedule_.ranks[rank].steps;
    const size_t first = clocks.next_step;
    while (!waiting_[rank] && clocks.next_step < steps.size()) {
      const ScheduleStep& step = steps[clocks.next_step++];
      if (step.kind == ScheduleStep::Kind::kExchange) {
        LF_RETURN_IF_ERROR(Arrive(rank, step));
      } else {
        Take(step, clocks, times_.ranks[rank]);
      }
    }
    return clocks.next_step > first;
  }

  void Take(const ScheduleStep& step, Clocks& clocks, RankTimes& times) const {
    switch (step.kind) {
      case ScheduleStep::Kind::kWork:
        clocks.Set(step.stream, clocks.Ready(step.stream) + step.seconds);
        if (step.stream == kMainStream) times.main_work_seconds += step.seconds;
        return;
      case ScheduleStep::Kind::kPeerCopy: {
        const auto bytes = static_cast<double>(step.bytes);
        const double seconds = bytes / (links_.node_gbs * 1e9);
        clocks.Set(step.stream, clocks.Ready(step.stream) + seconds);
        times.exchange_seconds += seconds;
        times.bytes.node += bytes;
        return;
      }
      case ScheduleStep::Kind::kRecord:
        clocks.events[step.event] = clocks.Ready(step.stream);
        return;
      case ScheduleStep::Kind::kWait:
        clocks.Set(step.stream, std::max(clocks.Ready(step.stream), clocks.events[step.event]));
        return;
      case ScheduleStep::Kind::kHostWait:
        clocks.host = std::max(clocks.host, clocks.events[step.event]);
        return;
      case ScheduleStep::Kind::kHostSync:
        clocks.host = clocks.Ready(step.stream);
        return;
      case ScheduleStep::Kind::kExchange:
        return;
    }
  }

  absl::Status Arrive(int rank, const ScheduleStep& step) {
    const ScheduledExchange& exchange = schedule_.ranks[rank].exchanges[static_cast<size_t>(step.exchange)];
    const std::vector<int>& members = schedule_.groups[static_cast<size_t>(exchange.group)];
    Meeting& meeting = meetings_[static_cast<size_t>(exchange.group)];
    meeting.arrivals.push_back({rank, step.stream, clocks_[rank].Ready(step.stream), &exchange.call});
    const Meeting::Arrival& first = meeting.arrivals.front();
    if (exchange.call.kind != first.call->kind) {
      return absl::InternalError(absl::StrCat("schedule: in group ", exchange.group, " rank ", rank,
                                              " calls ", ToString(exchange.call.kind), ", rank ", first.rank,
                                              " ", ToString(first.call->kind)));
    }
    waiting_[rank] = true;
    if (meeting.arrivals.size() == members.size()) Meet(members, meeting);
    return absl::OkStatus();
  }

  void Meet(const std::vector<int>& members, Meeting& meeting) {
    std::vector<LinkBytes> bytes(members.size());
    double begin = 0;
    for (const Meeting::Arrival& arrival : meeting.arrivals) {
      const auto me = std::ranges::find(members, arrival.rank) - members.begin();
      bytes[me] = BytesOnLinks(*arrival.call, members, static_cast<int>(me), links_);
      RankTimes& times = times_.ranks[arrival.rank];
      times.bytes.node += bytes[me].node;
      times.bytes.network += bytes[me].network;
      begin = std::max({begin, arrival.ready, clocks_[arrival.rank].links_free});
    }
    const double seconds = ExchangeSeconds(bytes, members, links_);
    for (const Meeting::Arrival& arrival : meeting.arrivals) {
      Clocks& clocks = clocks_[arrival.rank];
      clocks.Set(arrival.stream, begin + seconds);
      clocks.links_free = begin + seconds;
      times_.ranks[arrival.rank].exchange_seconds += seconds;
      waiting_[arrival.rank] = false;
    }
    meeting.arrivals.clear();
  }

  absl::Status Finish(size_t rank) {
    const Clocks& clocks = clocks_[rank];
    const RankSchedule& mine = schedule_.ranks[rank];
    if (waiting_[rank] || clocks.next_step < mine.steps.size()) {
      const ScheduleStep& step = mine.steps[clocks.next_step - 1];
      const ScheduledExchange& exchange = mine.exchanges[static_cast<size_t>(step.exchange)];
      return absl::InternalError(absl::StrCat("schedule: rank ", rank, " waits in ",
                                              ToString(exchange.call.kind), " of group ", exchange.group,
                                              " for ranks that never come"));
    }
    double& end = times_.ranks[rank].end_seconds;
    end = clocks.host;
    for (const auto& [stream, time] : clocks.streams) end = std::max(end, time);
    times_.seconds = std::max(times_.seconds, end);
    return absl::OkStatus();
  }

  const Schedule& schedule_;
  const LinkRates& links_;
  std::vector<Clocks> clocks_;
  std::vector<bool> waiting_;  // for peers
  ScheduleTimes times_;
  std::vector<Meeting> meetings_;  // [group]
};

}  // namespace

absl::StatusOr<ScheduleTimes> Simulate(const Schedule& schedule, const LinkRates& links) {
  LF_RETURN_IF_ERROR(Validate(links));
  return Simulation(schedule, links).Run();
}

}  // namespace longfill
