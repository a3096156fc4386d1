#include "runtime/serving/kv_service.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/client/convert.h"
#include "runtime/kv/crc32c.h"
#include "runtime/observe/log.h"

namespace longfill {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr int64_t kDefaultMessageBytes = int64_t{512} << 10;
constexpr int64_t kMinPagesBytes = int64_t{16} << 10;
constexpr int64_t kMaxPagesBytes = int64_t{2} << 20;
constexpr milliseconds kWaitSlice{50};  // a reader that is gone is noticed within this
constexpr size_t kMaxReasonBytes = 256;

}  // namespace

// One ReadPages call. Runs on its gRPC thread; Tick looks at write_since_ from outside.
class KvServiceImpl::PageStream {
 public:
  PageStream(KvServiceImpl* service, grpc::ServerContext* context, const v1::ReadPagesRequest& request,
             grpc::ServerWriter<v1::ReadPagesResponse>* writer)
      : service_(service), context_(context), request_(request), writer_(writer) {
    std::lock_guard lock(service_->mutex_);
    service_->streams_.insert(this);
  }
  ~PageStream() {
    std::lock_guard lock(service_->mutex_);
    service_->streams_.erase(this);
  }

  grpc::Status Run() {
    const absl::Status status = SendAll();
    v1::ReadPagesResponse last;
    v1::ReadEnd* end = last.mutable_end();
    end->set_complete(status.ok());
    if (const auto state = service_->store_->GetStatus(request_.transfer_id()); state.ok()) {
      end->set_state(ToProto(state->state));
      end->set_reason(std::string(state->reason.message()));
    }
    end->set_num_pages(num_pages_);
    end->set_num_bytes(num_bytes_);
    (void)Write(last);  // a reader that is gone needs no end
    return ToGrpc(status);
  }

  bool StalledSince(steady_clock::time_point limit) const {
    const auto since = write_since_.load();
    return since != steady_clock::time_point{} && since < limit;
  }
  void Cancel() { context_->TryCancel(); }

 private:
  absl::Status SendAll() {
    LF_ASSIGN_OR_RETURN(layout_, FromProto(request_.layout()));
    const KvSelection asked{.layer_begin = request_.layer_begin(),
                            .layer_end = request_.layer_end(),
                            .head_begin = request_.head_begin(),
                            .head_end = request_.head_end(),
                            .token_begin = request_.token_begin(),
                            .token_end = request_.token_end()};
    LF_ASSIGN_OR_RETURN(reader_, service_->store_->Read(request_.transfer_id(), asked));
    const KvSelection& selection = reader_->selection();
    if (request_.max_message_bytes() < 0 || request_.max_wait_ms() < 0) {
      return absl::InvalidArgumentError("max_message_bytes and max_wait_ms must not be negative");
    }
    max_bytes_ = request_.max_message_bytes() == 0
                     ? kDefaultMessageBytes
                     : std::clamp(request_.max_message_bytes(), kMinPagesBytes, kMaxPagesBytes);
    const std::vector<KvPiece> pieces = CutIntoPieces(selection, reader_->spec(), max_bytes_);
    for (int64_t layer = selection.layer_begin; layer < selection.layer_end; ++layer) {
      LF_RETURN_IF_ERROR(SendLayer(layer, pieces));
    }
    return absl::OkStatus();
  }

  // Pages of a layer, as many in a message as are there and fit.
  absl::Status SendLayer(int64_t layer, const std::vector<KvPiece>& pieces) {
    v1::ReadPagesResponse message;
    int64_t message_bytes = 0;
    for (const KvPiece& piece : pieces) {
      const int64_t row_end = piece.row_begin + piece.num_tokens;
      if (message_bytes > 0 && !reader_->WaitForRows(layer, row_end, steady_clock::now()).ok()) {
        LF_RETURN_IF_ERROR(Flush(&message, &message_bytes));
      }
      LF_RETURN_IF_ERROR(Wait(layer, row_end));
      LF_ASSIGN_OR_RETURN(const int64_t piece_bytes, AddPage(layer, piece, &message));
      message_bytes += piece_bytes;
      if (message_bytes + piece_bytes > max_bytes_) LF_RETURN_IF_ERROR(Flush(&message, &message_bytes));
    }
    return Flush(&message, &message_bytes);
  }

