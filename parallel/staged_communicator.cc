#include "parallel/staged_communicator.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "parallel/communicator_internal.h"
#include "parallel/exchange_timer.h"

namespace longfill {
namespace {

constexpr int64_t kUnit = 8;  // slices are cut at whole elements of every type

// Host memory of a family of groups, and what moves it to the device and back.
struct Staging {
  Backend& backend;
  Buffer send, recv;
  int64_t slice_bytes = 0;  // of each of them
};

// Starts of consecutive pieces.
std::vector<int64_t> Offsets(std::span<const int64_t> bytes) {
  std::vector<int64_t> offsets(bytes.size());
  for (size_t r = 1; r < bytes.size(); ++r) offsets[r] = offsets[r - 1] + bytes[r - 1];
  return offsets;
}

// What part [begin, begin + length) of a piece of each size has.
std::vector<int64_t> Part(std::span<const int64_t> bytes, int64_t begin, int64_t length) {
  std::vector<int64_t> parts(bytes.size());
  for (size_t r = 0; r < bytes.size(); ++r) {
    parts[r] = std::clamp<int64_t>(bytes[r] - begin, 0, length);
  }
  return parts;
}

char* At(void* base, int64_t offset) { return static_cast<char*>(base) + offset; }
const char* At(const void* base, int64_t offset) { return static_cast<const char*>(base) + offset; }

class StagedCommunicator final : public Communicator {
 public:
  StagedCommunicator(Communicator& host, std::shared_ptr<Staging> staging,
                     std::unique_ptr<Communicator> owned = nullptr)
      : owned_(std::move(owned)),
        host_(host),
        staging_(std::move(staging)),
        name_(absl::StrCat("staged ", absl::string_view(host.name().data(), host.name().size()))),
        timer_(staging_->backend) {}

  int rank() const override { return host_.rank(); }
  int size() const override { return host_.size(); }
  std::string_view name() const override { return name_; }

  absl::Status AllGather(const void* send, void* recv, std::span<const int64_t> counts_bytes,
                         Stream& stream) override {
    if (!OnDevice(stream) || !internal::CheckAllGather(counts_bytes, size()).ok()) {
      return host_.AllGather(send, recv, counts_bytes, stream);
    }
    if (size() == 1) {
      LF_RETURN_IF_ERROR(host_.Barrier(host_stream_));
      return CopyOwn(recv, send, counts_bytes[0], stream);
    }
    return Exchange(stream, [&]() -> absl::Status {
      const std::vector<int64_t> offsets = Offsets(counts_bytes);
      LF_RETURN_IF_ERROR(CopyOwn(At(recv, offsets[rank()]), send, counts_bytes[rank()], stream));
      const int64_t most = *std::max_element(counts_bytes.begin(), counts_bytes.end());
      for (int64_t begin = 0; begin == 0 || begin < most; begin += PieceBytes()) {
        const std::vector<int64_t> parts = Part(counts_bytes, begin, PieceBytes());
        LF_RETURN_IF_ERROR(Out(0, send, begin, parts[rank()], stream));
        LF_RETURN_IF_ERROR(stream.Sync());
        LF_RETURN_IF_ERROR(
            host_.AllGather(staging_->send.data(), staging_->recv.data(), parts, host_stream_));
        const std::vector<int64_t> staged = Offsets(parts);
        for (int r = 0; r < size(); ++r) {
          if (r == rank()) continue;
          LF_RETURN_IF_ERROR(In(recv, offsets[r] + begin, staged[r], parts[r], stream));
        }
      }
      return absl::OkStatus();
    });
  }

  absl::Status AllReduce(void* data, int64_t count, ReduceType type, ReduceOp op, Stream& stream) override {
    if (!OnDevice(stream) || !internal::CheckReduce(count, type, op).ok()) {
      return host_.AllReduce(data, count, type, op, stream);
    }
    if (size() == 1) return host_.AllReduce(nullptr, 0, type, op, host_stream_);
    return Exchange(stream, [&]() -> absl::Status {
      const int64_t element = internal::ReduceTypeBytes(type);
      const int64_t step = staging_->slice_bytes / element;
      for (int64_t begin = 0; begin == 0 || begin < count; begin += step) {
        const int64_t elements = std::min(step, count - begin);
        LF_RETURN_IF_ERROR(Out(0, data, begin * element, elements * element, stream));
        LF_RETURN_IF_ERROR(stream.Sync());
        LF_RETURN_IF_ERROR(host_.AllReduce(staging_->send.data(), elements, type, op, host_stream_));
        LF_RETURN_IF_ERROR(InFrom(staging_->send, data, begin * element, 0, elements * element, stream));
      }
      return absl::OkStatus();
    });
  }

