#include "runtime/client/convert.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace longfill {

grpc::Status ToGrpc(const absl::Status& status) {
  return {static_cast<grpc::StatusCode>(status.code()), std::string(status.message())};
}

absl::Status FromGrpc(const grpc::Status& status) {
  return {static_cast<absl::StatusCode>(status.error_code()), status.error_message()};
}

v1::DataType ToProto(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return v1::DATA_TYPE_FLOAT32;
    case DType::kBFloat16:
      return v1::DATA_TYPE_BFLOAT16;
    case DType::kFloat16:
      return v1::DATA_TYPE_FLOAT16;
    case DType::kInt32:
    case DType::kInt64:
      break;
  }
  return v1::DATA_TYPE_UNSPECIFIED;
}

absl::StatusOr<DType> FromProto(v1::DataType dtype) {
  switch (dtype) {
    case v1::DATA_TYPE_UNSPECIFIED:
    case v1::DATA_TYPE_FLOAT32:
      return DType::kFloat32;
    case v1::DATA_TYPE_BFLOAT16:
      return DType::kBFloat16;
    case v1::DATA_TYPE_FLOAT16:
      return DType::kFloat16;
    default:
      return absl::InvalidArgumentError(absl::StrCat("KV dtype ", static_cast<int>(dtype), " is not known"));
  }
}

v1::Coverage ToProto(Coverage coverage) {
  return coverage == Coverage::kParity ? v1::COVERAGE_PARITY : v1::COVERAGE_TILES;
}

absl::StatusOr<Coverage> FromProto(v1::Coverage coverage) {
  switch (coverage) {
    case v1::COVERAGE_UNSPECIFIED:
    case v1::COVERAGE_TILES:
      return Coverage::kTiles;
    case v1::COVERAGE_PARITY:
      return Coverage::kParity;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("coverage ", static_cast<int>(coverage), " is not known"));
  }
}

absl::StatusOr<KvLayout> FromProto(v1::KvLayout layout) {
  switch (layout) {
    case v1::KV_LAYOUT_UNSPECIFIED:
    case v1::KV_LAYOUT_HND:
      return KvLayout::kHeadsTokens;
    case v1::KV_LAYOUT_NHD:
      return KvLayout::kTokensHeads;
    default:
      return absl::InvalidArgumentError(absl::StrCat("layout ", static_cast<int>(layout), " is not known"));
  }
}

v1::TransferState ToProto(TransferState state) {
  switch (state) {
    case TransferState::kOpen:
      return v1::TRANSFER_STATE_OPEN;
    case TransferState::kComplete:
      return v1::TRANSFER_STATE_COMPLETE;
    case TransferState::kAborted:
      return v1::TRANSFER_STATE_ABORTED;
    case TransferState::kFailed:
      return v1::TRANSFER_STATE_FAILED;
    case TransferState::kExpired:
      return v1::TRANSFER_STATE_EXPIRED;
  }
  return v1::TRANSFER_STATE_UNSPECIFIED;
}

v1::KvManifest ToProto(const KvManifest& manifest, int64_t lease_ms) {
  v1::KvManifest message;
  message.set_version(KvManifest::kVersion);
  message.set_request_id(manifest.request_id);
  message.set_transfer_id(manifest.transfer_id);
  message.set_instance_epoch(manifest.instance_epoch);
  message.set_architecture(manifest.architecture);
  message.set_model_fingerprint(manifest.model_fingerprint);
  for (const std::string& hash : manifest.token_hashes)
    message.add_token_hashes(absl::HexStringToBytes(hash));
  message.set_page_tokens(manifest.page_tokens);
  message.set_num_tokens(manifest.num_tokens);
  message.set_num_layers(manifest.num_layers);
  message.set_num_kv_heads(manifest.num_kv_heads);
  message.set_head_dim(manifest.head_dim);
  message.set_rotary_chunk_tokens(manifest.rotary_chunk_tokens);
  message.set_dtype(ToProto(manifest.dtype));
  for (const KvShard& shard : manifest.shards) {
    v1::KvShard* to = message.add_shards();
    to->set_rank(shard.rank);
    to->set_endpoint(shard.endpoint);
    for (const TokenRange& range : shard.token_ranges) {
      v1::TokenRange* to_range = to->add_token_ranges();
      to_range->set_begin(range.begin);
      to_range->set_end(range.end);
    }
  }
  message.set_lease_ms(lease_ms);
  return message;
}

