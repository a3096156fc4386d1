#include "runtime/kv/kv_store.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/kv/kv_store_internal.h"

namespace longfill {

absl::Status KvStore::Transfer::CheckRows(int64_t layer, int64_t row_begin, int64_t row_end) const {
  if (layer >= 0 && layer < spec.num_layers && 0 <= row_begin && row_begin <= row_end &&
      row_end <= num_rows) {
    return absl::OkStatus();
  }
  return absl::InternalError(absl::StrCat("KV store: rows [", row_begin, ", ", row_end, ") of layer ", layer,
                                          " came, there are ", num_rows, " rows and ", spec.num_layers,
                                          " layers"));
}

absl::Status KvStore::Transfer::CheckNext(int64_t layer, int64_t row_begin, int64_t row_end) const {
  LF_RETURN_IF_ERROR(CheckRows(layer, row_begin, row_end));
  if (layer == layers_ready && row_begin == rows_ready) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("KV store: rows [", row_begin, ", ", row_end, ") of layer ", layer,
                                          " came, row ", rows_ready, " of layer ", layers_ready, " is next"));
}

absl::Status KvStore::Transfer::CheckOnlyReader(const KvSelection& selection) const {
  if (selection.head_begin != 0 || selection.head_end != spec.num_kv_heads || selection.token_begin != 0 ||
      selection.token_end != spec.plan.num_tokens()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "heads [", selection.head_begin, ", ", selection.head_end, ") and tokens [", selection.token_begin,
        ", ", selection.token_end, ") are asked for: where pages go to a waiting reader it takes all ",
        spec.num_kv_heads, " heads and ", spec.plan.num_tokens(), " tokens"));
  }
  if (lease.readers() > 0) {
    return absl::FailedPreconditionError(
        "another reader reads this transfer: pages that go to a waiting reader have one at a time");
  }
  if (num_rows > 0 && selection.layer_begin != next_layer()) {
    return absl::FailedPreconditionError(absl::StrCat("layer ", selection.layer_begin,
                                                      " is asked for, layer ", next_layer(),
                                                      " is next: what a reader has taken is not kept"));
  }
  return absl::OkStatus();
}

namespace {

absl::Status CheckSpec(const KvTransferSpec& spec) {
  if (spec.transfer_id.empty() || spec.rank < 0 || spec.rank >= spec.plan.mesh().size() ||
      spec.num_layers < 1 || spec.num_kv_heads < 1 || spec.head_dim < 1 || !IsFloat(spec.dtype)) {
    return absl::InvalidArgumentError(
        absl::StrCat("KV transfer with id of ", spec.transfer_id.size(), " characters, rank ", spec.rank,
                     " of ", spec.plan.mesh().size(), ", ", spec.num_layers, " layers, ", spec.num_kv_heads,
                     " KV heads, head_dim ", spec.head_dim, ", dtype ", std::string(DTypeName(spec.dtype))));
  }
  return absl::OkStatus();
}

// A consumer that left is no error of the prefill; what the engine still appends is dropped.
bool EndedByConsumer(TransferState state) {
  return state == TransferState::kComplete || state == TransferState::kAborted;
}

}  // namespace

class KvStoreSink final : public KvSink {
 public:
  KvStoreSink(KvStore* store, KvStore::TransferPtr transfer, bool on_device)
      : store_(store), transfer_(std::move(transfer)), on_device_(on_device) {}
  ~KvStoreSink() override {
    if (!finished_) (void)store_->Finish(*transfer_, absl::InternalError("the prefill dropped its KV sink"));
  }
  absl::Status Append(int64_t layer, int64_t row_begin, int64_t row_end, HeadsView<const void> key,
                      HeadsView<const void> value, DType dtype) override {
    return store_->Append(*transfer_, layer, row_begin, row_end, key, value, dtype);
  }
  absl::StatusOr<int64_t> WaitForRoom(std::chrono::steady_clock::time_point deadline) override {
    return store_->WaitForRoom(*transfer_, deadline);
  }
  bool on_device() const override { return on_device_; }
  absl::Status CopyOnDevice(int64_t layer, int64_t row_begin, int64_t row_end, HeadsView<const void> key,
                            HeadsView<const void> value) override {
    return store_->CopyOnDevice(*transfer_, layer, row_begin, row_end, key, value);
  }
  absl::Status Publish(int64_t layer, int64_t row_begin, int64_t row_end) override {
    return store_->Publish(*transfer_, layer, row_begin, row_end);
  }
  absl::Status Finish(const absl::Status& outcome) override {
    finished_ = true;
    return store_->Finish(*transfer_, outcome);
  }

