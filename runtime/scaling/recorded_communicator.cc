#include "runtime/scaling/recorded_communicator.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "parallel/communicator_internal.h"
#include "parallel/parallel_attention.h"

namespace longfill {
namespace {

constexpr int kWorld = 0;  // MeshGroups::members

int64_t Sum(std::span<const int64_t> bytes) {
  return std::accumulate(bytes.begin(), bytes.end(), int64_t{0});
}

char* At(void* base, int64_t offset) { return static_cast<char*>(base) + offset; }

}  // namespace

MeshGroups::MeshGroups(const Mesh& mesh, const PeerHosts& hosts) {
  const ShardPlan plan(mesh, 0);
  std::vector<int> world(static_cast<size_t>(mesh.size())), sequence, head;
  std::iota(world.begin(), world.end(), 0);
  for (const int rank : world) {
    sequence.push_back(plan.SequenceIndex(rank));
    head.push_back(plan.HeadIndex(rank));
  }
  members_.push_back(world);
  AddSplit(sequence, head);
  AddSplit(head, sequence);
  if (hosts.num_hosts() == 1 || !ParallelAttention::BeginsEarly(mesh)) return;
  std::vector<int> local, host;
  for (const int rank : world) {
    local.push_back(hosts.LocalOf(rank));
    host.push_back(hosts.HostOf(rank));
  }
  AddSplit(std::move(local), std::move(host));
}

void MeshGroups::AddSplit(std::vector<int> colors, std::vector<int> keys) {
  std::vector<int> groups(colors.size());
  for (const int color : std::set<int>(colors.begin(), colors.end())) {
    std::vector<int> members;
    for (size_t rank = 0; rank < colors.size(); ++rank) {
      if (colors[rank] != color) continue;
      members.push_back(static_cast<int>(rank));
      groups[rank] = static_cast<int>(members_.size());
    }
    std::ranges::stable_sort(members, {}, [&](int rank) { return keys[static_cast<size_t>(rank)]; });
    members_.push_back(std::move(members));
  }
  splits_.push_back({std::move(colors), std::move(keys), std::move(groups)});
}

absl::StatusOr<int> MeshGroups::GroupOfSplit(size_t split, int rank, int color, int key) const {
  const auto r = static_cast<size_t>(rank);
  if (split >= splits_.size() || splits_[split].colors[r] != color || splits_[split].keys[r] != key) {
    return absl::InternalError(absl::StrCat("recorded rank ", rank, ": split ", split, " with color ", color,
                                            " and key ", key, " is not one of its mesh"));
  }
  return splits_[split].groups[r];
}

class RecordedCommunicator final : public Communicator {
 public:
  RecordedCommunicator(RecordedRank& owner, int group)
      : owner_(owner),
        group_(group),
        members_(owner.groups_.members()[static_cast<size_t>(group)]),
        rank_(static_cast<int>(std::ranges::find(members_, owner.rank_) - members_.begin())) {}

  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(members_.size()); }
  std::string_view name() const override { return "recorded"; }

  absl::Status AllGather(const void* send, void* recv, std::span<const int64_t> counts_bytes,
                         Stream& stream) override {
    LF_RETURN_IF_ERROR(internal::CheckAllGather(counts_bytes, size()));
    LF_ASSIGN_OR_RETURN(RecordedStream * device, OfDevice(stream));
    bytes_sent_ += counts_bytes[static_cast<size_t>(rank_)] * (size() - 1);
    return Exchange(device,
                    {.kind = ExchangeKind::kAllGather, .sent = {counts_bytes.begin(), counts_bytes.end()}},
                    [&] { return Gather(send, recv, counts_bytes, device->of_device()); });
  }

  absl::Status AllReduce(void* data, int64_t count, ReduceType type, ReduceOp op, Stream& stream) override {
    LF_RETURN_IF_ERROR(internal::CheckReduce(count, type, op));
    auto* device = dynamic_cast<RecordedStream*>(&stream);
    const int64_t bytes = count * internal::ReduceTypeBytes(type);
    bytes_sent_ += bytes * (size() - 1);
    return Exchange(device, {.kind = ExchangeKind::kAllReduce, .bytes = bytes}, [&] {
      if (device != nullptr) return TakeReduced(data, bytes, device->of_device());
      owner_.filled_bytes_.clear();
      return absl::OkStatus();
    });
  }

  absl::Status Broadcast(void*, int64_t bytes, int root, Stream& stream) override {
    LF_RETURN_IF_ERROR(internal::CheckBroadcast(bytes, root, size()));
    if (rank_ == root) bytes_sent_ += bytes * (size() - 1);
    return Exchange(dynamic_cast<RecordedStream*>(&stream),
                    {.kind = ExchangeKind::kBroadcast, .bytes = bytes}, absl::OkStatus);
  }

  absl::Status AllToAll(const void* send, std::span<const int64_t> send_bytes, void* recv,
                        std::span<const int64_t> recv_bytes, Stream& stream) override {
    LF_RETURN_IF_ERROR(internal::CheckAllToAll(send_bytes, recv_bytes, rank_, size()));
    LF_ASSIGN_OR_RETURN(RecordedStream * device, OfDevice(stream));
    const auto me = static_cast<size_t>(rank_);
    bytes_sent_ += Sum(send_bytes) - send_bytes[me];
    return Exchange(device,
                    {.kind = ExchangeKind::kAllToAll,
                     .sent = {send_bytes.begin(), send_bytes.end()},
                     .received = {recv_bytes.begin(), recv_bytes.end()}},
                    [&] { return Swap(send, send_bytes, recv, recv_bytes, device->of_device()); });
  }