  absl::Status Wait(int64_t layer, int64_t row_end) {
    const auto start = steady_clock::now();
    while (true) {
      absl::Status status = reader_->WaitForRows(layer, row_end, steady_clock::now() + kWaitSlice);
      if (!absl::IsDeadlineExceeded(status)) return status;
      if (context_->IsCancelled()) return absl::CancelledError("the reader cancelled or is gone");
      if (request_.max_wait_ms() > 0 && steady_clock::now() - start >= milliseconds(request_.max_wait_ms())) {
        return absl::DeadlineExceededError(
            absl::StrCat("layer ", layer, " did not come within max_wait_ms ", request_.max_wait_ms()));
      }
    }
  }

  // Bytes added.
  absl::StatusOr<int64_t> AddPage(int64_t layer, const KvPiece& piece, v1::ReadPagesResponse* message) {
    v1::KvPage* page = message->add_pages();
    const KvSelection& selection = reader_->selection();
    page->set_layer(layer);
    page->set_head_begin(selection.head_begin);
    page->set_num_heads(selection.head_end - selection.head_begin);
    page->set_token_begin(piece.token_begin);
    page->set_num_tokens(piece.num_tokens);
    LF_RETURN_IF_ERROR(reader_->Copy(layer, piece, layout_, page->mutable_key(), page->mutable_value()));
    page->set_key_crc32c(Crc32c(page->key().data(), static_cast<int64_t>(page->key().size())));
    page->set_value_crc32c(Crc32c(page->value().data(), static_cast<int64_t>(page->value().size())));
    const int64_t bytes = static_cast<int64_t>(page->key().size() + page->value().size());
    ++num_pages_;
    num_bytes_ += bytes;
    return bytes;
  }

  absl::Status Flush(v1::ReadPagesResponse* message, int64_t* message_bytes) {
    if (*message_bytes == 0) return absl::OkStatus();
    *message_bytes = 0;
    const bool written = Write(*message);
    message->Clear();
    return written ? absl::OkStatus() : absl::CancelledError("the reader cancelled or is gone");
  }

  bool Write(const v1::ReadPagesResponse& message) {
    write_since_ = steady_clock::now();
    const bool written = writer_->Write(message);
    write_since_ = steady_clock::time_point{};
    return written;
  }

  KvServiceImpl* const service_;
  grpc::ServerContext* const context_;
  const v1::ReadPagesRequest& request_;
  grpc::ServerWriter<v1::ReadPagesResponse>* const writer_;
  std::unique_ptr<KvReader> reader_;
  KvLayout layout_ = KvLayout::kHeadsTokens;
  int64_t max_bytes_ = 0;
  int64_t num_pages_ = 0;
  int64_t num_bytes_ = 0;
  std::atomic<steady_clock::time_point> write_since_{steady_clock::time_point{}};
};

KvServiceImpl::KvServiceImpl(KvServiceOptions options, KvStore* store) : options_(options), store_(store) {}

void KvServiceImpl::Begin(FindManifest find_manifest, std::string rank0_endpoint) {
  std::lock_guard lock(mutex_);
  find_manifest_ = std::move(find_manifest);
  rank0_endpoint_ = std::move(rank0_endpoint);
}

void KvServiceImpl::Tick() {
  const auto limit = steady_clock::now() - options_.stall_limit;
  std::lock_guard lock(mutex_);
  for (PageStream* stream : streams_) {
    if (!stream->StalledSince(limit)) continue;
    Log(LogLevel::kWarning, "reader_stalled", {{"limit_ms", options_.stall_limit.count()}});
    stream->Cancel();
  }
}

void KvServiceImpl::CancelStreams() {
  std::lock_guard lock(mutex_);
  for (PageStream* stream : streams_) stream->Cancel();
}

