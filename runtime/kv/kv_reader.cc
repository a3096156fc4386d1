// The readers of a KvStore.

#include <cstddef>

#include "absl/strings/str_cat.h"
#include "runtime/kv/kv_store.h"
#include "runtime/kv/kv_store_internal.h"

namespace longfill {

KvReader::~KvReader() {
  KvStore::PagesPtr dropped;
  std::lock_guard lock(store_->mutex_);
  KvStore::Transfer& transfer = *transfer_;
  transfer.lease.ReaderWent(store_->Now());
  if (transfer.ring_rows == 0 || transfer.num_rows == 0 || transfer.rows_taken % transfer.num_rows == 0)
    return;
  dropped = store_->EndLocked(
      transfer, TransferState::kFailed,
      absl::AbortedError(absl::StrCat("its reader left at row ", transfer.rows_taken % transfer.num_rows,
                                      " of ", transfer.num_rows, " of layer ", transfer.next_layer(),
                                      " and nobody else can have what it took")));
  store_->ForgetTombstonesLocked();
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

absl::Status KvReader::Copy(int64_t layer, const KvPiece& piece, KvLayout layout, std::string* key,
                            std::string* value) {
  KvStore::Transfer& transfer = *transfer_;
  KvStore::PagesPtr held;
  {
    std::lock_guard lock(store_->mutex_);
    if (transfer.state != TransferState::kOpen) {
      return EndedStatus(transfer.spec.transfer_id, transfer.state, transfer.reason);
    }
    if (transfer.ring_rows > 0 && layer * transfer.num_rows + piece.row_begin != transfer.rows_taken) {
      return absl::InternalError(absl::StrCat("row ", piece.row_begin, " of layer ", layer,
                                              " is copied, row number ", transfer.rows_taken, " is next"));
    }
    held = transfer.pages;
  }
  const KvPageShape page{.head_begin = selection_.head_begin,
                         .num_heads = selection_.head_end - selection_.head_begin,
                         .num_rows = piece.num_tokens,
                         .head_dim = transfer.spec.head_dim,
                         .dtype = transfer.spec.dtype,
                         .layout = layout};
  key->resize(static_cast<size_t>(page.Bytes()));
  value->resize(key->size());
  LF_RETURN_IF_ERROR(held->pages->Read(layer, piece.row_begin, page,
                                       reinterpret_cast<std::byte*>(key->data()),
                                       reinterpret_cast<std::byte*>(value->data())));
  held.reset();
  if (transfer.ring_rows == 0) return absl::OkStatus();
  std::lock_guard lock(store_->mutex_);
  transfer.rows_taken += piece.num_tokens;
  transfer.changed.notify_all();
  return absl::OkStatus();
}

}  // namespace longfill
