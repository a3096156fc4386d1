#ifndef LONGFILL_RUNTIME_KV_KV_STORE_H_
#define LONGFILL_RUNTIME_KV_KV_STORE_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels/base/status.h"
#include "runtime/kv/kv_page.h"
#include "runtime/kv/kv_sink.h"
#include "runtime/kv/kv_tier.h"
#include "runtime/kv/transfer_state.h"

namespace longfill {

struct KvStoreOptions {
  std::chrono::milliseconds lease{30000};
  // How long, and for how many ended transfers, the state and reason are remembered.
  std::chrono::milliseconds tombstone_life{600000};
  int64_t max_tombstones = 1024;
  // How long a prompt waits, for each layer in all, until a reader has made room (tiers that hold a part of
  // the rows). Less than the timeout of a communicator, since other ranks wait for this one.
  std::chrono::milliseconds reader_timeout{30000};
  // Tests give their own time; empty: std::chrono::steady_clock::now.
  std::function<std::chrono::steady_clock::time_point()> clock;
};

struct TransferStatus {
  TransferState state = TransferState::kOpen;
  absl::Status reason;       // of an ended one
  int64_t layers_ready = 0;  // whole layers, a prefix
  int64_t num_layers = 0;
  int64_t bytes_held = 0;  // also after the end, until readers have let go
  int active_readers = 0;
  std::chrono::milliseconds lease_remaining{-1};  // -1: does not run now, 0: ended
};

struct KvStoreUsage {
  int64_t open_transfers = 0;
  int64_t bytes_open = 0;
  int64_t bytes_lingering = 0;  // of ended transfers that readers still copy from; must go to 0
  int64_t tombstones = 0;
};

class KvReader;

// The KV cache of the prompts of one rank, from the acceptance of a request to the end of its transfer.
// Thread-safe. Sinks write without the lock above the watermark, readers read below it; the lock publishes
// the watermark. Memory of a transfer is taken from the tier when it opens and freed when it has ended and no
// reader copies from it. Sinks and readers must be gone before the store is destroyed.
//
// A tier that holds a part of the rows hands each of them to one reader: one reader at a time, forward, all
// heads and tokens. Between layers a reader may go and the next one goes on there; one that goes in the
// middle of a layer has the transfer FAIL, and the prompt with it, as has one that lets the prompt wait for
// longer than reader_timeout.
class KvStore {
 public:
  // `tier` outlives the store.
  KvStore(KvStoreOptions options, KvTier* tier);
  ~KvStore();
  KvStore(const KvStore&) = delete;
  KvStore& operator=(const KvStore&) = delete;

  // Opens a transfer for writing: the factory for PrefillEngine. ResourceExhausted: no memory for it;
  // InvalidArgument: an id that was used before, or a misshapen spec; Unavailable after FailAll.
  absl::StatusOr<std::unique_ptr<KvSink>> Open(const KvTransferSpec& spec);
  KvSinkFactory MakeSinkFactory();

  // NotFound for an unknown id; an ended transfer gives EndedStatus; InvalidArgument for a selection outside
  // of the transfer. Where each row goes to one reader: FailedPrecondition while there is another reader, or
  // where the first layer is not the next one to be taken, InvalidArgument for a part of the heads or tokens.
  absl::StatusOr<std::unique_ptr<KvReader>> Read(const std::string& transfer_id,
                                                 const KvSelection& asked = {});

  // All four: NotFound for an unknown id.
  absl::StatusOr<KvTransferSpec> GetSpec(const std::string& transfer_id) const;
  absl::StatusOr<TransferStatus> GetStatus(const std::string& transfer_id) const;
  absl::StatusOr<TransferStatus> RenewLease(const std::string& transfer_id);
  // `outcome` is kComplete, kAborted or kFailed, else InvalidArgument. Idempotent: the first end stays.
  absl::StatusOr<TransferStatus> End(const std::string& transfer_id, TransferState outcome,
                                     const absl::Status& reason);