  absl::Status Broadcast(void* data, int64_t bytes, int root, Stream& stream) override {
    if (!OnDevice(stream) || !internal::CheckBroadcast(bytes, root, size()).ok()) {
      return host_.Broadcast(data, bytes, root, stream);
    }
    if (size() == 1) return host_.Broadcast(nullptr, 0, root, host_stream_);
    return Exchange(stream, [&]() -> absl::Status {
      for (int64_t begin = 0; begin == 0 || begin < bytes; begin += staging_->slice_bytes) {
        const int64_t slice = std::min(staging_->slice_bytes, bytes - begin);
        if (rank() == root) {
          LF_RETURN_IF_ERROR(Out(0, data, begin, slice, stream));
          LF_RETURN_IF_ERROR(stream.Sync());
        }
        LF_RETURN_IF_ERROR(host_.Broadcast(staging_->send.data(), slice, root, host_stream_));
        if (rank() != root) LF_RETURN_IF_ERROR(InFrom(staging_->send, data, begin, 0, slice, stream));
      }
      return absl::OkStatus();
    });
  }

  absl::Status AllToAll(const void* send, std::span<const int64_t> send_bytes, void* recv,
                        std::span<const int64_t> recv_bytes, Stream& stream) override {
    if (!OnDevice(stream) || !internal::CheckAllToAll(send_bytes, recv_bytes, rank(), size()).ok()) {
      return host_.AllToAll(send, send_bytes, recv, recv_bytes, stream);
    }
    if (size() == 1) {
      LF_RETURN_IF_ERROR(host_.Barrier(host_stream_));
      return CopyOwn(recv, send, send_bytes[0], stream);
    }
    return Exchange(stream, [&] { return AllToAllInSlices(send, send_bytes, recv, recv_bytes, stream); });
  }

  absl::Status Barrier(Stream& stream) override {
    if (!OnDevice(stream)) return host_.Barrier(stream);
    return Finish([&]() -> absl::Status {
      LF_RETURN_IF_ERROR(stream.Sync());
      return host_.Barrier(host_stream_);
    });
  }

  absl::StatusOr<std::unique_ptr<Communicator>> Split(int color, int key) override {
    LF_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> part, host_.Split(color, key));
    Communicator& host = *part;
    return std::make_unique<StagedCommunicator>(host, staging_, std::move(part));
  }

  void Abort(const absl::Status& reason) override { host_.Abort(reason); }
  absl::Status Health() override { return host_.Health(); }
  int64_t bytes_sent() const override { return host_.bytes_sent(); }
  double seconds() const override { return host_.seconds() + timer_.seconds(); }

 private:
  static bool OnDevice(const Stream& stream) { return stream.device() != DeviceKind::kCpu; }

  // Peers wait for this rank, so an error on the way ends the group.
  template <typename Body>
  absl::Status Finish(const Body& body) {
    absl::Status status = body();
    if (!status.ok()) internal::AbortGroup(host_, status);
    return status;
  }

  template <typename Body>
  absl::Status Exchange(Stream& stream, const Body& body) {
    return Finish([&]() -> absl::Status {
      const double host_before = host_.seconds();
      LF_RETURN_IF_ERROR(timer_.Begin(stream));
      LF_RETURN_IF_ERROR(body());
      return timer_.End(stream, host_.seconds() - host_before);
    });
  }

  // A slice of each piece of AllGather and AllToAll: what all ranks' pieces together have room for.
  int64_t PieceBytes() const { return staging_->slice_bytes / size() / kUnit * kUnit; }

  KernelSet& kernels() { return staging_->backend.kernels(); }

