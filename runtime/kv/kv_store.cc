#include "runtime/kv/kv_store.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/kv/kv_convert.h"

namespace longfill {

struct KvStore::Layer {
  Buffer key;
  Buffer value;
  int64_t bytes = 0;
  std::shared_ptr<std::atomic<int64_t>> store_bytes;
  std::shared_ptr<std::atomic<int64_t>> transfer_bytes;
  ~Layer() {
    store_bytes->fetch_sub(bytes);
    transfer_bytes->fetch_sub(bytes);
  }
};

// Everything but `spec` and the contents of layers is guarded by the store's mutex.
struct KvStore::Transfer {
  Transfer(const KvTransferSpec& s, std::chrono::milliseconds duration, Lease::Time now)
      : spec(s), num_rows(s.plan.NumTokens(s.rank)), lease(duration, now) {}

  const KvTransferSpec spec;
  const int64_t num_rows;
  std::condition_variable changed;
  TransferState state = TransferState::kOpen;
  absl::Status reason;
  Lease::Time ended_at;
  Lease lease;
  std::vector<std::shared_ptr<Layer>> layers;  // empty once ended
  int64_t layers_ready = 0;
  int64_t rows_ready = 0;  // of layer layers_ready
  const std::shared_ptr<std::atomic<int64_t>> held_bytes = std::make_shared<std::atomic<int64_t>>(0);

  bool HasRows(int64_t layer, int64_t row_end) const {
    return layer < layers_ready || (layer == layers_ready && row_end <= rows_ready);
  }
};

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

// Rows of all heads to [heads, num_rows, head_dim] of the spec's dtype, from row_begin on.
void Store(HeadsView<const void> from, DType dtype, const KvTransferSpec& spec, int64_t num_rows,
           int64_t row_begin, int64_t row_end, std::byte* to) {
  const int64_t row_bytes = spec.head_dim * DTypeBytes(spec.dtype);
  for (int64_t head = 0; head < spec.num_kv_heads; ++head) {
    ConvertHeadRows(from, dtype, head, row_end - row_begin, spec.head_dim, spec.dtype,
                    to + (head * num_rows + row_begin) * row_bytes);
  }
}

// A consumer that left is no error of the prefill; what the engine still appends is dropped.
bool EndedByConsumer(TransferState state) {
  return state == TransferState::kComplete || state == TransferState::kAborted;
}

}  // namespace

class KvStoreSink final : public KvSink {
 public:
  KvStoreSink(KvStore* store, KvStore::TransferPtr transfer)
      : store_(store), transfer_(std::move(transfer)) {}
  ~KvStoreSink() override {
    if (!finished_) (void)store_->Finish(*transfer_, absl::InternalError("the prefill dropped its KV sink"));
  }
  absl::Status Append(int64_t layer, int64_t row_begin, int64_t row_end, HeadsView<const void> key,
                      HeadsView<const void> value, DType dtype) override {
    return store_->Append(*transfer_, layer, row_begin, row_end, key, value, dtype);
  }
  absl::Status Finish(const absl::Status& outcome) override {
    finished_ = true;
    return store_->Finish(*transfer_, outcome);
  }

 private:
  KvStore* const store_;
  const KvStore::TransferPtr transfer_;
  bool finished_ = false;
};

KvStore::KvStore(KvStoreOptions options, MemoryResource* memory)
    : options_(std::move(options)), memory_(memory), held_bytes_(std::make_shared<std::atomic<int64_t>>(0)) {}

KvStore::~KvStore() = default;

std::chrono::steady_clock::time_point KvStore::Now() const {
  return options_.clock ? options_.clock() : std::chrono::steady_clock::now();
}

