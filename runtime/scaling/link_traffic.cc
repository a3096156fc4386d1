#include "runtime/scaling/link_traffic.h"

#include <algorithm>
#include <utility>

namespace longfill {
namespace {

constexpr int64_t kPieceBytes = int64_t{32} << 20;

}  // namespace

absl::StatusOr<std::unique_ptr<LinkTraffic>> LinkTraffic::Create(std::shared_ptr<Backend> device,
                                                                 const LinkRates& links) {
  std::unique_ptr<LinkTraffic> traffic(new LinkTraffic(std::move(device), links));
  LF_RETURN_IF_ERROR(traffic->Allocate());
  traffic->thread_ = std::thread([made = traffic.get()] { made->Run(); });
  return traffic;
}

absl::Status LinkTraffic::Allocate() {
  for (Buffer* piece : {&from_, &to_}) {
    LF_ASSIGN_OR_RETURN(*piece, device_->memory().Allocate(kPieceBytes, "a copy beside the work"));
  }
  const FillRandomParams random{.out = from_.data(), .count = kPieceBytes / DTypeBytes(DType::kFloat32)};
  LF_RETURN_IF_ERROR(device_->kernels().FillRandom(random, device_->stream()));
  for (std::unique_ptr<Event>& event : copied_) {
    LF_ASSIGN_OR_RETURN(event, device_->NewEvent());
  }
  return device_->stream().Sync();
}

LinkTraffic::~LinkTraffic() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
    loads_.clear();
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void LinkTraffic::Add(const ExchangeCall& call, std::span<const int> members, int me) {
  const LinkBytes bytes = BytesOnLinks(call, members, me, links_);
  const double all = bytes.node + bytes.network;
  if (all < 1) return;
  const double seconds = std::max(bytes.node / links_.node_gbs, bytes.network / links_.network_gbs) * 1e-9;
  {
    const std::lock_guard lock(mutex_);
    if (!status_.ok()) return;
    loads_.push_back({static_cast<int64_t>(all), seconds / all});
  }
  changed_.notify_all();
}

absl::Status LinkTraffic::Stop() {
  std::unique_lock lock(mutex_);
  loads_.clear();
  changed_.wait(lock, [this] { return !copying_; });  // the thread's waits have the deadline of the device
  return status_;
}

LinkTraffic::Figures LinkTraffic::figures() const {
  const std::lock_guard lock(mutex_);
  return figures_;
}

// Each piece is given when the links would begin with it; one that is late is given at once.
void LinkTraffic::Run() {
  Clock::time_point next{};  // when the links are free
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return ending_ || !loads_.empty(); });
    if (ending_) return;
    copying_ = true;
    const Clock::time_point begin = Clock::now();
    next = std::max(next, begin);
    absl::Status status;
    for (int piece = 0; !loads_.empty() && status.ok(); piece = 1 - piece) {
      Load& load = loads_.front();
      const int64_t bytes = std::min(load.bytes, kPieceBytes);
      const double seconds = load.seconds_per_byte * static_cast<double>(bytes);
      load.bytes -= bytes;
      if (load.bytes == 0) loads_.pop_front();
      lock.unlock();
      std::this_thread::sleep_until(next);
      next += std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
      status = Copy(bytes, piece);
      lock.lock();
      figures_.bytes += bytes;
    }
    lock.unlock();
    const absl::Status synced = device_->stream().Sync();
    lock.lock();
    figures_.seconds += std::chrono::duration<double>(std::max(next, Clock::now()) - begin).count();
    if (status_.ok()) status_ = status.ok() ? synced : status;
    if (!status_.ok()) loads_.clear();
    copying_ = false;
    changed_.notify_all();
  }
}

// Waits until at most one piece is on its way.
absl::Status LinkTraffic::Copy(int64_t bytes, int piece) {
  LF_RETURN_IF_ERROR(copied_[piece]->Wait());
  LF_RETURN_IF_ERROR(device_->kernels().Copy2D({.to = to_.data(),
                                                .to_pitch = bytes,
                                                .from = from_.data(),
                                                .from_pitch = bytes,
                                                .row_bytes = bytes,
                                                .rows = 1},
                                               device_->stream()));
  return copied_[piece]->Record(device_->stream());
}

}  // namespace longfill