  absl::Status Barrier(Stream& stream) override {
    return Exchange(dynamic_cast<RecordedStream*>(&stream), {.kind = ExchangeKind::kBarrier}, absl::OkStatus);
  }

  absl::StatusOr<std::unique_ptr<Communicator>> Split(int color, int key) override {
    if (group_ != kWorld)
      return absl::UnimplementedError("recorded ranks: a group of the world is not split");
    LF_ASSIGN_OR_RETURN(const int group,
                        owner_.groups_.GroupOfSplit(num_splits_++, owner_.rank_, color, key));
    return std::make_unique<RecordedCommunicator>(owner_, group);
  }

  // Nobody waits for this rank.
  void Abort(const absl::Status&) override {}
  absl::Status Health() override { return absl::OkStatus(); }
  int64_t bytes_sent() const override { return bytes_sent_; }  // as in-process ranks count
  double seconds() const override { return 0; }                // known to nobody yet

 private:
  static absl::StatusOr<RecordedStream*> OfDevice(Stream& stream) {
    auto* device = dynamic_cast<RecordedStream*>(&stream);
    if (device != nullptr) return device;
    return absl::UnimplementedError("recorded ranks: values of the host have no pieces of peers");
  }

  // `device`: nullptr where the call blocks the host.
  template <typename Body>
  absl::Status Exchange(RecordedStream* device, ExchangeCall call, const Body& body) {
    const int stream = device != nullptr ? device->number() : kHostStream;
    if (owner_.traffic_ != nullptr && stream > kMainStream) owner_.traffic_->Add(call, members_, rank_);
    return owner_.backend_.recorder().Exchange(stream, {group_, std::move(call)}, body);
  }

  // `own` may lie in its place in `recv`.
  absl::Status Gather(const void* own, void* recv, std::span<const int64_t> bytes, Stream& stream) {
    const int64_t own_bytes = bytes[static_cast<size_t>(rank_)];
    const bool is_new = IsNew(recv, Sum(bytes));
    int64_t begin = 0;
    for (size_t m = 0; m < bytes.size(); begin += bytes[m++]) {
      void* const piece = At(recv, begin);
      const bool mine = static_cast<int>(m) == rank_;
      if (mine && own != piece) LF_RETURN_IF_ERROR(Copy(piece, own, own_bytes, stream));
      if (mine || !is_new) continue;
      LF_RETURN_IF_ERROR(own_bytes == 0 ? FillRandom(piece, bytes[m], stream)
                                        : CopyPart(piece, bytes[m], own, own_bytes, stream));
    }
    return absl::OkStatus();
  }

  absl::Status Swap(const void* send, std::span<const int64_t> send_bytes, void* recv,
                    std::span<const int64_t> recv_bytes, Stream& stream) {
    const auto me = static_cast<size_t>(rank_);
    if (IsNew(recv, Sum(recv_bytes))) {
      LF_RETURN_IF_ERROR(CopyPart(recv, Sum(recv_bytes), send, Sum(send_bytes), stream));
    }
    return Copy(At(recv, Sum(recv_bytes.first(me))),
                static_cast<const char*>(send) + Sum(send_bytes.first(me)), send_bytes[me], stream);
  }

  // Whether nothing has come to all of the buffer yet; from here on it has.
  bool IsNew(const void* recv, int64_t bytes) {
    int64_t& filled = owner_.filled_bytes_[recv];
    return std::exchange(filled, std::max(filled, bytes)) < bytes;
  }

  // What there is of `bytes`, and zeros.
  absl::Status CopyPart(void* to, int64_t bytes, const void* from, int64_t from_bytes, Stream& stream) {
    const int64_t there = std::min(bytes, from_bytes);
    LF_RETURN_IF_ERROR(Copy(to, from, there, stream));
    return kernels().Zero(At(to, there), bytes - there, stream);
  }

  absl::Status Copy(void* to, const void* from, int64_t bytes, Stream& stream) {
    return kernels().Copy2D(
        {.to = to, .to_pitch = bytes, .from = from, .from_pitch = bytes, .row_bytes = bytes, .rows = 1},
        stream);
  }

  absl::Status FillRandom(void* to, int64_t bytes, Stream& stream) {
    const DType dtype = kernels().compute_dtype();
    return kernels().FillRandom({.out = to, .dtype = dtype, .count = bytes / DTypeBytes(dtype)}, stream);
  }

  absl::Status TakeReduced(void* data, int64_t bytes, Stream& stream) {
    std::vector<std::byte>& reduced = owner_.groups_.Reduced(group_, num_reductions_++);
    if (reduced.empty()) {
      reduced.resize(static_cast<size_t>(bytes));
      LF_RETURN_IF_ERROR(stream.Sync());  // with its deadline, which a copy to pageable memory has not
      LF_RETURN_IF_ERROR(kernels().CopyOut(reduced.data(), data, bytes, stream));
      return stream.Sync();
    }
    if (reduced.size() != static_cast<size_t>(bytes)) {
      return absl::InternalError(absl::StrCat("recorded rank ", owner_.rank_, " reduces ", bytes,
                                              " bytes, the rank before it ", reduced.size()));
    }
    return kernels().CopyIn(data, reduced.data(), bytes, stream);
  }

  // What nobody writes down.
  KernelSet& kernels() { return owner_.backend_.of_device().kernels(); }

  RecordedRank& owner_;
  const int group_;
  const std::vector<int>& members_;
  const int rank_;  // among them
  size_t num_splits_ = 0;
  int64_t num_reductions_ = 0;  // with streams of the device
  int64_t bytes_sent_ = 0;
};

std::unique_ptr<Communicator> RecordedRank::World() {
  return std::make_unique<RecordedCommunicator>(*this, kWorld);
}

}  // namespace longfill
