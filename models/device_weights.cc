#include "models/device_weights.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <future>
#include <limits>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/thread_pool.h"
#include "models/family.h"
#include "models/json_input.h"
#include "models/weight_layout.h"

namespace longfill {
namespace {

constexpr int64_t kSliceElements = int64_t{1} << 20;  // that one thread converts at a time
constexpr int64_t kBlockElements = 4096;              // widened on the stack
constexpr unsigned kMaxConvertThreads = 16;
constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

absl::StatusOr<const Family*> FamilyOf(const ModelConfig& config) {
  const Family* family = FindFamilyByName(config.family);
  if (family != nullptr) return family;
  return absl::UnimplementedError(
      absl::StrCat("model family ", QuoteForMessage(config.family), " is not known"));
}

bool IsInfinite(uint16_t bits, DType dtype) {
  return (bits & 0x7FFF) == (dtype == DType::kBFloat16 ? 0x7F80 : 0x7C00);
}

float ElementAt(const void* data, DType dtype, int64_t index) {
  float value = 0;
  WidenToFloat(static_cast<const std::byte*>(data) + index * DTypeBytes(dtype), dtype, 1, &value);
  return value;
}

// Converts `count` elements. The place of the first one that is finite in `from` and not in `to`, or kNone.
int64_t Convert(const void* source, DType from, int64_t count, DType to, void* destination) {
  if (from == to) {
    std::memcpy(destination, source, static_cast<size_t>(count * DTypeBytes(to)));
    return kNone;
  }
  float wide[kBlockElements];
  for (int64_t begin = 0; begin < count; begin += kBlockElements) {
    const int64_t n = std::min(count - begin, kBlockElements);
    WidenToFloat(static_cast<const std::byte*>(source) + begin * DTypeBytes(from), from, n, wide);
    std::byte* out = static_cast<std::byte*>(destination) + begin * DTypeBytes(to);
    NarrowFromFloat(wide, n, to, out);
    if (to == DType::kFloat32) continue;
    const auto* bits = reinterpret_cast<const uint16_t*>(out);
    const auto lost = [&](int64_t i) { return IsInfinite(bits[i], to) && std::isfinite(wide[i]); };
    bool any = false;
    for (int64_t i = 0; i < n; ++i) any |= IsInfinite(bits[i], to);
    for (int64_t i = 0; any && i < n; ++i) {
      if (lost(i)) return begin + i;
    }
  }
  return kNone;
}

}  // namespace

// Fills a ModelWeights whose tensors lie in one allocation.
class DeviceWeights {
 public:
  static absl::StatusOr<DeviceWeights> Create(const ModelConfig& config, DType dtype, Backend& backend) {
    LF_ASSIGN_OR_RETURN(const Family* family, FamilyOf(config));
    DeviceWeights made(config, LayOutWeights(config, *family, dtype), backend);
    LF_ASSIGN_OR_RETURN(made.weights_->device_,
                        backend.memory().Allocate(made.layout_.size_bytes, "the weights of the model"));
    made.SetPointers();
    return made;
  }

  absl::Status CopyFrom(const ModelWeights& host);
  absl::Status FillRandom(uint64_t seed);
  std::unique_ptr<const ModelWeights> Take() && { return std::move(weights_); }

 private:
  // Elements [begin, begin + count) of a slot: what goes through a staging buffer at once.
  struct Piece {
    const WeightSlot* slot = nullptr;
    int64_t begin = 0;
    int64_t count = 0;
  };

  DeviceWeights(const ModelConfig& config, WeightLayout layout, Backend& backend)
      : config_(config), layout_(std::move(layout)), backend_(backend), weights_(new ModelWeights) {}

  void SetPointers();
  void* Place(const WeightSlot& slot) const { return weights_->device_.as<std::byte>() + slot.offset_bytes; }
  std::vector<Piece> Pieces() const;
  static absl::Status ConvertPiece(const ModelWeights& host, const Piece& piece, ThreadPool& pool,
                                   void* staging);
  absl::Status CopyPiece(const Piece& piece, const void* staging);