 private:
  KvStore* const store_;
  const KvStore::TransferPtr transfer_;
  const bool on_device_;
  bool finished_ = false;
};

KvStore::KvStore(KvStoreOptions options, KvTier* tier)
    : options_(std::move(options)), tier_(tier), held_bytes_(std::make_shared<std::atomic<int64_t>>(0)) {}

KvStore::~KvStore() = default;

std::chrono::steady_clock::time_point KvStore::Now() const {
  return options_.clock ? options_.clock() : std::chrono::steady_clock::now();
}

absl::StatusOr<std::unique_ptr<KvSink>> KvStore::Open(const KvTransferSpec& spec) {
  LF_RETURN_IF_ERROR(CheckSpec(spec));
  auto transfer = std::make_shared<Transfer>(spec, options_.lease, Now());
  LF_ASSIGN_OR_RETURN(std::unique_ptr<KvPages> pages, tier_->Open(spec));
  transfer->ring_rows = pages->ring_rows();
  const bool on_device = pages->on_device();
  transfer->pages = std::make_shared<HeldPages>(std::move(pages), held_bytes_, transfer->held_bytes);
  if (transfer->num_rows == 0) transfer->layers_ready = spec.num_layers;  // nothing will be appended
  std::lock_guard lock(mutex_);
  LF_RETURN_IF_ERROR(broken_);
  if (!transfers_.emplace(spec.transfer_id, transfer).second) {
    return absl::InvalidArgumentError("KV transfer: this transfer id was used before");
  }
  ++open_transfers_;
  return std::make_unique<KvStoreSink>(this, std::move(transfer), on_device);
}

KvSinkFactory KvStore::MakeSinkFactory() {
  return [this](const KvTransferSpec& spec) { return Open(spec); };
}

absl::StatusOr<KvStore::TransferPtr> KvStore::FindLocked(const std::string& transfer_id) const {
  const auto found = transfers_.find(transfer_id);
  if (found == transfers_.end()) {
    return absl::NotFoundError(
        "no such transfer: the id is wrong, of another run of the service, or ended long ago");
  }
  return found->second;
}

absl::StatusOr<std::unique_ptr<KvReader>> KvStore::Read(const std::string& transfer_id,
                                                        const KvSelection& asked) {
  std::lock_guard lock(mutex_);
  LF_ASSIGN_OR_RETURN(TransferPtr transfer, FindLocked(transfer_id));
  if (transfer->state != TransferState::kOpen) {
    return EndedStatus(transfer_id, transfer->state, transfer->reason);
  }
  LF_ASSIGN_OR_RETURN(const KvSelection selection, ResolveSelection(asked, transfer->spec));
  if (transfer->ring_rows > 0) LF_RETURN_IF_ERROR(transfer->CheckOnlyReader(selection));
  transfer->lease.ReaderCame();
  return std::unique_ptr<KvReader>(new KvReader(this, std::move(transfer), selection));
}

absl::StatusOr<KvTransferSpec> KvStore::GetSpec(const std::string& transfer_id) const {
  std::lock_guard lock(mutex_);
  LF_ASSIGN_OR_RETURN(TransferPtr transfer, FindLocked(transfer_id));
  return transfer->spec;
}

TransferStatus KvStore::StatusLocked(const Transfer& transfer) const {
  TransferStatus status;
  status.state = transfer.state;
  status.reason = transfer.reason;
  status.layers_ready = transfer.layers_ready;
  status.num_layers = transfer.spec.num_layers;
  status.bytes_held = transfer.held_bytes->load();
  status.active_readers = transfer.lease.readers();
  if (transfer.state != TransferState::kOpen) {
    status.lease_remaining = std::chrono::milliseconds(0);
  } else if (transfer.lease.Runs()) {
    status.lease_remaining = std::max(transfer.lease.Remaining(Now()), std::chrono::milliseconds(0));
  }
  return status;
}

absl::StatusOr<TransferStatus> KvStore::GetStatus(const std::string& transfer_id) const {
  std::lock_guard lock(mutex_);
  LF_ASSIGN_OR_RETURN(TransferPtr transfer, FindLocked(transfer_id));
  return StatusLocked(*transfer);
}

absl::StatusOr<TransferStatus> KvStore::RenewLease(const std::string& transfer_id) {
  std::lock_guard lock(mutex_);
  LF_ASSIGN_OR_RETURN(TransferPtr transfer, FindLocked(transfer_id));
  if (transfer->state == TransferState::kOpen) transfer->lease.SignOfLife(Now());
  return StatusLocked(*transfer);
}