  // Ends every open transfer as FAILED and refuses new ones: the group is broken.
  void FailAll(const absl::Status& reason);
  // Expires transfers whose lease ran out and forgets old tombstones. Call about once a second. Returns how
  // many expired.
  int64_t ExpireLeases();
  // Waits until no transfer is open; false at the deadline. Leases only run out if somebody calls
  // ExpireLeases.
  bool WaitUntilNoneOpen(std::chrono::steady_clock::time_point deadline);

  KvStoreUsage usage() const;
  std::chrono::milliseconds lease() const { return options_.lease; }

 private:
  friend class KvReader;
  friend class KvStoreSink;
  struct HeldPages;
  struct Transfer;
  using TransferPtr = std::shared_ptr<Transfer>;
  using PagesPtr = std::shared_ptr<HeldPages>;

  std::chrono::steady_clock::time_point Now() const;
  absl::StatusOr<TransferPtr> FindLocked(const std::string& transfer_id) const;
  TransferStatus StatusLocked(const Transfer& transfer) const;
  // Returns what the transfer held, to be dropped without the lock.
  PagesPtr EndLocked(Transfer& transfer, TransferState outcome, const absl::Status& reason);
  void ForgetTombstonesLocked();

  // Nothing where what comes is dropped, since the consumer has ended the transfer.
  absl::StatusOr<PagesPtr> PagesForLocked(const Transfer& transfer) const;
  absl::Status Append(Transfer& transfer, int64_t layer, int64_t row_begin, int64_t row_end,
                      HeadsView<const void> key, HeadsView<const void> value, DType dtype);
  absl::Status CopyOnDevice(Transfer& transfer, int64_t layer, int64_t row_begin, int64_t row_end,
                            HeadsView<const void> key, HeadsView<const void> value);
  absl::Status Publish(Transfer& transfer, int64_t layer, int64_t row_begin, int64_t row_end);
  absl::StatusOr<int64_t> WaitForRoom(Transfer& transfer, std::chrono::steady_clock::time_point deadline);
  absl::Status Finish(Transfer& transfer, const absl::Status& outcome);

  const KvStoreOptions options_;
  KvTier* const tier_;
  const std::shared_ptr<std::atomic<int64_t>> held_bytes_;  // of all pages alive

  mutable std::mutex mutex_;  // a leaf: nothing else is locked under it
  std::condition_variable none_open_;
  std::map<std::string, TransferPtr> transfers_;  // open ones and tombstones
  std::deque<TransferPtr> tombstones_;            // in the order of their end
  int64_t open_transfers_ = 0;
  absl::Status broken_;
};

// One stream of reads; the transfer does not expire while it lives. One thread at a time.
class KvReader {
 public:
  ~KvReader();
  KvReader(const KvReader&) = delete;
  KvReader& operator=(const KvReader&) = delete;

  const KvTransferSpec& spec() const;
  const KvSelection& selection() const { return selection_; }
  // Waits until the local rows [0, row_end) of the layer are there. DeadlineExceeded at the deadline (the
  // reader stays usable); EndedStatus once the transfer has ended, also if the rows had been there.
  absl::Status WaitForRows(int64_t layer, int64_t row_end, std::chrono::steady_clock::time_point deadline);
  // Keys and values of a piece of the selection that was waited for, in the layout asked for. EndedStatus
  // once the transfer has ended, errors of the device. Where each row goes to one reader, pieces come in
  // order.
  absl::Status Copy(int64_t layer, const KvPiece& piece, KvLayout layout, std::string* key,
                    std::string* value);

 private:
  friend class KvStore;
  KvReader(KvStore* store, KvStore::TransferPtr transfer, const KvSelection& selection)
      : store_(store), transfer_(std::move(transfer)), selection_(selection) {}
  KvStore* const store_;
  const KvStore::TransferPtr transfer_;
  const KvSelection selection_;
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_KV_KV_STORE_H_