  const ModelConfig& config_;
  WeightLayout layout_;
  Backend& backend_;
  std::unique_ptr<ModelWeights> weights_;
};

void DeviceWeights::SetPointers() {
  weights_->layers_.resize(static_cast<size_t>(config_.num_layers));
  weights_->owned_bytes_ = layout_.size_bytes;
  weights_->num_parameters_ = layout_.num_parameters;
  for (const WeightSlot& slot : layout_.slots) {
    if (IsNorm(slot.role)) {
      weights_->Norm(slot.role, slot.layer) = static_cast<const float*>(Place(slot));
    } else if (slot.rule->is_bias) {
      weights_->Linear(slot.role, slot.layer).bias = Place(slot);
    } else {
      const RoleShape shape = ShapeOf(slot.role, config_);
      LinearWeights& linear = weights_->Linear(slot.role, slot.layer);
      linear.weight = Place(slot);
      linear.dtype = slot.dtype;
      linear.out_width = shape.out_width;
      linear.in_width = shape.in_width;
    }
  }
  if (config_.tie_word_embeddings) weights_->lm_head_ = weights_->embedding_;
}

std::vector<DeviceWeights::Piece> DeviceWeights::Pieces() const {
  std::vector<Piece> pieces;
  for (const WeightSlot& slot : layout_.slots) {
    const int64_t most = kWeightStagingBytes / DTypeBytes(slot.dtype);
    for (int64_t begin = 0; begin < slot.count; begin += most) {
      pieces.push_back({&slot, begin, std::min(most, slot.count - begin)});
    }
  }
  return pieces;
}

absl::Status DeviceWeights::ConvertPiece(const ModelWeights& host, const Piece& piece, ThreadPool& pool,
                                         void* staging) {
  const WeightSlot& slot = *piece.slot;
  const void* source = nullptr;
  DType from = DType::kFloat32;  // of norms and biases
  if (IsNorm(slot.role)) {
    source = host.Norm(slot.role, slot.layer);
  } else {
    const LinearWeights& linear = host.Linear(slot.role, slot.layer);
    source = slot.rule->is_bias ? linear.bias : linear.weight;
    if (!slot.rule->is_bias) from = linear.dtype;
  }
  const auto* first = static_cast<const std::byte*>(source) + piece.begin * DTypeBytes(from);
  auto* out = static_cast<std::byte*>(staging);
  const int64_t num_slices = (piece.count + kSliceElements - 1) / kSliceElements;
  std::vector<int64_t> lost(static_cast<size_t>(num_slices));
  pool.ParallelFor(num_slices, [&](int64_t slice, int) {
    const int64_t begin = slice * kSliceElements;
    const int64_t found =
        Convert(first + begin * DTypeBytes(from), from, std::min(kSliceElements, piece.count - begin),
                slot.dtype, out + begin * DTypeBytes(slot.dtype));
    lost[static_cast<size_t>(slice)] = found == kNone ? kNone : begin + found;
  });
  const int64_t place = *std::min_element(lost.begin(), lost.end());
  if (place == kNone) return absl::OkStatus();
  const int64_t element = piece.begin + place;
  return absl::InvalidArgumentError(absl::StrCat(
      "tensor '", slot.Name(), "' has the weight ", ElementAt(source, from, element), " (element ", element,
      " of ", slot.count, "), which is too large for ", std::string(DTypeName(slot.dtype)),
      slot.dtype == DType::kFloat16 ? " (at most 65504)" : ""));
}

absl::Status DeviceWeights::CopyPiece(const Piece& piece, const void* staging) {
  const int64_t element_bytes = DTypeBytes(piece.slot->dtype);
  auto* to = static_cast<std::byte*>(Place(*piece.slot)) + piece.begin * element_bytes;
  return backend_.kernels().CopyIn(to, staging, piece.count * element_bytes, backend_.stream());
}

absl::Status DeviceWeights::CopyFrom(const ModelWeights& host) {
  Buffer staging[2];
  for (Buffer& buffer : staging) {
    LF_ASSIGN_OR_RETURN(buffer,
                        backend_.host_memory().Allocate(kWeightStagingBytes, "staging of the weights"));
  }
  ThreadPool pool(static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1U, kMaxConvertThreads)));
  const std::vector<Piece> pieces = Pieces();
  // Piece i is converted by other threads while piece i - 1 is copied by this one.
  for (size_t i = 0; i <= pieces.size(); ++i) {
    std::future<absl::Status> conversion;
    if (i < pieces.size()) {
      conversion = std::async(std::launch::async, ConvertPiece, std::cref(host), std::cref(pieces[i]),
                              std::ref(pool), staging[i % 2].data());
    }
    const absl::Status copied =
        i == 0 ? absl::OkStatus() : CopyPiece(pieces[i - 1], staging[(i - 1) % 2].data());
    const absl::Status converted = conversion.valid() ? conversion.get() : absl::OkStatus();
    LF_RETURN_IF_ERROR(copied);
    LF_RETURN_IF_ERROR(converted);
  }
  return backend_.stream().Sync();
}

