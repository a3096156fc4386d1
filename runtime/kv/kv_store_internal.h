#ifndef LONGFILL_RUNTIME_KV_KV_STORE_INTERNAL_H_
#define LONGFILL_RUNTIME_KV_KV_STORE_INTERNAL_H_

// What a KvStore knows of each transfer, for its own files.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <utility>

#include "runtime/kv/kv_store.h"

namespace longfill {

// Counts the bytes of pages for as long as somebody has them.
struct KvStore::HeldPages {
  HeldPages(std::unique_ptr<KvPages> p, std::shared_ptr<std::atomic<int64_t>> of_store,
            std::shared_ptr<std::atomic<int64_t>> of_transfer)
      : pages(std::move(p)),
        bytes(pages->bytes()),
        store_bytes(std::move(of_store)),
        transfer_bytes(std::move(of_transfer)) {
    store_bytes->fetch_add(bytes);
    transfer_bytes->fetch_add(bytes);
  }
  HeldPages(const HeldPages&) = delete;
  HeldPages& operator=(const HeldPages&) = delete;
  ~HeldPages() {
    pages.reset();
    store_bytes->fetch_sub(bytes);
    transfer_bytes->fetch_sub(bytes);
  }

  std::unique_ptr<KvPages> pages;
  const int64_t bytes;
  const std::shared_ptr<std::atomic<int64_t>> store_bytes;
  const std::shared_ptr<std::atomic<int64_t>> transfer_bytes;
};

// Everything but `spec` and the contents of pages is guarded by the store's mutex.
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
  PagesPtr pages;  // empty once ended
  int64_t layers_ready = 0;
  int64_t rows_ready = 0;  // of layer layers_ready
  const std::shared_ptr<std::atomic<int64_t>> held_bytes = std::make_shared<std::atomic<int64_t>>(0);

  // Where each row goes to one reader.
  int64_t ring_rows = 0;                          // 0: rows stay
  int64_t rows_taken = 0;                         // over all layers
  std::chrono::steady_clock::duration waited{0};  // for room in layer layers_ready

  bool HasRows(int64_t layer, int64_t row_end) const {
    return layer < layers_ready || (layer == layers_ready && row_end <= rows_ready);
  }
  int64_t Room() const { return ring_rows - (layers_ready * num_rows + rows_ready - rows_taken); }
  int64_t next_layer() const { return num_rows == 0 ? spec.num_layers : rows_taken / num_rows; }
  absl::Status CheckOnlyReader(const KvSelection& selection) const;
  // That the rows lie in the transfer, and that they come next.
  absl::Status CheckRows(int64_t layer, int64_t row_begin, int64_t row_end) const;
  absl::Status CheckNext(int64_t layer, int64_t row_begin, int64_t row_end) const;
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_KV_KV_STORE_INTERNAL_H_
