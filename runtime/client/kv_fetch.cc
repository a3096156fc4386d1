#include "runtime/client/kv_fetch.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "longfill/v1/kv.grpc.pb.h"
#include "runtime/client/channel.h"
#include "runtime/client/convert.h"
#include "runtime/client/endpoint.h"
#include "runtime/kv/crc32c.h"

namespace longfill {
namespace {

constexpr std::chrono::seconds kConnectTime{2};

// The place of the next page of one rank: pages must come exactly there.
class PageCursor {
 public:
  PageCursor(const KvManifest& manifest, const KvShard& shard)
      : manifest_(manifest), shard_(shard), row_bytes_(manifest.head_dim * DTypeBytes(manifest.dtype)) {
    if (shard.token_ranges.empty()) {
      layer_ = manifest.num_layers;
    } else {
      token_ = shard.token_ranges.front().begin;
    }
  }

  // Checks a page and steps behind it. DataLoss names what is wrong.
  absl::StatusOr<KvPageView> Take(const v1::KvPage& page) {
    if (Done()) return Bad(page, "comes after the last one");
    const TokenRange& range = shard_.token_ranges[range_];
    if (page.layer() != layer_ || page.token_begin() != token_ || page.head_begin() != 0 ||
        page.num_heads() != manifest_.num_kv_heads) {
      return Bad(page, absl::StrCat("is out of order: token ", token_, " of layer ", layer_,
                                    ", all heads, is next"));
    }
    if (page.num_tokens() < 1 || page.token_begin() + page.num_tokens() > range.end) {
      return Bad(page, absl::StrCat("has ", page.num_tokens(), " tokens, the range ends at ", range.end));
    }
    const size_t bytes = static_cast<size_t>(page.num_heads() * page.num_tokens() * row_bytes_);
    if (page.key().size() != bytes || page.value().size() != bytes) {
      return Bad(page, absl::StrCat("has ", page.key().size(), " and ", page.value().size(),
                                    " bytes instead of ", bytes));
    }
    if (Crc32c(page.key().data(), static_cast<int64_t>(bytes)) != page.key_crc32c()) {
      return Bad(page, "has keys that do not match their CRC-32C");
    }
    if (Crc32c(page.value().data(), static_cast<int64_t>(bytes)) != page.value_crc32c()) {
      return Bad(page, "has values that do not match their CRC-32C");
    }
    const KvPageView view{.rank = shard_.rank,
                          .layer = page.layer(),
                          .head_begin = page.head_begin(),
                          .num_heads = page.num_heads(),
                          .token_begin = page.token_begin(),
                          .row_begin = row_,
                          .num_tokens = page.num_tokens(),
                          .key = std::as_bytes(std::span(page.key().data(), bytes)),
                          .value = std::as_bytes(std::span(page.value().data(), bytes))};
    Step(page.num_tokens(), range.end);
    return view;
  }

  bool Done() const { return layer_ == manifest_.num_layers; }
  std::string Next() const { return absl::StrCat("layer ", layer_, ", token ", token_); }

 private:
  void Step(int64_t num_tokens, int64_t range_end) {
    token_ += num_tokens;
    row_ += num_tokens;
    if (token_ < range_end) return;
    if (++range_ == shard_.token_ranges.size()) {
      range_ = 0;
      row_ = 0;
      ++layer_;
    }
    token_ = shard_.token_ranges[range_].begin;
  }

  absl::Status Bad(const v1::KvPage& page, std::string_view what) const {
    return absl::DataLossError(absl::StrCat("KV page of rank ", shard_.rank, ", layer ", page.layer(),
                                            ", token ", page.token_begin(), ": ", std::string(what)));
  }

