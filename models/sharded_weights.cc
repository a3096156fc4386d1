#include "models/sharded_weights.h"

#include <algorithm>
#include <span>
#include <utility>

namespace longfill {
namespace {

int64_t RoundUp(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

int64_t NumPlaces(int64_t num_layers) { return std::min<int64_t>(num_layers, 2); }

}  // namespace

WeightDTypes DTypesOfShards(const ModelWeights* host, const ModelConfig& config, const KernelSet& kernels) {
  const DType compute = kernels.compute_dtype();
  if (host == nullptr || kernels.device() != DeviceKind::kCpu) return {compute, compute};
  const DType stored = host->embedding().dtype;
  const absl::StatusOr<const Family*> family = FamilyOf(config);
  LF_CHECK(family.ok());
  for (const WeightSlot& slot : LayOutWeights(config, **family, {}).slots) {
    if (!IsNorm(slot.role) && host->Linear(slot.role, slot.layer).dtype != stored) return {compute, compute};
  }
  return {stored, compute};
}

int64_t ShardedWeights::ShardBytes(const WeightLayout& layout, int num_ranks) {
  return RoundUp((layout.layer_bytes + num_ranks - 1) / num_ranks, kWeightAlignment);
}

int64_t ShardedWeights::PlanBytes(const ModelConfig& config, const WeightDTypes& dtypes, int num_ranks) {
  const absl::StatusOr<const Family*> family = FamilyOf(config);
  LF_CHECK(family.ok());
  const WeightLayout layout = LayOutWeights(config, **family, dtypes);
  const int64_t shard = ShardBytes(layout, num_ranks);
  return layout.layers_begin + config.num_layers * shard + NumPlaces(config.num_layers) * num_ranks * shard;
}

ShardedWeights::ShardedWeights(WeightLayout layout, Backend& backend, int rank, int num_ranks)
    : layout_(std::move(layout)),
      backend_(backend),
      rank_(rank),
      num_ranks_(num_ranks),
      num_layers_((layout_.size_bytes - layout_.layers_begin) / layout_.layer_bytes),
      shard_bytes_(ShardBytes(layout_, num_ranks)),
      communication_timer_(backend),
      exposed_timer_(backend) {}

ShardedWeights::~ShardedWeights() {
  // Memory goes back in the order of the main stream.
  if (exchange_ != nullptr) (void)exchange_->Sync();
}

absl::StatusOr<std::unique_ptr<ShardedWeights>> ShardedWeights::Create(const ModelConfig& config,
                                                                       const WeightDTypes& dtypes,
                                                                       Backend& backend, int rank,
                                                                       int num_ranks) {
  LF_ASSIGN_OR_RETURN(const Family* family, FamilyOf(config));
  std::unique_ptr<ShardedWeights> made(
      new ShardedWeights(LayOutWeights(config, *family, dtypes), backend, rank, num_ranks));
  LF_RETURN_IF_ERROR(made->Allocate(config));
  return made;
}

absl::Status ShardedWeights::Allocate(const ModelConfig& config) {
  LF_ASSIGN_OR_RETURN(UnfilledWeights resident, AllocateWeights(config, layout_, 0, backend_));
  resident_ = std::move(resident.weights);
  resident_extent_ = resident.extent;
  MemoryResource& memory = backend_.memory();
  LF_ASSIGN_OR_RETURN(shards_,
                      memory.Allocate(num_layers_ * shard_bytes_, "this rank's share of the layers"));
  for (Place& place : std::span(places_).first(static_cast<size_t>(NumPlaces(num_layers_)))) {
    LF_ASSIGN_OR_RETURN(place.memory, memory.Allocate(num_ranks_ * shard_bytes_, "weights of one layer"));
    for (const WeightSlot& slot : layout_.slots) {
      if (slot.offset_bytes < layout_.layers_begin || slot.layer > 0) continue;
      PointTo(slot, config, place.memory.as<std::byte>() + (slot.offset_bytes - layout_.layers_begin),
              place.weights.Linear(slot.role), place.weights.Norm(slot.role));
    }
    LF_ASSIGN_OR_RETURN(place.gathered, backend_.NewEvent());
  }
  LF_ASSIGN_OR_RETURN(exchange_, backend_.NewStream());
  LF_ASSIGN_OR_RETURN(computed_, backend_.NewEvent());
  return absl::OkStatus();
}

// What this rank keeps of the layout. The last ranks may have less than the others, or nothing.
std::vector<WeightExtent> ShardedWeights::OwnExtents() const {
  std::vector<WeightExtent> extents = {resident_extent_};
  for (int64_t layer = 0; layer < num_layers_; ++layer) {
    const int64_t begin = std::min(rank_ * shard_bytes_, layout_.layer_bytes);
    const int64_t end = std::min(begin + shard_bytes_, layout_.layer_bytes);
    const int64_t first = layout_.layers_begin + layer * layout_.layer_bytes;
    extents.push_back({first + begin, first + end, Shard(layer)});
  }
  return extents;
}

absl::StatusOr<std::unique_ptr<ShardedWeights>> ShardedWeights::Convert(const ModelWeights& host,
                                                                        const ModelConfig& config,
                                                                        Backend& backend, int rank,
                                                                        int num_ranks) {
  const WeightDTypes dtypes = DTypesOfShards(&host, config, backend.kernels());
  LF_ASSIGN_OR_RETURN(std::unique_ptr<ShardedWeights> made, Create(config, dtypes, backend, rank, num_ranks));
  LF_RETURN_IF_ERROR(CopyWeights(host, made->layout_, made->OwnExtents(), backend));
  return made;
}

absl::StatusOr<std::unique_ptr<ShardedWeights>> ShardedWeights::Random(const ModelConfig& config,
                                                                       uint64_t seed, Backend& backend,
                                                                       int rank, int num_ranks) {
  const WeightDTypes dtypes = DTypesOfShards(nullptr, config, backend.kernels());
  LF_ASSIGN_OR_RETURN(std::unique_ptr<ShardedWeights> made, Create(config, dtypes, backend, rank, num_ranks));
  LF_RETURN_IF_ERROR(DrawWeights(config, seed, made->layout_, made->OwnExtents(), backend));
  return made;
}

absl::Status ShardedWeights::Connect(Communicator& world) {
  LF_CHECK(world.rank() == rank_ && world.size() == num_ranks_);
  LF_ASSIGN_OR_RETURN(group_, world.Split(0, rank_));
  return absl::OkStatus();
}

int64_t ShardedWeights::bytes() const {
  int64_t bytes = resident_->bytes() + shards_.size_bytes();
  for (const Place& place : places_) bytes += place.memory.size_bytes();
  return bytes;
}

absl::StatusOr<const LayerWeights*> ShardedWeights::Gather(int64_t layer) {
  if (absl::Status status = EnqueueGather(layer); !status.ok()) {
    group_->Abort(status);  // peers are in the exchange, or come to it
    return status;
  }
  return &places_[static_cast<size_t>(layer % 2)].weights;
}

// Everything that the main stream has been given so far is done with the place of the layer before, and with
// both of them where a prompt has ended early; what it is given next needs this layer's alone. Exchanges
// that block the caller (on the CPU, or through the host) are exposed, also the one of the next layer.
absl::Status ShardedWeights::EnqueueGather(int64_t layer) {
  Stream& main = backend_.stream();
  LF_RETURN_IF_ERROR(computed_->Record(main));
  LF_RETURN_IF_ERROR(exchange_->WaitFor(*computed_));
  LF_RETURN_IF_ERROR(exposed_timer_.Begin(main));
  LF_RETURN_IF_ERROR(GatherIntoPlace(layer));
  LF_RETURN_IF_ERROR(main.WaitFor(*places_[static_cast<size_t>(layer % 2)].gathered));
  if (layer + 1 < num_layers_) LF_RETURN_IF_ERROR(GatherIntoPlace(layer + 1));
  return exposed_timer_.End(main);
}

// Unless it is there.
absl::Status ShardedWeights::GatherIntoPlace(int64_t layer) {
  Place& place = places_[static_cast<size_t>(layer % 2)];
  if (place.layer == layer) return absl::OkStatus();
  place.layer = kNoLayer;
  const std::vector<int64_t> counts(static_cast<size_t>(num_ranks_), shard_bytes_);
  LF_RETURN_IF_ERROR(communication_timer_.Begin(*exchange_));
  LF_RETURN_IF_ERROR(group_->AllGather(Shard(layer), place.memory.data(), counts, *exchange_));
  LF_RETURN_IF_ERROR(communication_timer_.End(*exchange_));
  LF_RETURN_IF_ERROR(place.gathered->Record(*exchange_));
  place.layer = layer;
  return absl::OkStatus();
}

void ShardedWeights::ResetSeconds() {
  communication_timer_.Reset();
  exposed_timer_.Reset();
}

absl::StatusOr<ShardedWeights::Seconds> ShardedWeights::TakenSeconds() const {
  Seconds seconds;
  LF_ASSIGN_OR_RETURN(seconds.communication, communication_timer_.Seconds());
  LF_ASSIGN_OR_RETURN(seconds.exposed, exposed_timer_.Seconds());
  return seconds;
}

}  // namespace longfill
