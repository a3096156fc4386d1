#ifndef LONGFILL_RUNTIME_KV_TRANSFER_STATE_H_
#define LONGFILL_RUNTIME_KV_TRANSFER_STATE_H_

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>

#include "kernels/base/status.h"

namespace longfill {

// Life of a transfer on one rank. Exactly one terminal state, and nothing after it:
//
//   from   what happens                                              to
//   OPEN   the consumer has all (EndTransfer COMPLETE)               COMPLETE
//   OPEN   the consumer gives up, or the prefill was cancelled       ABORTED
//   OPEN   the prefill failed, or a rank was lost                    FAILED
//   OPEN   no sign of life for a lease (only when Lease::Runs)       EXPIRED
//   ended  anything                                                  unchanged
enum class TransferState : uint8_t { kOpen, kComplete, kAborted, kFailed, kExpired };

std::string_view TransferStateName(TransferState state);  // "open", "complete", ...
bool IsLegalTransition(TransferState from, TransferState to);

// What somebody gets who asks for pages of a transfer that ended so: complete and expired are NotFound,
// aborted is Aborted, failed keeps the code of `reason`.
absl::Status EndedStatus(const std::string& transfer_id, TransferState state, const absl::Status& reason);

// When a transfer expires: `duration` after the last sign of life, and never while its prefill runs or
// someone reads. Pure arithmetic on times that it is given; guarded by its owner.
class Lease {
 public:
  using Time = std::chrono::steady_clock::time_point;
  Lease(std::chrono::milliseconds duration, Time now) : duration_(duration), last_sign_(now) {}

  void SignOfLife(Time now) { last_sign_ = now; }
  void PrefillDone(Time now) {
    prefill_running_ = false;
    last_sign_ = now;
  }
  void ReaderCame() { ++readers_; }
  void ReaderWent(Time now) {
    --readers_;
    last_sign_ = now;
  }

  bool Runs() const { return !prefill_running_ && readers_ == 0; }
  bool Expired(Time now) const { return Runs() && now - last_sign_ >= duration_; }
  std::chrono::milliseconds Remaining(Time now) const {
    return std::chrono::duration_cast<std::chrono::milliseconds>(last_sign_ + duration_ - now);
  }
  int readers() const { return readers_; }
  bool prefill_running() const { return prefill_running_; }

 private:
  std::chrono::milliseconds duration_;
  Time last_sign_;
  int readers_ = 0;
  bool prefill_running_ = true;
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_KV_TRANSFER_STATE_H_