  const KvManifest& manifest_;
  const KvShard& shard_;
  const int64_t row_bytes_;
  int64_t layer_ = 0;
  size_t range_ = 0;
  int64_t token_ = 0;
  int64_t row_ = 0;
};

}  // namespace

struct KvFetch::Peer {
  const KvShard* shard = nullptr;
  std::string endpoint;
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<v1::KvService::Stub> stub;
  grpc::ClientContext context;  // of ReadPages
  std::thread thread;
};

KvFetch::KvFetch(const KvManifest& manifest, const KvFetchOptions& options, KvConsumer* consumer,
                 std::function<void()> on_error)
    : manifest_(manifest), options_(options), consumer_(consumer), on_error_(std::move(on_error)) {}

absl::StatusOr<std::unique_ptr<KvFetch>> KvFetch::Start(const KvManifest& manifest, const std::string& target,
                                                        const KvFetchOptions& options, KvConsumer* consumer,
                                                        std::function<void()> on_error) {
  std::unique_ptr<KvFetch> fetch(new KvFetch(manifest, options, consumer, std::move(on_error)));
  for (const KvShard& shard : fetch->manifest_.shards) {
    auto peer = std::make_unique<Peer>();
    peer->shard = &shard;
    LF_ASSIGN_OR_RETURN(peer->endpoint, ResolveEndpoint(shard.endpoint, target));
    peer->channel = MakeChannel(peer->endpoint);
    peer->stub = v1::KvService::NewStub(peer->channel);
    peer->context.set_deadline(options.deadline);
    fetch->peers_.push_back(std::move(peer));
  }
  LF_RETURN_IF_ERROR(consumer->OnManifest(fetch->manifest_));
  for (const auto& peer : fetch->peers_) {
    peer->thread = std::thread([raw = fetch.get(), &peer = *peer] { raw->ReadPeer(peer); });
  }
  fetch->heartbeat_ = std::thread([raw = fetch.get()] { raw->Heartbeat(); });
  return fetch;
}

KvFetch::~KvFetch() {
  Cancel(absl::CancelledError("the fetch was dropped"));
  {
    std::lock_guard lock(mutex_);
    closing_ = true;
  }
  changed_.notify_all();
  for (const auto& peer : peers_) {
    if (peer->thread.joinable()) peer->thread.join();
  }
  if (heartbeat_.joinable()) heartbeat_.join();
}

void KvFetch::RecordError(const absl::Status& status, bool remote) {
  {
    std::lock_guard lock(mutex_);
    if (!error_.ok()) return;
    error_ = status;
    report_at_ =
        std::chrono::steady_clock::now() + (remote ? options_.error_grace : std::chrono::milliseconds(0));
  }
  changed_.notify_all();
  Cancel(status);
}

void KvFetch::Cancel(const absl::Status& reason) {
  {
    std::lock_guard lock(mutex_);
    if (error_.ok()) error_ = reason;
  }
  for (const auto& peer : peers_) peer->context.TryCancel();
}

void KvFetch::ReadPeer(Peer& peer) {
  bool remote = false;
  const absl::Status status = ReadAll(peer, &remote);
  if (status.ok()) return;
  RecordError(Annotate(status, absl::StrCat("KV of rank ", peer.shard->rank, " at ", peer.endpoint)), remote);
}

absl::Status KvFetch::ReadAll(Peer& peer, bool* remote) {
  PageCursor cursor(manifest_, *peer.shard);
  if (cursor.Done()) return absl::OkStatus();
  // A call fails with the first attempt to connect; on a busy host that is now and then one too few.
  peer.channel->WaitForConnected(
      std::min(options_.deadline, std::chrono::system_clock::now() + kConnectTime));
  v1::ReadPagesRequest request;
  request.set_transfer_id(manifest_.transfer_id);
  request.set_layout(v1::KV_LAYOUT_HND);
  request.set_max_message_bytes(options_.message_bytes);
  const auto stream = peer.stub->ReadPages(&peer.context, request);
  v1::ReadPagesResponse response;
  absl::Status status;
  bool ended = false;
  while (status.ok() && stream->Read(&response)) {
    if (ended) {
      status = absl::DataLossError("a message came after the last one");
    }
    for (const v1::KvPage& page : response.pages()) {
      if (!status.ok()) break;
      const absl::StatusOr<KvPageView> view = cursor.Take(page);
      status = view.ok() ? consumer_->OnPage(*view) : view.status();
      if (status.ok()) bytes_received_ += static_cast<int64_t>(view->key.size() + view->value.size());
    }
    ended = ended || response.has_end();
  }
  if (!status.ok()) peer.context.TryCancel();
  const absl::Status finish = FromGrpc(stream->Finish());
  LF_RETURN_IF_ERROR(status);
  *remote = !finish.ok();
  LF_RETURN_IF_ERROR(finish);
  if (!ended || !cursor.Done()) {
    return absl::DataLossError(absl::StrCat("the stream ended before ", cursor.Next()));
  }
  return absl::OkStatus();
}

void KvFetch::Heartbeat() {
  const auto interval = std::max(options_.lease / 3, std::chrono::milliseconds(10));
  auto next_beat = std::chrono::steady_clock::now() + interval;
  std::unique_lock lock(mutex_);
  while (!closing_) {
    changed_.wait_until(lock, std::min(next_beat, report_at_));
    const auto now = std::chrono::steady_clock::now();
    if (closing_) return;
    if (now >= report_at_) {
      report_at_ = std::chrono::steady_clock::time_point::max();
      lock.unlock();
      if (on_error_) on_error_();
      lock.lock();
    }
    if (now < next_beat) continue;
    next_beat = now + interval;
    lock.unlock();
    RenewLeases(interval);
    lock.lock();
  }
}

void KvFetch::RenewLeases(std::chrono::milliseconds timeout) {
  for (const auto& peer : peers_) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + timeout);
    v1::RenewLeaseRequest request;
    request.set_transfer_id(manifest_.transfer_id);
    v1::RenewLeaseResponse response;
    // A beat that is lost is no error: the stream tells when the transfer is gone.
    (void)peer->stub->RenewLease(&context, request, &response);
  }
}

absl::Status KvFetch::Wait() {
  for (const auto& peer : peers_) {
    if (peer->thread.joinable()) peer->thread.join();
  }
  std::lock_guard lock(mutex_);
  return error_;
}

absl::Status KvFetch::End(TransferState outcome, const std::string& reason) {
  {
    std::lock_guard lock(mutex_);
    closing_ = true;
  }
  changed_.notify_all();
  absl::Status first;
  for (const auto& peer : peers_) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + options_.end_timeout);
    v1::EndTransferRequest request;
    request.set_transfer_id(manifest_.transfer_id);
    request.set_outcome(ToProto(outcome));
    request.set_reason(reason);
    v1::EndTransferResponse response;
    const absl::Status status = FromGrpc(peer->stub->EndTransfer(&context, request, &response));
    if (first.ok() && !status.ok()) {
      first = Annotate(status, absl::StrCat("end of the transfer on rank ", peer->shard->rank));
    }
  }
  return first;
}

}  // namespace longfill
