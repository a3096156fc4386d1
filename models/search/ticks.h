#ifndef LONGFILL_MODELS_SEARCH_TICKS_H_
#define LONGFILL_MODELS_SEARCH_TICKS_H_

#include <cstdint>

#include "kernels/base/stream.h"
#include "parallel/communicator.h"

namespace longfill {

// Keeps ranks with different amounts of work in step: all take as many ticks as the busiest, so that none
// waits longer for the others than one piece of work takes, and an error of one reaches all.
class Ticks {
 public:
  explicit Ticks(Communicator& world) : world_(world) {}

  absl::Status Start(int64_t mine) {
    most_ = mine;
    return world_.AllReduce(&most_, 1, ReduceType::kInt64, ReduceOp::kMax, stream_);
  }
  // Collective. An error is the same on all ranks, and the last tick.
  absl::Status Tick(const absl::Status& mine) {
    ++done_;
    absl::Status all = AgreeOnStatus(world_, mine, stream_);
    ended_ = !all.ok();
    return all;
  }
  // After this rank's work ended in `mine`.
  absl::Status Finish(const absl::Status& mine) {
    if (ended_) return mine;
    if (!mine.ok()) return Tick(mine);
    while (done_ < most_) LF_RETURN_IF_ERROR(Tick(absl::OkStatus()));
    return absl::OkStatus();
  }

 private:
  Communicator& world_;
  CpuStream stream_;
  int64_t most_ = 0;
  int64_t done_ = 0;
  bool ended_ = false;
};

}  // namespace longfill

#endif  // LONGFILL_MODELS_SEARCH_TICKS_H_
