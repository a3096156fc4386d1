#ifndef LONGFILL_RUNTIME_SCALING_LINK_TRAFFIC_H_
#define LONGFILL_RUNTIME_SCALING_LINK_TRAFFIC_H_

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <thread>

#include "kernels/api/backend.h"
#include "kernels/base/memory.h"
#include "kernels/base/status.h"
#include "runtime/scaling/link_model.h"

namespace longfill {

// The memory traffic of exchanges without peers: copies on the device as many bytes as a rank would receive,
// no faster than its links would bring them, beside whatever else the device does. All but Create and the
// destructor are thread-safe.
class LinkTraffic {
 public:
  // `device` is used by nobody else, since a thread of this object gives it the copies. Takes two pieces of
  // its memory.
  static absl::StatusOr<std::unique_ptr<LinkTraffic>> Create(std::shared_ptr<Backend> device,
                                                             const LinkRates& links);
  ~LinkTraffic();  // waits for the copies that are on their way
  LinkTraffic(const LinkTraffic&) = delete;
  LinkTraffic& operator=(const LinkTraffic&) = delete;

  // The bytes on the links of member `me`, after those of the calls before.
  void Add(const ExchangeCall& call, std::span<const int> members, int me);
  // Drops what has not been copied, and waits for what is on its way. The first error of the copies.
  absl::Status Stop();

  struct Figures {
    int64_t bytes = 0;   // copied
    double seconds = 0;  // in which there was something to copy
  };
  Figures figures() const;

 private:
  using Clock = std::chrono::steady_clock;
  struct Load {
    int64_t bytes = 0;  // still to copy
    double seconds_per_byte = 0;
  };

  LinkTraffic(std::shared_ptr<Backend> device, const LinkRates& links)
      : device_(std::move(device)), links_(links) {}
  absl::Status Allocate();
  void Run();
  absl::Status Copy(int64_t bytes, int piece);

  const std::shared_ptr<Backend> device_;
  const LinkRates links_;
  Buffer from_, to_;
  std::unique_ptr<Event> copied_[2];  // pieces by turns

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Load> loads_;
  bool copying_ = false;  // the thread is, or has pieces on their way
  bool ending_ = false;
  absl::Status status_;
  Figures figures_;
  std::thread thread_;
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_SCALING_LINK_TRAFFIC_H_