KvStore::PagesPtr KvStore::EndLocked(Transfer& transfer, TransferState outcome, const absl::Status& reason) {
  if (!IsLegalTransition(transfer.state, outcome)) return {};
  transfer.state = outcome;
  transfer.reason = reason;
  transfer.ended_at = Now();
  --open_transfers_;
  tombstones_.push_back(transfers_.at(transfer.spec.transfer_id));
  transfer.changed.notify_all();
  if (open_transfers_ == 0) none_open_.notify_all();
  return std::exchange(transfer.pages, nullptr);
}

absl::StatusOr<TransferStatus> KvStore::End(const std::string& transfer_id, TransferState outcome,
                                            const absl::Status& reason) {
  if (outcome == TransferState::kOpen || outcome == TransferState::kExpired) {
    return absl::InvalidArgumentError(
        absl::StrCat("a transfer cannot be ended as ", std::string(TransferStateName(outcome))));
  }
  PagesPtr dropped;
  TransferPtr transfer;
  {
    std::lock_guard lock(mutex_);
    LF_ASSIGN_OR_RETURN(transfer, FindLocked(transfer_id));
    dropped = EndLocked(*transfer, outcome, reason);
    ForgetTombstonesLocked();
  }
  dropped.reset();  // frees without the lock, and before the status counts bytes
  std::lock_guard lock(mutex_);
  return StatusLocked(*transfer);
}

void KvStore::FailAll(const absl::Status& reason) {
  std::vector<PagesPtr> dropped;
  std::lock_guard lock(mutex_);
  if (broken_.ok()) broken_ = reason;
  for (auto& [id, transfer] : transfers_) {
    dropped.push_back(EndLocked(*transfer, TransferState::kFailed, reason));
  }
}

int64_t KvStore::ExpireLeases() {
  std::vector<PagesPtr> dropped;
  int64_t num_expired = 0;
  {
    std::lock_guard lock(mutex_);
    const auto now = Now();
    for (auto& [id, transfer] : transfers_) {
      if (transfer->state != TransferState::kOpen || !transfer->lease.Expired(now)) continue;
      dropped.push_back(EndLocked(
          *transfer, TransferState::kExpired,
          absl::DeadlineExceededError(absl::StrCat("no sign of life for ", options_.lease.count(), " ms"))));
      ++num_expired;
    }
    ForgetTombstonesLocked();
  }
  return num_expired;
}

void KvStore::ForgetTombstonesLocked() {
  const auto now = Now();
  while (!tombstones_.empty() && (static_cast<int64_t>(tombstones_.size()) > options_.max_tombstones ||
                                  now - tombstones_.front()->ended_at >= options_.tombstone_life)) {
    transfers_.erase(tombstones_.front()->spec.transfer_id);
    tombstones_.pop_front();
  }
}

bool KvStore::WaitUntilNoneOpen(std::chrono::steady_clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  return none_open_.wait_until(lock, deadline, [this] { return open_transfers_ == 0; });
}

KvStoreUsage KvStore::usage() const {
  std::lock_guard lock(mutex_);
  KvStoreUsage usage;
  usage.open_transfers = open_transfers_;
  usage.tombstones = static_cast<int64_t>(tombstones_.size());
  for (const auto& [id, transfer] : transfers_) {
    if (transfer->state == TransferState::kOpen) usage.bytes_open += transfer->held_bytes->load();
  }
  usage.bytes_lingering = std::max<int64_t>(held_bytes_->load() - usage.bytes_open, 0);
  return usage;
}

absl::StatusOr<KvStore::PagesPtr> KvStore::PagesForLocked(const Transfer& transfer) const {
  if (EndedByConsumer(transfer.state)) return nullptr;
  if (transfer.state != TransferState::kOpen) {
    return EndedStatus(transfer.spec.transfer_id, transfer.state, transfer.reason);
  }
  return transfer.pages;
}