namespace {

absl::Status CheckManifest(const KvManifest& manifest) {
  const auto bad = [](std::string_view what) {
    return absl::DataLossError(absl::StrCat("the KV manifest contradicts itself: ", std::string(what)));
  };
  if (manifest.num_tokens < 1 || manifest.num_layers < 1 || manifest.num_kv_heads < 1 ||
      manifest.head_dim < 1) {
    return bad("a size below 1");
  }
  std::vector<TokenRange> all;
  for (const KvShard& shard : manifest.shards) {
    int64_t previous = 0;
    for (const TokenRange& range : shard.token_ranges) {
      if (range.begin < previous || range.end <= range.begin) {
        return bad(absl::StrCat("token ranges of rank ", shard.rank, " are out of order"));
      }
      previous = range.end;
      all.push_back(range);
    }
  }
  std::sort(all.begin(), all.end(),
            [](const TokenRange& a, const TokenRange& b) { return a.begin < b.begin; });
  int64_t next = 0;
  for (const TokenRange& range : all) {
    if (range.begin != next) return bad(absl::StrCat("token ", next, " is owned by no rank, or by several"));
    next = range.end;
  }
  if (next != manifest.num_tokens) {
    return bad(absl::StrCat("the ranks own ", next, " tokens of ", manifest.num_tokens));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<KvManifest> FromProto(const v1::KvManifest& message) {
  if (message.version() != KvManifest::kVersion) {
    return absl::FailedPreconditionError(absl::StrCat("KV manifest of version ", message.version(),
                                                      ", this program reads version ", KvManifest::kVersion));
  }
  KvManifest manifest;
  manifest.request_id = message.request_id();
  manifest.transfer_id = message.transfer_id();
  manifest.instance_epoch = message.instance_epoch();
  manifest.architecture = message.architecture();
  manifest.model_fingerprint = message.model_fingerprint();
  for (const std::string& hash : message.token_hashes())
    manifest.token_hashes.push_back(absl::BytesToHexString(hash));
  manifest.page_tokens = message.page_tokens();
  manifest.num_tokens = message.num_tokens();
  manifest.num_layers = message.num_layers();
  manifest.num_kv_heads = message.num_kv_heads();
  manifest.head_dim = message.head_dim();
  manifest.rotary_chunk_tokens = message.rotary_chunk_tokens();
  LF_ASSIGN_OR_RETURN(manifest.dtype, FromProto(message.dtype()));
  for (const v1::KvShard& from : message.shards()) {
    KvShard shard{.rank = from.rank(), .endpoint = from.endpoint()};
    for (const v1::TokenRange& range : from.token_ranges())
      shard.token_ranges.push_back({range.begin(), range.end()});
    manifest.shards.push_back(std::move(shard));
  }
  LF_RETURN_IF_ERROR(CheckManifest(manifest));
  return manifest;
}

v1::RecallOptions ToProto(const RecallOptions& options) {
  v1::RecallOptions message;
  message.set_monitor(options.monitor);
  message.set_min_recall(options.min_recall);
  return message;
}

absl::StatusOr<RecallOptions> FromProto(const v1::RecallOptions& message) {
  const RecallOptions options = {message.monitor(), message.min_recall()};
  LF_RETURN_IF_ERROR(Annotate(Validate(options), "recall"));
  return options;
}

namespace {

v1::RecallFigures ToProto(const RecallFigures& figures) {
  v1::RecallFigures message;
  message.set_rows(figures.rows);
  message.set_min_recall(figures.min_recall);
  message.set_mean(figures.mean);
  message.set_min(figures.min);
  message.set_min_layer(figures.min_layer);
  message.set_min_head(figures.min_head);
  message.set_recomputed(figures.recomputed);
  message.set_seconds(figures.seconds);
  message.set_pair_share(figures.pair_share);
  for (const LayerRecall& layer : figures.layers) {
    v1::LayerRecall* to = message.add_layers();
    to->set_watched(layer.watched);
    for (const double recall : layer.heads) to->add_heads(recall);
    for (const RecomputedHead& head : layer.recomputed) {
      v1::RecomputedHead* to_head = to->add_recomputed();
      to_head->set_head(head.head);
      to_head->set_pattern(ToString(head.pattern));
      to_head->set_recall_before(head.recall_before);
      to_head->set_recall(head.recall);
      to_head->set_density(head.density);
    }
  }
  return message;
}

RecallFigures FromProto(const v1::RecallFigures& message) {
  RecallFigures figures = {.rows = message.rows(),
                           .min_recall = message.min_recall(),
                           .mean = message.mean(),
                           .min = message.min(),
                           .min_layer = message.min_layer(),
                           .min_head = message.min_head(),
                           .recomputed = message.recomputed(),
                           .seconds = message.seconds(),
                           .pair_share = message.pair_share()};
  for (const v1::LayerRecall& layer : message.layers()) {
    LayerRecall& to = figures.layers.emplace_back();
    to.watched = layer.watched();
    to.heads.assign(layer.heads().begin(), layer.heads().end());
    for (const v1::RecomputedHead& head : layer.recomputed()) {
      // A service of another version may have a pattern that this client has no name for.
      to.recomputed.push_back({.head = head.head(),
                               .pattern = ParseHeadPattern(head.pattern()).value_or(HeadPattern()),
                               .recall_before = head.recall_before(),
                               .recall = head.recall(),
                               .density = head.density()});
    }
  }
  return figures;
}

}  // namespace

v1::PrefillFigures ToProto(const PrefillFigures& figures) {
  v1::PrefillFigures message;
  message.set_tokens(figures.tokens);
  message.set_ranks(figures.ranks);
  message.mutable_mesh()->set_sequence(figures.mesh.sequence);
  message.mutable_mesh()->set_head(figures.mesh.head);
  message.set_attention(figures.attention);
  message.set_seconds(figures.seconds);
  message.set_index_seconds(figures.index_seconds);
  message.set_attention_seconds(figures.attention_seconds);
  message.set_linear_seconds(figures.linear_seconds);
  message.set_communication_seconds(figures.communication_seconds);
  message.set_exposed_communication_seconds(figures.exposed_communication_seconds);
  message.set_published_pairs(figures.published_pairs);
  message.set_covered_pairs(figures.covered_pairs);
  message.set_computed_pairs(figures.computed_pairs);
  message.set_density(figures.density);
  for (int64_t pairs : figures.rank_covered_pairs) message.add_rank_covered_pairs(pairs);
  message.set_imbalance(figures.imbalance);
  message.set_kv_bytes(figures.kv_bytes);
  message.set_peak_memory_bytes(figures.peak_memory_bytes);
  message.set_gemm_seconds(figures.gemm_seconds);
  message.set_other_seconds(figures.other_seconds);
  message.set_exposed_copy_seconds(figures.exposed_copy_seconds);
  message.set_peak_device_bytes(figures.peak_device_bytes);
  message.set_planned_device_bytes(figures.planned_device_bytes);
  message.set_outside_device_bytes(figures.outside_device_bytes);
  message.set_device(figures.device);
  message.set_communicator(figures.communicator);
  message.set_compute_dtype(std::string(DTypeName(figures.compute_dtype)));
  if (figures.recall.rows > 0) *message.mutable_recall() = ToProto(figures.recall);
  return message;
}

PrefillFigures FromProto(const v1::PrefillFigures& message) {
  PrefillFigures figures;
  figures.tokens = message.tokens();
  figures.ranks = message.ranks();
  figures.mesh = {message.mesh().sequence(), message.mesh().head()};
  figures.attention = message.attention();
  figures.seconds = message.seconds();
  figures.index_seconds = message.index_seconds();
  figures.attention_seconds = message.attention_seconds();
  figures.linear_seconds = message.linear_seconds();
  figures.communication_seconds = message.communication_seconds();
  figures.exposed_communication_seconds = message.exposed_communication_seconds();
  figures.published_pairs = message.published_pairs();
  figures.covered_pairs = message.covered_pairs();
  figures.computed_pairs = message.computed_pairs();
  figures.density = message.density();
  figures.rank_covered_pairs.assign(message.rank_covered_pairs().begin(), message.rank_covered_pairs().end());
  figures.imbalance = message.imbalance();
  figures.kv_bytes = message.kv_bytes();
  figures.peak_memory_bytes = message.peak_memory_bytes();
  figures.gemm_seconds = message.gemm_seconds();
  figures.other_seconds = message.other_seconds();
  figures.exposed_copy_seconds = message.exposed_copy_seconds();
  figures.peak_device_bytes = message.peak_device_bytes();
  figures.planned_device_bytes = message.planned_device_bytes();
  figures.outside_device_bytes = message.outside_device_bytes();
  figures.device = message.device();
  figures.communicator = message.communicator();
  // A service of another version may not say it, or compute in a type that this client has no name for.
  figures.compute_dtype = ParseDType(message.compute_dtype()).value_or(DType::kFloat32);
  if (message.has_recall()) figures.recall = FromProto(message.recall());
  return figures;
}

v1::MemoryPlan ToProto(const MemoryPlan& plan) {
  v1::MemoryPlan message;
  message.set_weights_bytes(plan.weights_bytes);
  message.set_activation_bytes(plan.activation_bytes);
  message.set_attention_bytes(plan.attention_bytes);
  message.set_index_bytes(plan.index_bytes);
  message.set_logits_bytes(plan.logits_bytes);
  message.set_kv_budget_bytes(plan.kv_budget_bytes);
  message.set_kv_store_bytes(plan.kv_store_bytes);
  message.set_total_bytes(plan.TotalBytes());
  message.set_outside_bytes(plan.outside_bytes);
  message.set_staging_bytes(plan.staging_bytes);
  message.set_kv_ring_bytes(plan.kv_ring_bytes);
  message.set_device_bytes(plan.DeviceBytes());
  message.set_host_bytes(plan.HostBytes());
  return message;
}

MemoryPlan FromProto(const v1::MemoryPlan& message) {
  return {.weights_bytes = message.weights_bytes(),
          .activation_bytes = message.activation_bytes(),
          .index_bytes = message.index_bytes(),
          .attention_bytes = message.attention_bytes(),
          .kv_budget_bytes = message.kv_budget_bytes(),
          .outside_bytes = message.outside_bytes(),
          .logits_bytes = message.logits_bytes(),
          .staging_bytes = message.staging_bytes(),
          .kv_ring_bytes = message.kv_ring_bytes(),
          .kv_store_bytes = message.kv_store_bytes()};
}

v1::Progress ToProto(const PrefillProgress& progress) {
  v1::Progress message;
  message.set_total_tokens(progress.total_tokens);
  message.set_processed_tokens(progress.processed_tokens);
  message.set_layers_done(progress.layers_done);
  message.set_num_layers(progress.num_layers);
  message.set_seconds(progress.seconds);
  return message;
}

PrefillProgress FromProto(const v1::Progress& message) {
  return {.total_tokens = message.total_tokens(),
          .processed_tokens = message.processed_tokens(),
          .layers_done = message.layers_done(),
          .num_layers = message.num_layers(),
          .seconds = message.seconds()};
}

}  // namespace longfill