grpc::Status KvServiceImpl::GetManifest(grpc::ServerContext*, const v1::GetManifestRequest* request,
                                        v1::KvManifest* response) {
  FindManifest find;
  std::string rank0;
  {
    std::lock_guard lock(mutex_);
    find = find_manifest_;
    rank0 = rank0_endpoint_;
  }
  if (!find && rank0.empty()) return ToGrpc(absl::UnavailableError("the server is still loading the model"));
  if (!find)
    return ToGrpc(absl::FailedPreconditionError(absl::StrCat("rank 0 at ", rank0, " has the manifests")));
  const auto manifest = find(request->transfer_id());
  if (manifest.ok()) *response = **manifest;
  return ToGrpc(manifest.status());
}

grpc::Status KvServiceImpl::ReadPages(grpc::ServerContext* context, const v1::ReadPagesRequest* request,
                                      grpc::ServerWriter<v1::ReadPagesResponse>* writer) {
  if (active_streams_.fetch_add(1) >= options_.max_streams) {
    active_streams_.fetch_sub(1);
    context->AddTrailingMetadata("grpc-retry-pushback-ms", "1000");
    return ToGrpc(absl::ResourceExhaustedError(
        absl::StrCat("too many page streams at once, the limit is ", options_.max_streams)));
  }
  grpc::Status status;
  {
    PageStream stream(this, context, *request, writer);
    status = stream.Run();
  }
  active_streams_.fetch_sub(1);
  return status;
}

grpc::Status KvServiceImpl::RenewLease(grpc::ServerContext*, const v1::RenewLeaseRequest* request,
                                       v1::RenewLeaseResponse* response) {
  const absl::StatusOr<TransferStatus> status = store_->RenewLease(request->transfer_id());
  if (!status.ok()) return ToGrpc(status.status());
  response->set_state(ToProto(status->state));
  response->set_reason(std::string(status->reason.message()));
  if (status->state == TransferState::kOpen) response->set_lease_ms(store_->lease().count());
  return grpc::Status::OK;
}

grpc::Status KvServiceImpl::EndTransfer(grpc::ServerContext*, const v1::EndTransferRequest* request,
                                        v1::EndTransferResponse* response) {
  const std::string reason = request->reason().substr(0, kMaxReasonBytes);
  absl::StatusOr<TransferStatus> status;
  switch (request->outcome()) {
    case v1::TRANSFER_STATE_COMPLETE:
      status = store_->End(request->transfer_id(), TransferState::kComplete, absl::OkStatus());
      break;
    case v1::TRANSFER_STATE_ABORTED:
      status = store_->End(
          request->transfer_id(), TransferState::kAborted,
          absl::AbortedError(absl::StrCat("by the consumer", reason.empty() ? "" : ": ", reason)));
      break;
    default:
      return ToGrpc(absl::InvalidArgumentError(
          absl::StrCat("outcome ", static_cast<int>(request->outcome()), ": COMPLETE or ABORTED is wanted")));
  }
  if (!status.ok()) return ToGrpc(status.status());
  response->set_state(ToProto(status->state));
  response->set_reason(std::string(status->reason.message()));
  return grpc::Status::OK;
}

grpc::Status KvServiceImpl::GetTransferState(grpc::ServerContext*, const v1::GetTransferStateRequest* request,
                                             v1::GetTransferStateResponse* response) {
  const absl::StatusOr<TransferStatus> status = store_->GetStatus(request->transfer_id());
  if (!status.ok()) return ToGrpc(status.status());
  response->set_state(ToProto(status->state));
  response->set_reason(std::string(status->reason.message()));
  response->set_layers_ready(status->layers_ready);
  response->set_num_layers(status->num_layers);
  response->set_bytes_held(status->bytes_held);
  response->set_active_readers(status->active_readers);
  response->set_lease_remaining_ms(status->lease_remaining.count());
  return grpc::Status::OK;
}

}  // namespace longfill