  // Device to staging_->send, staging_->recv to device.
  absl::Status Out(int64_t staged, const void* from, int64_t offset, int64_t bytes, Stream& stream) {
    if (bytes == 0) return absl::OkStatus();
    return kernels().CopyOut(At(staging_->send.data(), staged), At(from, offset), bytes, stream);
  }
  absl::Status In(void* to, int64_t offset, int64_t staged, int64_t bytes, Stream& stream) {
    return InFrom(staging_->recv, to, offset, staged, bytes, stream);
  }
  absl::Status InFrom(const Buffer& host, void* to, int64_t offset, int64_t staged, int64_t bytes,
                      Stream& stream) {
    if (bytes == 0) return absl::OkStatus();
    return kernels().CopyIn(At(to, offset), At(host.data(), staged), bytes, stream);
  }
  // What a rank sends to itself stays on the device.
  absl::Status CopyOwn(void* to, const void* from, int64_t bytes, Stream& stream) {
    if (bytes == 0 || to == from) return absl::OkStatus();
    return kernels().Copy2D(
        {.to = to, .to_pitch = bytes, .from = from, .from_pitch = bytes, .row_bytes = bytes, .rows = 1},
        stream);
  }

  absl::Status AllToAllInSlices(const void* send, std::span<const int64_t> send_bytes, void* recv,
                                std::span<const int64_t> recv_bytes, Stream& stream) {
    const std::vector<int64_t> send_offsets = Offsets(send_bytes);
    const std::vector<int64_t> recv_offsets = Offsets(recv_bytes);
    LF_RETURN_IF_ERROR(
        CopyOwn(At(recv, recv_offsets[rank()]), At(send, send_offsets[rank()]), send_bytes[rank()], stream));
    std::vector<int64_t> to_peers(send_bytes.begin(), send_bytes.end());
    std::vector<int64_t> from_peers(recv_bytes.begin(), recv_bytes.end());
    to_peers[rank()] = 0;
    from_peers[rank()] = 0;
    // All ranks take part in as many slices as the largest piece of any pair needs.
    int64_t most = *std::max_element(to_peers.begin(), to_peers.end());
    LF_RETURN_IF_ERROR(host_.AllReduce(&most, 1, ReduceType::kInt64, ReduceOp::kMax, host_stream_));
    for (int64_t begin = 0; begin == 0 || begin < most; begin += PieceBytes()) {
      const std::vector<int64_t> out = Part(to_peers, begin, PieceBytes());
      const std::vector<int64_t> in = Part(from_peers, begin, PieceBytes());
      const std::vector<int64_t> out_staged = Offsets(out);
      const std::vector<int64_t> in_staged = Offsets(in);
      for (int r = 0; r < size(); ++r) {
        LF_RETURN_IF_ERROR(Out(out_staged[r], send, send_offsets[r] + begin, out[r], stream));
      }
      LF_RETURN_IF_ERROR(stream.Sync());
      LF_RETURN_IF_ERROR(host_.AllToAll(staging_->send.data(), out, staging_->recv.data(), in, host_stream_));
      for (int r = 0; r < size(); ++r) {
        LF_RETURN_IF_ERROR(In(recv, recv_offsets[r] + begin, in_staged[r], in[r], stream));
      }
    }
    return absl::OkStatus();
  }

  const std::unique_ptr<Communicator> owned_;  // of a split group
  Communicator& host_;
  const std::shared_ptr<Staging> staging_;
  const std::string name_;
  ExchangeTimer timer_;
  CpuStream host_stream_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> CreateStagedCommunicator(Communicator& host, Backend& backend,
                                                                       int64_t slice_bytes) {
  const int64_t least = kUnit * host.size();
  if (slice_bytes < least) {
    return absl::InvalidArgumentError(absl::StrCat("staging in slices of ", slice_bytes, " bytes; ",
                                                   host.size(), " ranks need at least ", least));
  }
  auto staging = std::make_shared<Staging>(Staging{.backend = backend, .slice_bytes = slice_bytes});
  if (host.size() > 1 && backend.kernels().device() != DeviceKind::kCpu) {
    LF_ASSIGN_OR_RETURN(staging->send, backend.host_memory().Allocate(slice_bytes, "staging to send"));
    LF_ASSIGN_OR_RETURN(staging->recv, backend.host_memory().Allocate(slice_bytes, "staging to receive"));
  }
  return std::make_unique<StagedCommunicator>(host, std::move(staging));
}

}  // namespace longfill
