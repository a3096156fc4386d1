#include "parallel/communicator.h"

#include <cstring>
#include <numeric>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "parallel/communicator_internal.h"

namespace longfill {
namespace {

using internal::CheckAllGather;
using internal::CheckAllToAll;
using internal::CheckReduce;

// A group of one: every exchange is a copy.
class SingleCommunicator final : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  std::string_view name() const override { return "single"; }

  absl::Status AllGather(const void* send, void* recv, std::span<const int64_t> counts_bytes,
                         Stream&) override {
    LF_RETURN_IF_ERROR(CheckUsable());
    LF_RETURN_IF_ERROR(CheckAllGather(counts_bytes, 1));
    if (send != recv && counts_bytes[0] > 0) std::memcpy(recv, send, static_cast<size_t>(counts_bytes[0]));
    return absl::OkStatus();
  }
  absl::Status AllReduce(void*, int64_t count, ReduceType type, ReduceOp op, Stream&) override {
    LF_RETURN_IF_ERROR(CheckUsable());
    return CheckReduce(count, type, op);
  }
  absl::Status Broadcast(void*, int64_t bytes, int root, Stream&) override {
    LF_RETURN_IF_ERROR(CheckUsable());
    return internal::CheckBroadcast(bytes, root, 1);
  }
  absl::Status AllToAll(const void* send, std::span<const int64_t> send_bytes, void* recv,
                        std::span<const int64_t> recv_bytes, Stream&) override {
    LF_RETURN_IF_ERROR(CheckUsable());
    LF_RETURN_IF_ERROR(CheckAllToAll(send_bytes, recv_bytes, 0, 1));
    if (send != recv && send_bytes[0] > 0) std::memcpy(recv, send, static_cast<size_t>(send_bytes[0]));
    return absl::OkStatus();
  }
  absl::Status Barrier(Stream&) override { return CheckUsable(); }
  absl::StatusOr<std::unique_ptr<Communicator>> Split(int, int) override {
    LF_RETURN_IF_ERROR(CheckUsable());
    auto child = std::make_unique<SingleCommunicator>();
    child->broken_ = broken_;
    return child;
  }
  void Abort(const absl::Status& reason) override { broken_->Break(reason); }
  absl::Status Health() override { return broken_->status(); }
  int64_t bytes_sent() const override { return 0; }
  double seconds() const override { return 0; }

 private:
  absl::Status CheckUsable() { return reported_.Check(Health(), name(), 0); }

  std::shared_ptr<internal::FirstError> broken_ =
      std::make_shared<internal::FirstError>();  // of the whole family
  internal::ErrorReport reported_;
};

}  // namespace

std::unique_ptr<Communicator> CreateSingleCommunicator() { return std::make_unique<SingleCommunicator>(); }

absl::Status AgreeOnStatus(Communicator& comm, const absl::Status& mine, Stream& stream) {
  if (comm.size() == 1) return mine;  // nobody to name
  int64_t failing = mine.ok() ? comm.size() : comm.rank();
  LF_RETURN_IF_ERROR(comm.AllReduce(&failing, 1, ReduceType::kInt64, ReduceOp::kMin, stream));
  if (failing == comm.size()) return absl::OkStatus();
  std::string text;
  if (failing == comm.rank()) text = absl::StrCat(static_cast<int>(mine.code()), " ", mine.message());
  LF_ASSIGN_OR_RETURN(text, BroadcastString(comm, std::move(text), static_cast<int>(failing), stream));
  const size_t space = text.find(' ');
  int code = 0;
  if (space == std::string::npos || !absl::SimpleAtoi(absl::string_view(text).substr(0, space), &code)) {
    return absl::InternalError(absl::StrCat("AgreeOnStatus: rank ", failing, " sent \"", text, "\""));
  }
  return Annotate(
      absl::Status(static_cast<absl::StatusCode>(code), absl::string_view(text).substr(space + 1)),
      absl::StrCat("rank ", failing));
}

absl::StatusOr<std::string> BroadcastString(Communicator& comm, std::string value, int root, Stream& stream) {
  int64_t size = static_cast<int64_t>(value.size());
  LF_RETURN_IF_ERROR(comm.Broadcast(&size, sizeof(size), root, stream));
  value.resize(static_cast<size_t>(size));
  LF_RETURN_IF_ERROR(comm.Broadcast(value.data(), size, root, stream));
  return value;
}

absl::StatusOr<std::vector<std::string>> AllGatherStrings(Communicator& comm, const std::string& value,
                                                          Stream& stream) {
  std::vector<int64_t> sizes(comm.size());
  const int64_t mine = static_cast<int64_t>(value.size());
  LF_RETURN_IF_ERROR(
      comm.AllGather(&mine, sizes.data(), std::vector<int64_t>(comm.size(), sizeof(int64_t)), stream));
  std::string joined(static_cast<size_t>(std::accumulate(sizes.begin(), sizes.end(), int64_t{0})), '\0');
  LF_RETURN_IF_ERROR(comm.AllGather(value.data(), joined.data(), sizes, stream));
  std::vector<std::string> values;
  size_t begin = 0;
  for (const int64_t size : sizes) {
    values.push_back(joined.substr(begin, static_cast<size_t>(size)));
    begin += static_cast<size_t>(size);
  }
  return values;
}

}  // namespace longfill
