#include "runtime/client/prefill_client.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "longfill/v1/kv.grpc.pb.h"
#include "longfill/v1/prefill.grpc.pb.h"
#include "runtime/client/channel.h"
#include "runtime/client/convert.h"
#include "runtime/client/endpoint.h"
#include "runtime/client/kv_fetch.h"
#include "runtime/kv/crc32c.h"

namespace longfill {
namespace {

using std::chrono::steady_clock;
using PrefillStream = grpc::ClientReaderWriter<v1::PrefillRequest, v1::PrefillEvent>;

v1::PrefillRequest HeaderOf(std::span<const int32_t> ids, const SubmitOptions& options) {
  v1::PrefillRequest request;
  v1::PrefillHeader* header = request.mutable_header();
  header->set_request_id(options.request_id);
  header->set_num_tokens(static_cast<int64_t>(ids.size()));
  header->mutable_attention()->set_spec(options.attention.text);
  header->mutable_attention()->set_pattern_json(options.attention.pattern_json);
  header->set_coverage(ToProto(options.coverage));
  for (const int64_t position : options.logits_positions) header->add_logits_positions(position);
  if (options.kv_dtype) header->set_kv_dtype(ToProto(*options.kv_dtype));
  if (options.recall) *header->mutable_recall() = ToProto(*options.recall);
  return request;
}

// A server that ends the call early makes a write fail; its status says why.
void SendPrompt(PrefillStream& stream, std::span<const int32_t> ids, const SubmitOptions& options,
                int64_t ids_per_message) {
  if (!stream.Write(HeaderOf(ids, options))) return;
  const size_t step = static_cast<size_t>(std::max<int64_t>(ids_per_message, 1));
  v1::PrefillRequest request;
  for (size_t begin = 0; begin < ids.size(); begin += step) {
    const auto chunk = ids.subspan(begin, std::min(step, ids.size() - begin));
    request.mutable_tokens()->mutable_ids()->Assign(chunk.begin(), chunk.end());
    if (!stream.Write(request)) return;
  }
  stream.WritesDone();
}

}  // namespace

struct PrefillClient::Impl {
  std::string target;
  ClientOptions options;
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<v1::PrefillService::Stub> prefill;
  std::unique_ptr<v1::KvService::Stub> kv;
};

namespace {

// One Prefill call: takes its events until the end, and starts the fetch at the acceptance.
class PrefillRun {
 public:
  PrefillRun(const std::string& target, const ClientOptions& options, KvConsumer* consumer,
             const PrefillEvents& events, Cancellation* cancellation, grpc::ClientContext* context)
      : target_(target),
        options_(options),
        consumer_(consumer),
        events_(events),
        cancellation_(cancellation),
        context_(context) {}

  void Take(const v1::PrefillEvent& event) {
    switch (event.event_case()) {
      case v1::PrefillEvent::kQueued:
        if (events_.on_queued) events_.on_queued(event.queued().position());
        break;
      case v1::PrefillEvent::kAccepted:
        Fail(TakeAccepted(event.accepted()));
        break;
      case v1::PrefillEvent::kProgress:
        if (events_.on_progress) events_.on_progress(FromProto(event.progress()));
        break;
      case v1::PrefillEvent::kLogits:
        Fail(TakeLogits(event.logits()));
        break;
      case v1::PrefillEvent::kResult:
        Fail(TakeResult(event.result()));
        break;
      case v1::PrefillEvent::kError:
        refusal_.retry_after = std::chrono::milliseconds(event.error().retry_after_ms());
        refusal_.max_tokens = event.error().max_tokens();
        break;
      case v1::PrefillEvent::EVENT_NOT_SET:
        break;  // of a newer service
    }
  }

  // `status` is that of the call. Ends the transfer one way or the other.
  absl::StatusOr<Prefilled> Finish(absl::Status status) {
    if (!error_.ok()) status = error_;
    if (status.ok() && !has_result_) status = absl::DataLossError("the call ended without a result");
    if (fetch_ != nullptr) {
      if (!status.ok()) fetch_->Cancel(absl::CancelledError("the prefill has ended"));
      const Cancellation::Scope scope(cancellation_,
                                      [this] { fetch_->Cancel(absl::CancelledError("cancelled")); });
      const absl::Status fetched = fetch_->Wait();
      // A fetch that failed has cancelled the call: its error is the first.
      if (status.ok() || (absl::IsCancelled(status) && fetch_failed_)) status = fetched;
      out_.kv_bytes_received = fetch_->bytes_received();
      out_.kv_seconds = std::chrono::duration<double>(steady_clock::now() - accepted_at_).count();
      // What could not be told ends by its lease; the data is here and checked.
      (void)fetch_->End(status.ok() ? TransferState::kComplete : TransferState::kAborted,
                        status.ok() ? "" : std::string(status.message()));
    }
    LF_RETURN_IF_ERROR(status);
    return std::move(out_);
  }

