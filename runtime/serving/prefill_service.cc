#include "runtime/serving/prefill_service.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/client/convert.h"
#include "runtime/observe/log.h"
#include "runtime/serving/prefill_call.h"

namespace longfill {

PrefillServiceImpl::PrefillServiceImpl(PrefillServiceOptions options, KvStore* store)
    : options_(options),
      store_(store),
      refuse_(absl::UnavailableError("the server is still loading the model")) {}

PrefillServiceImpl::~PrefillServiceImpl() = default;

void PrefillServiceImpl::Begin(const PrefillBackend* backend, PrefillScheduler* scheduler, GroupInfo group) {
  std::lock_guard lock(mutex_);
  backend_ = backend;
  scheduler_ = scheduler;
  group_ = std::move(group);
  refuse_ = absl::OkStatus();
}

std::vector<std::shared_ptr<PrefillCall>> PrefillServiceImpl::Calls() const {
  std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<PrefillCall>> calls;
  for (const auto& [key, call] : calls_) calls.push_back(call);
  return calls;
}

void PrefillServiceImpl::Forget(PrefillCall* call) {
  std::lock_guard lock(mutex_);
  calls_.erase(call);
}

void PrefillServiceImpl::Refuse(const absl::Status& reason) {
  {
    std::lock_guard lock(mutex_);
    refuse_ = reason;
  }
  for (const auto& call : Calls()) call->FailUpload(reason);
}

void PrefillServiceImpl::Tick() {
  const auto idle_since = std::chrono::steady_clock::now() - options_.upload_idle_limit;
  for (const auto& call : Calls()) call->FailIdleUpload(idle_since);
  std::lock_guard lock(mutex_);
  for (auto entry = manifests_.begin(); entry != manifests_.end();) {
    const absl::StatusOr<TransferStatus> status = store_->GetStatus(entry->first);
    const bool open = status.ok() && status->state == TransferState::kOpen;
    entry = open ? std::next(entry) : manifests_.erase(entry);
  }
}

grpc::ServerBidiReactor<v1::PrefillRequest, v1::PrefillEvent>* PrefillServiceImpl::Prefill(
    grpc::CallbackServerContext* context) {
  absl::Status refuse;
  std::shared_ptr<PrefillCall> call;
  PrefillScheduler* scheduler = nullptr;
  {
    std::lock_guard lock(mutex_);
    refuse = refuse_;
    scheduler = scheduler_;
    if (refuse.ok() && static_cast<int>(calls_.size()) >= options_.max_calls) {
      refuse = absl::ResourceExhaustedError(
          absl::StrCat("too many calls at once, the limit is ", options_.max_calls));
    }
    const ServedModel model = backend_ == nullptr ? ServedModel{} : backend_->model();
    call = std::make_shared<PrefillCall>(this, context, model.max_position_embeddings, model.compute_dtype,
                                         options_.recall);
    calls_.emplace(call.get(), call);  // until its OnDone
  }
  if (refuse.ok()) {
    call->Start();
  } else {
    std::optional<std::chrono::milliseconds> retry_after;
    if (absl::IsResourceExhausted(refuse)) retry_after = scheduler->RetryAfter();
    call->Refuse(refuse, retry_after);
  }
  return call.get();
}

std::shared_ptr<const v1::KvManifest> PrefillServiceImpl::AddManifest(
    const PrefillRequest& request, const std::vector<std::string>& token_hashes) {
  const ServedModel& model = backend_->model();
  const int64_t num_tokens = static_cast<int64_t>(request.token_ids.size());
  const ShardPlan plan(model.mesh, num_tokens);
  KvManifest manifest{.request_id = request.request_id,
                      .transfer_id = request.transfer_id,
                      .instance_epoch = group_.instance_epoch,
                      .architecture = model.architecture,
                      .model_fingerprint = model.model_fingerprint,
                      .token_hashes = token_hashes,
                      .num_tokens = num_tokens,
                      .num_layers = model.num_layers,
                      .num_kv_heads = model.num_kv_heads,
                      .head_dim = model.head_dim,
                      .rotary_chunk_tokens = model.rotary_chunk_tokens,
                      .dtype = request.kv_dtype};
  for (int rank = 0; rank < plan.mesh().size(); ++rank) {
    manifest.shards.push_back({.rank = rank,
                               .endpoint = group_.kv_endpoints.at(static_cast<size_t>(rank)),
                               .token_ranges = plan.TokenRanges(rank)});
  }
  auto message = std::make_shared<const v1::KvManifest>(ToProto(manifest, store_->lease().count()));
  std::lock_guard lock(mutex_);
  manifests_[request.transfer_id] = message;
  return message;
}

absl::StatusOr<std::shared_ptr<const v1::KvManifest>> PrefillServiceImpl::FindManifest(
    const std::string& transfer_id) const {
  LF_ASSIGN_OR_RETURN(const TransferStatus status, store_->GetStatus(transfer_id));
  if (status.state != TransferState::kOpen) return EndedStatus(transfer_id, status.state, status.reason);
  std::lock_guard lock(mutex_);
  const auto found = manifests_.find(transfer_id);
  if (found == manifests_.end()) return absl::NotFoundError("the transfer has no manifest yet");
  return found->second;
}

grpc::Status PrefillServiceImpl::GetModelInfo(grpc::ServerContext*, const v1::GetModelInfoRequest*,
                                              v1::ModelInfo* response) {
  const PrefillBackend* backend;
  GroupInfo group;
  {
    std::lock_guard lock(mutex_);
    if (backend_ == nullptr) return ToGrpc(refuse_);
    backend = backend_;
    group = group_;
  }
  const ServedModel& model = backend->model();
  response->set_architecture(model.architecture);
  response->set_model_fingerprint(model.model_fingerprint);
  response->set_num_layers(model.num_layers);
  response->set_num_q_heads(model.num_q_heads);
  response->set_num_kv_heads(model.num_kv_heads);
  response->set_head_dim(model.head_dim);
  response->set_vocab_size(model.vocab_size);
  response->set_max_position_embeddings(model.max_position_embeddings);
  response->set_weights_bytes(model.weights_bytes);
  response->set_ranks(model.mesh.size());
  response->mutable_mesh()->set_sequence(model.mesh.sequence);
  response->mutable_mesh()->set_head(model.mesh.head);
  response->set_default_attention(model.default_attention);
  response->set_max_tokens(model.max_position_embeddings);
  response->set_instance_epoch(group.instance_epoch);
  response->set_server_version(group.server_version);
  for (const std::string& endpoint : group.kv_endpoints) response->add_kv_endpoints(endpoint);
  return grpc::Status::OK;
}

}  // namespace longfill
