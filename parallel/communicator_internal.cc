#include "parallel/communicator_internal.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace longfill::internal {
namespace {

template <typename T>
void ReduceAs(T* accumulator, const T* value, int64_t count, ReduceOp op) {
  switch (op) {
    case ReduceOp::kSum:
      for (int64_t i = 0; i < count; ++i) accumulator[i] += value[i];
      return;
    case ReduceOp::kMax:
      for (int64_t i = 0; i < count; ++i) accumulator[i] = std::max(accumulator[i], value[i]);
      return;
    case ReduceOp::kMin:
      for (int64_t i = 0; i < count; ++i) accumulator[i] = std::min(accumulator[i], value[i]);
      return;
  }
}

absl::Status CheckCounts(std::string_view name, std::span<const int64_t> counts, int size) {
  const absl::string_view label(name.data(), name.size());
  if (counts.size() != static_cast<size_t>(size)) {
    return absl::InvalidArgumentError(
        absl::StrCat(label, " has ", counts.size(), " entries for ", size, " ranks"));
  }
  for (size_t r = 0; r < counts.size(); ++r) {
    if (counts[r] < 0) return absl::InvalidArgumentError(absl::StrCat(label, "[", r, "] is ", counts[r]));
  }
  return absl::OkStatus();
}

}  // namespace

bool FirstError::Break(const absl::Status& reason) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (broken_.load(std::memory_order_relaxed)) return false;
  status_ = reason.ok() ? absl::InternalError("aborted without a reason") : reason;
  broken_.store(true, std::memory_order_release);
  return true;
}

absl::Status FirstError::status() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return status_;
}

absl::Status ErrorReport::Check(const absl::Status& error, std::string_view communicator, int rank) {
  if (error.ok()) return error;
  if (!told_) {
    told_ = true;
    return error;
  }
  return absl::FailedPreconditionError(
      absl::StrCat("the ", absl::string_view(communicator.data(), communicator.size()), " group of rank ",
                   rank, " has ended: ", error.ToString()));
}

absl::Status CheckAllGather(std::span<const int64_t> counts_bytes, int size) {
  return CheckCounts("AllGather: counts_bytes", counts_bytes, size);
}

absl::Status CheckAllToAll(std::span<const int64_t> send_bytes, std::span<const int64_t> recv_bytes, int rank,
                           int size) {
  LF_RETURN_IF_ERROR(CheckCounts("AllToAll: send_bytes", send_bytes, size));
  LF_RETURN_IF_ERROR(CheckCounts("AllToAll: recv_bytes", recv_bytes, size));
  if (send_bytes[rank] != recv_bytes[rank]) {
    return absl::InvalidArgumentError(absl::StrCat("AllToAll: rank ", rank, " sends itself ",
                                                   send_bytes[rank], " bytes and receives ",
                                                   recv_bytes[rank]));
  }
  return absl::OkStatus();
}

absl::Status CheckReduce(int64_t count, ReduceType type, ReduceOp op) {
  if (count < 0) return absl::InvalidArgumentError(absl::StrCat("AllReduce: count is ", count));
  if (ReduceTypeBytes(type) == 0 || op > ReduceOp::kMin) {
    return absl::InvalidArgumentError(absl::StrCat("AllReduce: unknown type ", static_cast<int>(type),
                                                   " or operation ", static_cast<int>(op)));
  }
  return absl::OkStatus();
}

absl::Status CheckBroadcast(int64_t bytes, int root, int size) {
  if (bytes < 0 || root < 0 || root >= size) {
    return absl::InvalidArgumentError(
        absl::StrCat("Broadcast: ", bytes, " bytes from root ", root, " of ", size, " ranks"));
  }
  return absl::OkStatus();
}

int64_t ReduceTypeBytes(ReduceType type) {
  switch (type) {
    case ReduceType::kFloat32:
      return 4;
    case ReduceType::kFloat64:
    case ReduceType::kInt64:
    case ReduceType::kUInt64:
      return 8;
  }
  return 0;
}

void Reduce(void* accumulator, const void* value, int64_t count, ReduceType type, ReduceOp op) {
  switch (type) {
    case ReduceType::kFloat32:
      return ReduceAs(static_cast<float*>(accumulator), static_cast<const float*>(value), count, op);
    case ReduceType::kFloat64:
      return ReduceAs(static_cast<double*>(accumulator), static_cast<const double*>(value), count, op);
    case ReduceType::kInt64:
      return ReduceAs(static_cast<int64_t*>(accumulator), static_cast<const int64_t*>(value), count, op);
    case ReduceType::kUInt64:
      return ReduceAs(static_cast<uint64_t*>(accumulator), static_cast<const uint64_t*>(value), count, op);
  }
}

void AbortGroup(Communicator& comm, const absl::Status& error) {
  if (comm.size() == 1) return;
  comm.Abort(absl::UnavailableError(absl::StrCat("rank ", comm.rank(), " failed: ", error.ToString())));
}

}  // namespace longfill::internal