absl::Status KvStore::Append(Transfer& transfer, int64_t layer, int64_t row_begin, int64_t row_end,
                             HeadsView<const void> key, HeadsView<const void> value, DType dtype) {
  if (row_begin == row_end) return absl::OkStatus();
  PagesPtr to;
  {
    std::lock_guard lock(mutex_);
    LF_ASSIGN_OR_RETURN(to, PagesForLocked(transfer));
    if (to == nullptr) return absl::OkStatus();
    LF_RETURN_IF_ERROR(transfer.CheckNext(layer, row_begin, row_end));
    if (transfer.ring_rows > 0 && row_end - row_begin > transfer.Room()) {
      return absl::InternalError(
          absl::StrCat("KV store: ", row_end - row_begin, " rows came, there is room for ", transfer.Room()));
    }
  }
  LF_RETURN_IF_ERROR(to->pages->Write(layer, row_begin, row_end, key, value, dtype));
  to.reset();  // freed without the lock where the transfer has ended
  return Publish(transfer, layer, row_begin, row_end);
}

absl::Status KvStore::CopyOnDevice(Transfer& transfer, int64_t layer, int64_t row_begin, int64_t row_end,
                                   HeadsView<const void> key, HeadsView<const void> value) {
  PagesPtr to;
  {
    std::lock_guard lock(mutex_);
    LF_ASSIGN_OR_RETURN(to, PagesForLocked(transfer));
    LF_RETURN_IF_ERROR(transfer.CheckRows(layer, row_begin, row_end));
  }
  return to == nullptr ? absl::OkStatus() : to->pages->WriteOnDevice(layer, row_begin, row_end, key, value);
}

absl::Status KvStore::Publish(Transfer& transfer, int64_t layer, int64_t row_begin, int64_t row_end) {
  if (row_begin == row_end) return absl::OkStatus();
  std::lock_guard lock(mutex_);
  LF_ASSIGN_OR_RETURN(const PagesPtr pages, PagesForLocked(transfer));
  if (pages == nullptr) return absl::OkStatus();
  LF_RETURN_IF_ERROR(transfer.CheckNext(layer, row_begin, row_end));
  transfer.rows_ready = row_end;
  if (row_end == transfer.num_rows) {
    ++transfer.layers_ready;
    transfer.rows_ready = 0;
    transfer.waited = {};
  }
  transfer.changed.notify_all();
  return absl::OkStatus();
}

absl::StatusOr<int64_t> KvStore::WaitForRoom(Transfer& transfer,
                                             std::chrono::steady_clock::time_point deadline) {
  constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();
  PagesPtr dropped;
  std::unique_lock lock(mutex_);
  if (transfer.ring_rows == 0) return kNoLimit;
  const auto start = std::chrono::steady_clock::now();
  transfer.changed.wait_until(lock, deadline,
                              [&] { return transfer.state != TransferState::kOpen || transfer.Room() > 0; });
  if (EndedByConsumer(transfer.state)) return kNoLimit;
  if (transfer.state != TransferState::kOpen) {
    return EndedStatus(transfer.spec.transfer_id, transfer.state, transfer.reason);
  }
  transfer.waited += std::chrono::steady_clock::now() - start;
  if (transfer.Room() > 0) return transfer.Room();
  if (transfer.waited < options_.reader_timeout) return 0;
  dropped =
      EndLocked(transfer, TransferState::kFailed,
                absl::DeadlineExceededError(absl::StrCat(
                    "layer ", transfer.layers_ready, " waited ", options_.reader_timeout.count(),
                    " ms for room at row ", transfer.rows_ready, ": ",
                    transfer.lease.readers() > 0 ? "the reader is too slow" : "nobody reads this transfer")));
  ForgetTombstonesLocked();
  return EndedStatus(transfer.spec.transfer_id, transfer.state, transfer.reason);
}

absl::Status KvStore::Finish(Transfer& transfer, const absl::Status& outcome) {
  PagesPtr dropped;
  std::lock_guard lock(mutex_);
  transfer.lease.PrefillDone(Now());
  if (transfer.state != TransferState::kOpen) {
    if (EndedByConsumer(transfer.state) || !outcome.ok()) return absl::OkStatus();
    return EndedStatus(transfer.spec.transfer_id, transfer.state, transfer.reason);
  }
  absl::Status reason = outcome;
  if (outcome.ok()) {
    if (transfer.layers_ready == transfer.spec.num_layers) return absl::OkStatus();
    reason = absl::InternalError(absl::StrCat("KV store: the prefill finished with ", transfer.layers_ready,
                                              " of ", transfer.spec.num_layers, " layers appended"));
  }
  const bool cancelled =
      absl::IsCancelled(reason) || absl::IsDeadlineExceeded(reason) || absl::IsAborted(reason);
  dropped = EndLocked(transfer, cancelled ? TransferState::kAborted : TransferState::kFailed, reason);
  ForgetTombstonesLocked();
  return outcome.ok() ? reason : absl::OkStatus();
}

}  // namespace longfill