  const PrefillRefusal& refusal() const { return refusal_; }

 private:
  // A consumer for callers that want none: the transfer is only ended.
  class NoConsumer final : public KvConsumer {
   public:
    absl::Status OnManifest(const KvManifest&) override { return absl::OkStatus(); }
    absl::Status OnPage(const KvPageView&) override { return absl::OkStatus(); }
  };

  void Fail(const absl::Status& status) {
    if (status.ok() || !error_.ok()) return;
    error_ = status;
    context_->TryCancel();
  }

  absl::Status TakeAccepted(const v1::Accepted& message) {
    accepted_at_ = steady_clock::now();
    AcceptedPrefill accepted;
    LF_ASSIGN_OR_RETURN(accepted.manifest, FromProto(message.manifest()));
    accepted.attention = message.attention();
    accepted.memory_plan = FromProto(message.memory_plan());
    accepted.queue_seconds = message.queue_seconds();
    out_.manifest = accepted.manifest;
    out_.attention = accepted.attention;
    if (events_.on_accepted) events_.on_accepted(accepted);
    KvFetchOptions fetch_options;
    fetch_options.message_bytes = options_.page_message_bytes;
    fetch_options.deadline = context_->deadline();
    fetch_options.lease = std::chrono::milliseconds(message.manifest().lease_ms());
    KvManifest manifest = accepted.manifest;
    if (consumer_ == nullptr) {
      for (KvShard& shard : manifest.shards) shard.token_ranges.clear();  // nothing to read
    }
    LF_ASSIGN_OR_RETURN(fetch_, KvFetch::Start(manifest, target_, fetch_options,
                                               consumer_ == nullptr ? &no_consumer_ : consumer_, [this] {
                                                 fetch_failed_ = true;
                                                 context_->TryCancel();
                                               }));
    // At once: no rank waits for a reader that will not come. What could not be told ends by its lease.
    if (consumer_ == nullptr) (void)fetch_->End(TransferState::kComplete, "");
    return absl::OkStatus();
  }

  absl::Status TakeLogits(const v1::LogitsPart& part) {
    if (part.offset_bytes() != static_cast<int64_t>(logits_bytes_.size())) {
      return absl::DataLossError(absl::StrCat("logits at byte ", part.offset_bytes(), " came, byte ",
                                              logits_bytes_.size(), " is next"));
    }
    logits_bytes_.append(part.data());
    return absl::OkStatus();
  }

  absl::Status TakeResult(const v1::PrefillResult& result) {
    const int64_t want = static_cast<int64_t>(result.positions_size()) * result.vocab_size() *
                         static_cast<int64_t>(sizeof(float));
    if (static_cast<int64_t>(logits_bytes_.size()) != want) {
      return absl::DataLossError(
          absl::StrCat(logits_bytes_.size(), " bytes of logits came, ", want, " are said"));
    }
    if (Crc32c(logits_bytes_.data(), want) != result.logits_crc32c()) {
      return absl::DataLossError("the logits do not match their CRC-32C");
    }
    out_.positions.assign(result.positions().begin(), result.positions().end());
    out_.vocab_size = result.vocab_size();
    out_.logits.resize(logits_bytes_.size() / sizeof(float));
    std::memcpy(out_.logits.data(), logits_bytes_.data(), logits_bytes_.size());
    logits_bytes_.clear();
    out_.figures = FromProto(result.figures());
    has_result_ = true;
    return absl::OkStatus();
  }