absl::StatusOr<std::unique_ptr<KvSink>> KvStore::Open(const KvTransferSpec& spec) {
  LF_RETURN_IF_ERROR(CheckSpec(spec));
  auto transfer = std::make_shared<Transfer>(spec, options_.lease, Now());
  const int64_t half = spec.num_kv_heads * transfer->num_rows * spec.head_dim * DTypeBytes(spec.dtype);
  for (int64_t index = 0; index < spec.num_layers; ++index) {
    auto layer = std::make_shared<Layer>();
    layer->store_bytes = held_bytes_;
    layer->transfer_bytes = transfer->held_bytes;
    LF_ASSIGN_OR_RETURN(layer->key, memory_->Allocate(half, "KV store: keys of a layer"));
    LF_ASSIGN_OR_RETURN(layer->value, memory_->Allocate(half, "KV store: values of a layer"));
    layer->bytes = 2 * half;
    held_bytes_->fetch_add(layer->bytes);
    transfer->held_bytes->fetch_add(layer->bytes);
    transfer->layers.push_back(std::move(layer));
  }
  if (transfer->num_rows == 0) transfer->layers_ready = spec.num_layers;  // nothing will be appended
  std::lock_guard lock(mutex_);
  LF_RETURN_IF_ERROR(broken_);
  if (!transfers_.emplace(spec.transfer_id, transfer).second) {
    return absl::InvalidArgumentError("KV transfer: this transfer id was used before");
  }
  ++open_transfers_;
  return std::make_unique<KvStoreSink>(this, std::move(transfer));
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

absl::StatusOr<std::unique_ptr<KvReader>> KvStore::Read(const std::string& transfer_id) {
  std::lock_guard lock(mutex_);
  LF_ASSIGN_OR_RETURN(TransferPtr transfer, FindLocked(transfer_id));
  if (transfer->state != TransferState::kOpen) {
    return EndedStatus(transfer_id, transfer->state, transfer->reason);
  }
  transfer->lease.ReaderCame();
  return std::unique_ptr<KvReader>(new KvReader(this, std::move(transfer)));
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

std::vector<std::shared_ptr<KvStore::Layer>> KvStore::EndLocked(Transfer& transfer, TransferState outcome,
                                                                const absl::Status& reason) {
  if (!IsLegalTransition(transfer.state, outcome)) return {};
  transfer.state = outcome;
  transfer.reason = reason;
  transfer.ended_at = Now();
  --open_transfers_;
  tombstones_.push_back(transfers_.at(transfer.spec.transfer_id));
  transfer.changed.notify_all();
  if (open_transfers_ == 0) none_open_.notify_all();
  return std::exchange(transfer.layers, {});
}

absl::StatusOr<TransferStatus> KvStore::End(const std::string& transfer_id, TransferState outcome,
                                            const absl::Status& reason) {
  if (outcome == TransferState::kOpen || outcome == TransferState::kExpired) {
    return absl::InvalidArgumentError(
        absl::StrCat("a transfer cannot be ended as ", std::string(TransferStateName(outcome))));
  }
  std::vector<std::shared_ptr<Layer>> dropped;
  TransferPtr transfer;
  {
    std::lock_guard lock(mutex_);
    LF_ASSIGN_OR_RETURN(transfer, FindLocked(transfer_id));
    dropped = EndLocked(*transfer, outcome, reason);
    ForgetTombstonesLocked();
  }
  dropped.clear();  // frees without the lock, and before the status counts bytes
  std::lock_guard lock(mutex_);
  return StatusLocked(*transfer);
}

void KvStore::FailAll(const absl::Status& reason) {
  std::vector<std::shared_ptr<Layer>> dropped;
  std::lock_guard lock(mutex_);
  if (broken_.ok()) broken_ = reason;
  for (auto& [id, transfer] : transfers_) {
    std::vector<std::shared_ptr<Layer>> layers = EndLocked(*transfer, TransferState::kFailed, reason);
    dropped.insert(dropped.end(), layers.begin(), layers.end());
  }
}

int64_t KvStore::ExpireLeases() {
  std::vector<std::shared_ptr<Layer>> dropped;
  int64_t num_expired = 0;
  {
    std::lock_guard lock(mutex_);
    const auto now = Now();
    for (auto& [id, transfer] : transfers_) {
      if (transfer->state != TransferState::kOpen || !transfer->lease.Expired(now)) continue;
      std::vector<std::shared_ptr<Layer>> layers = EndLocked(
          *transfer, TransferState::kExpired,
          absl::DeadlineExceededError(absl::StrCat("no sign of life for ", options_.lease.count(), " ms")));
      dropped.insert(dropped.end(), layers.begin(), layers.end());
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
    if (transfer->state == TransferState::kOpen) usage.bytes_open += transfer->spec.OwnedBytes();
  }
  usage.bytes_lingering = std::max<int64_t>(held_bytes_->load() - usage.bytes_open, 0);
  return usage;
}

absl::Status KvStore::Append(Transfer& transfer, int64_t layer, int64_t row_begin, int64_t row_end,
                             HeadsView<const void> key, HeadsView<const void> value, DType dtype) {
  std::shared_ptr<Layer> target;
  {
    std::lock_guard lock(mutex_);
    if (EndedByConsumer(transfer.state)) return absl::OkStatus();
    if (transfer.state != TransferState::kOpen) {
      return EndedStatus(transfer.spec.transfer_id, transfer.state, transfer.reason);
    }
    if (row_begin == row_end) return absl::OkStatus();
    if (layer != transfer.layers_ready || layer >= transfer.spec.num_layers ||
        row_begin != transfer.rows_ready || row_end < row_begin || row_end > transfer.num_rows) {
      return absl::InternalError(absl::StrCat("KV store: rows [", row_begin, ", ", row_end, ") of layer ",
                                              layer, " came, row ", transfer.rows_ready, " of layer ",
                                              transfer.layers_ready, " is next, of ", transfer.num_rows,
                                              " rows and ", transfer.spec.num_layers, " layers"));
    }
    target = transfer.layers[static_cast<size_t>(layer)];
  }
  Store(key, dtype, transfer.spec, transfer.num_rows, row_begin, row_end, target->key.as<std::byte>());
  Store(value, dtype, transfer.spec, transfer.num_rows, row_begin, row_end, target->value.as<std::byte>());
  std::lock_guard lock(mutex_);
  transfer.rows_ready = row_end;
  if (row_end == transfer.num_rows) {
    ++transfer.layers_ready;
    transfer.rows_ready = 0;
  }
  transfer.changed.notify_all();
  return absl::OkStatus();
}

absl::Status KvStore::Finish(Transfer& transfer, const absl::Status& outcome) {
  std::vector<std::shared_ptr<Layer>> dropped;
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

KvReader::~KvReader() {
  std::lock_guard lock(store_->mutex_);
  transfer_->lease.ReaderWent(store_->Now());
}

const KvTransferSpec& KvReader::spec() const { return transfer_->spec; }

absl::Status KvReader::WaitForRows(int64_t layer, int64_t row_end,
                                   std::chrono::steady_clock::time_point deadline) {
  const KvTransferSpec& wanted = transfer_->spec;
  if (layer < 0 || layer >= wanted.num_layers || row_end < 0 || row_end > transfer_->num_rows) {
    return absl::InvalidArgumentError(absl::StrCat("row ", row_end, " of layer ", layer,
                                                   " is asked for, there are ", transfer_->num_rows, " and ",
                                                   wanted.num_layers));
  }
  std::unique_lock lock(store_->mutex_);
  const auto settled = [&] {
    return transfer_->state != TransferState::kOpen || transfer_->HasRows(layer, row_end);
  };
  if (!transfer_->changed.wait_until(lock, deadline, settled)) {
    return absl::DeadlineExceededError(absl::StrCat("layer ", layer, " is not there yet"));
  }
  if (transfer_->state != TransferState::kOpen) {
    return EndedStatus(wanted.transfer_id, transfer_->state, transfer_->reason);
  }
  return absl::OkStatus();
}

absl::StatusOr<KvLayerView> KvReader::View(int64_t layer) {
  std::lock_guard lock(store_->mutex_);
  if (transfer_->state != TransferState::kOpen) {
    return EndedStatus(transfer_->spec.transfer_id, transfer_->state, transfer_->reason);
  }
  const std::shared_ptr<KvStore::Layer>& held = transfer_->layers.at(static_cast<size_t>(layer));
  KvLayerView view;
  view.pin = held;
  view.key = held->key.as<std::byte>();
  view.value = held->value.as<std::byte>();
  view.row_bytes = transfer_->spec.head_dim * DTypeBytes(transfer_->spec.dtype);
  view.head_stride_bytes = transfer_->num_rows * view.row_bytes;
  return view;
}

}  // namespace longfill
