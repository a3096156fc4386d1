#ifndef LONGFILL_TESTS_MULTIRANK_DEVICE_COMMUNICATOR_H_
#define LONGFILL_TESTS_MULTIRANK_DEVICE_COMMUNICATOR_H_

// Runs tests that hold their data in host memory over a communicator for memory of a device: what they send
// is put there, what they receive is fetched.

#include <memory>
#include <numeric>
#include <string_view>
#include <utility>

#include "kernels/api/backend.h"
#include "parallel/communicator.h"

namespace longfill {

class DeviceCommunicator final : public Communicator {
 public:
  DeviceCommunicator(std::unique_ptr<Communicator> device, Backend& backend)
      : device_(std::move(device)), backend_(backend) {}

  int rank() const override { return device_->rank(); }
  int size() const override { return device_->size(); }
  std::string_view name() const override { return device_->name(); }

  absl::Status AllGather(const void* send, void* recv, std::span<const int64_t> counts_bytes,
                         Stream&) override {
    const int64_t before = std::accumulate(counts_bytes.begin(), counts_bytes.begin() + rank(), int64_t{0});
    const bool in_place = send == static_cast<char*>(recv) + before;
    LF_ASSIGN_OR_RETURN(const Buffer from, Put(send, in_place ? 0 : counts_bytes[rank()]));
    LF_ASSIGN_OR_RETURN(const Buffer to, Put(recv, Sum(counts_bytes)));
    const void* device_send = in_place ? to.as<char>() + before : from.data();
    LF_RETURN_IF_ERROR(device_->AllGather(device_send, to.data(), counts_bytes, backend_.stream()));
    return Get(recv, to);
  }
  absl::Status AllReduce(void* data, int64_t count, ReduceType type, ReduceOp op, Stream&) override {
    LF_ASSIGN_OR_RETURN(const Buffer there, Put(data, count * (type == ReduceType::kFloat32 ? 4 : 8)));
    LF_RETURN_IF_ERROR(device_->AllReduce(there.data(), count, type, op, backend_.stream()));
    return Get(data, there);
  }
  absl::Status Broadcast(void* data, int64_t bytes, int root, Stream&) override {
    LF_ASSIGN_OR_RETURN(const Buffer there, Put(data, bytes));
    LF_RETURN_IF_ERROR(device_->Broadcast(there.data(), bytes, root, backend_.stream()));
    return Get(data, there);
  }
  absl::Status AllToAll(const void* send, std::span<const int64_t> send_bytes, void* recv,
                        std::span<const int64_t> recv_bytes, Stream&) override {
    LF_ASSIGN_OR_RETURN(const Buffer from, Put(send, Sum(send_bytes)));
    LF_ASSIGN_OR_RETURN(const Buffer to, Put(recv, Sum(recv_bytes)));
    LF_RETURN_IF_ERROR(device_->AllToAll(from.data(), send_bytes, to.data(), recv_bytes, backend_.stream()));
    return Get(recv, to);
  }
  absl::Status Barrier(Stream&) override { return device_->Barrier(backend_.stream()); }
  absl::StatusOr<std::unique_ptr<Communicator>> Split(int color, int key) override {
    LF_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> part, device_->Split(color, key));
    return std::make_unique<DeviceCommunicator>(std::move(part), backend_);
  }
  void Abort(const absl::Status& reason) override { device_->Abort(reason); }
  absl::Status Health() override { return device_->Health(); }
  int64_t bytes_sent() const override { return device_->bytes_sent(); }
  double seconds() const override { return device_->seconds(); }

 private:
  static int64_t Sum(std::span<const int64_t> values) {
    return std::accumulate(values.begin(), values.end(), int64_t{0});
  }
  absl::StatusOr<Buffer> Put(const void* host, int64_t bytes) {
    LF_ASSIGN_OR_RETURN(Buffer buffer, backend_.memory().Allocate(bytes, "a test's exchange"));
    if (bytes > 0) {
      LF_RETURN_IF_ERROR(backend_.kernels().CopyIn(buffer.data(), host, bytes, backend_.stream()));
    }
    return buffer;
  }
  absl::Status Get(void* host, const Buffer& buffer) {
    if (buffer.size_bytes() == 0) return absl::OkStatus();
    LF_RETURN_IF_ERROR(
        backend_.kernels().CopyOut(host, buffer.data(), buffer.size_bytes(), backend_.stream()));
    return backend_.stream().Sync();
  }

  const std::unique_ptr<Communicator> device_;
  Backend& backend_;
};

}  // namespace longfill

#endif  // LONGFILL_TESTS_MULTIRANK_DEVICE_COMMUNICATOR_H_