  const std::string& target_;
  const ClientOptions& options_;
  KvConsumer* const consumer_;
  const PrefillEvents& events_;
  Cancellation* const cancellation_;
  grpc::ClientContext* const context_;
  NoConsumer no_consumer_;
  absl::Status error_;  // found here
  bool has_result_ = false;
  std::string logits_bytes_;
  Prefilled out_;
  PrefillRefusal refusal_;
  steady_clock::time_point accepted_at_;
  std::atomic<bool> fetch_failed_ = false;
  std::unique_ptr<KvFetch> fetch_;  // last: its threads use what is above
};

}  // namespace

PrefillClient::PrefillClient(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
PrefillClient::~PrefillClient() = default;

absl::StatusOr<std::unique_ptr<PrefillClient>> PrefillClient::Connect(const std::string& target,
                                                                      const ClientOptions& options) {
  LF_RETURN_IF_ERROR(ParseHostPort(target).status());
  auto impl = std::make_unique<Impl>();
  impl->target = target;
  impl->options = options;
  impl->channel = MakeChannel(target);
  if (!impl->channel->WaitForConnected(std::chrono::system_clock::now() + options.connect_timeout)) {
    return absl::UnavailableError(
        absl::StrCat("no service answers at ", target, " within ", options.connect_timeout.count(), " ms"));
  }
  impl->prefill = v1::PrefillService::NewStub(impl->channel);
  impl->kv = v1::KvService::NewStub(impl->channel);
  return std::unique_ptr<PrefillClient>(new PrefillClient(std::move(impl)));
}

absl::StatusOr<ModelFacts> PrefillClient::GetModelInfo() {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + impl_->options.connect_timeout);
  v1::ModelInfo info;
  LF_RETURN_IF_ERROR(FromGrpc(impl_->prefill->GetModelInfo(&context, {}, &info)));
  return ModelFacts{.architecture = info.architecture(),
                    .model_fingerprint = info.model_fingerprint(),
                    .num_layers = info.num_layers(),
                    .num_q_heads = info.num_q_heads(),
                    .num_kv_heads = info.num_kv_heads(),
                    .head_dim = info.head_dim(),
                    .vocab_size = info.vocab_size(),
                    .max_tokens = info.max_tokens(),
                    .mesh = {info.mesh().sequence(), info.mesh().head()},
                    .default_attention = info.default_attention(),
                    .instance_epoch = info.instance_epoch()};
}

absl::StatusOr<Prefilled> PrefillClient::Prefill(std::span<const int32_t> ids, const SubmitOptions& options,
                                                 KvConsumer* consumer, const PrefillEvents& events,
                                                 Cancellation* cancellation, PrefillRefusal* refusal) {
  grpc::ClientContext context;
  if (options.timeout.count() > 0) context.set_deadline(std::chrono::system_clock::now() + options.timeout);
  PrefillRun run(impl_->target, impl_->options, consumer, events, cancellation, &context);
  absl::Status status;
  {
    const Cancellation::Scope scope(cancellation, [&context] { context.TryCancel(); });
    const auto stream = impl_->prefill->Prefill(&context);
    SendPrompt(*stream, ids, options, impl_->options.ids_per_message);
    v1::PrefillEvent event;
    while (stream->Read(&event)) run.Take(event);
    status = FromGrpc(stream->Finish());
  }
  absl::StatusOr<Prefilled> result = run.Finish(status);
  if (refusal != nullptr) *refusal = run.refusal();
  if (!result.ok() && cancellation != nullptr && cancellation->cancelled())
    return absl::CancelledError("cancelled");
  return result;
}

absl::StatusOr<KvManifest> PrefillClient::FetchKv(const std::string& transfer_id, KvConsumer* consumer,
                                                  Cancellation* cancellation) {
  v1::KvManifest message;
  {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + impl_->options.connect_timeout);
    v1::GetManifestRequest request;
    request.set_transfer_id(transfer_id);
    LF_RETURN_IF_ERROR(FromGrpc(impl_->kv->GetManifest(&context, request, &message)));
  }
  LF_ASSIGN_OR_RETURN(KvManifest manifest, FromProto(message));
  KvFetchOptions options;
  options.message_bytes = impl_->options.page_message_bytes;
  options.lease = std::chrono::milliseconds(message.lease_ms());
  LF_ASSIGN_OR_RETURN(const auto fetch, KvFetch::Start(manifest, impl_->target, options, consumer, nullptr));
  absl::Status status;
  {
    const Cancellation::Scope scope(cancellation,
                                    [&fetch] { fetch->Cancel(absl::CancelledError("cancelled")); });
    status = fetch->Wait();
  }
  (void)fetch->End(status.ok() ? TransferState::kComplete : TransferState::kAborted,
                   std::string(status.message()));
  LF_RETURN_IF_ERROR(status);
  return manifest;
}

}  // namespace longfill
