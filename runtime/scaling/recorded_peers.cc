#include "runtime/scaling/recorded_peers.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace longfill {

RecordedPeers::RecordedPeers(std::vector<int> members, int rank, RecordedBackend& backend,
                             LinkTraffic* traffic)
    : rank_(rank), backend_(backend), traffic_(traffic), members_(std::move(members)) {}

absl::StatusOr<std::unique_ptr<PeerMemory>> RecordedPeers::Open(std::span<const Buffer* const> own,
                                                                int64_t bytes) {
  Backend& device = backend_.of_device();
  LF_ASSIGN_OR_RETURN(peer_, device.memory().Allocate(bytes, "keys or values of peers"));
  const DType dtype = device.kernels().compute_dtype();
  LF_RETURN_IF_ERROR(device.kernels().FillRandom(
      {.out = peer_.data(), .dtype = dtype, .count = bytes / DTypeBytes(dtype)}, device.stream()));
  LF_RETURN_IF_ERROR(device.stream().Sync());
  std::vector<std::vector<const void*>> places;
  for (const int member : members_) {
    places.emplace_back();
    for (const Buffer* buffer : own) places.back().push_back(member == rank_ ? buffer->data() : peer_.data());
  }
  return std::make_unique<PeerMemory>(*this, std::move(places));
}

absl::StatusOr<std::string> RecordedPeers::Handle(const Buffer&) {
  return absl::UnimplementedError("recorded ranks have no peers that could open a handle");
}

absl::StatusOr<const void*> RecordedPeers::Open(std::string_view) {
  return absl::UnimplementedError("recorded ranks have no peers that gave a handle");
}

bool RecordedPeers::IsOfPeer(const void* data) const {
  const auto* const at = static_cast<const char*>(data);
  const auto* const begin = peer_.as<const char>();
  return at >= begin && at < begin + peer_.size_bytes();
}

absl::Status RecordedPeers::Copy(const Copy2DParams& params, Stream& stream) {
  auto* recorded = dynamic_cast<RecordedStream*>(&stream);
  if (recorded == nullptr) {
    return absl::InvalidArgumentError("a recorded copy is given a stream that nobody records");
  }
  if (params.planes != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("a copy from a peer of ", params.planes, " planes, it brings one"));
  }
  const auto copy = [&] {
    if (!filled_.insert(params.to).second) return absl::OkStatus();
    return backend_.of_device().kernels().Copy2D(params, recorded->of_device());
  };
  if (!IsOfPeer(params.from)) {
    return backend_.recorder().Work(WorkPart::kCopy, recorded->number(), recorded->of_device(), copy);
  }
  const int64_t bytes = params.row_bytes * params.rows;
  if (traffic_ != nullptr) {
    ExchangeCall call{.kind = ExchangeKind::kAllToAll};
    call.sent.assign(members_.size(), 0);
    call.received = call.sent;
    const auto me = static_cast<size_t>(std::ranges::find(members_, rank_) - members_.begin());
    call.received[(me + 1) % members_.size()] = bytes;
    traffic_->Add(call, members_, static_cast<int>(me));
  }
  return backend_.recorder().Step(
      {.kind = ScheduleStep::Kind::kPeerCopy, .stream = recorded->number(), .bytes = bytes}, copy);
}

}  // namespace longfill