absl::Status DeviceWeights::FillRandom(uint64_t seed) {
  KernelSet& kernels = backend_.kernels();
  for (const WeightSlot& slot : layout_.slots) {
    if (IsNorm(slot.role)) {
      const std::vector<float> ones(static_cast<size_t>(slot.count), 1.0F);
      LF_RETURN_IF_ERROR(kernels.CopyIn(Place(slot), ones.data(), slot.size_bytes(), backend_.stream()));
    } else if (slot.rule->is_bias) {
      LF_RETURN_IF_ERROR(kernels.Zero(Place(slot), slot.size_bytes(), backend_.stream()));
    } else {
      // Seeds below 2^40 give every matrix of every model a stream of its own.
      const auto matrix = static_cast<uint64_t>(slot.layer * kNumWeightRoles + static_cast<int>(slot.role));
      LF_RETURN_IF_ERROR(kernels.FillRandom({.out = Place(slot),
                                             .dtype = slot.dtype,
                                             .count = slot.count,
                                             .stddev = static_cast<float>(config_.initializer_range),
                                             .seed = seed ^ matrix << 40},
                                            backend_.stream()));
    }
  }
  return backend_.stream().Sync();
}

int64_t DeviceWeightsBytes(const ModelConfig& config, DType dtype) {
  const absl::StatusOr<const Family*> family = FamilyOf(config);
  LF_CHECK(family.ok());
  return LayOutWeights(config, **family, dtype).size_bytes;
}

absl::StatusOr<std::unique_ptr<const ModelWeights>> UploadWeights(std::unique_ptr<const ModelWeights> host,
                                                                  const ModelConfig& config,
                                                                  Backend& backend) {
  if (backend.kernels().device() == DeviceKind::kCpu) return host;
  return ConvertWeights(*host, config, backend.kernels().compute_dtype(), backend);
}

absl::StatusOr<std::unique_ptr<const ModelWeights>> ConvertWeights(const ModelWeights& host,
                                                                   const ModelConfig& config, DType dtype,
                                                                   Backend& backend) {
  LF_ASSIGN_OR_RETURN(DeviceWeights made, DeviceWeights::Create(config, dtype, backend));
  LF_RETURN_IF_ERROR(made.CopyFrom(host));
  return std::move(made).Take();
}

absl::StatusOr<std::unique_ptr<const ModelWeights>> RandomWeights(const ModelConfig& config, Backend& backend,
                                                                  uint64_t seed) {
  LF_ASSIGN_OR_RETURN(DeviceWeights made,
                      DeviceWeights::Create(config, backend.kernels().compute_dtype(), backend));
  LF_RETURN_IF_ERROR(made.FillRandom(seed));
  return std::move(made).Take();
}

}  // namespace longfill
