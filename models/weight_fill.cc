#include "models/weight_fill.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <future>
#include <limits>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/memory.h"
#include "kernels/base/thread_pool.h"

namespace longfill {
namespace {

constexpr int64_t kSliceElements = int64_t{1} << 20;  // that one thread converts at a time
constexpr int64_t kBlockElements = 4096;              // widened on the stack
constexpr unsigned kMaxConvertThreads = 16;
constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

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

// Elements [begin, begin + count) of a slot and their place in the backend's memory.
struct Piece {
  const WeightSlot* slot = nullptr;
  int64_t begin = 0;
  int64_t count = 0;
  std::byte* to = nullptr;
  int64_t size_bytes() const { return count * DTypeBytes(slot->dtype); }
};

// What of the slots lies in the extents, in pieces of at most `most_bytes`.
std::vector<Piece> CutIntoPieces(const WeightLayout& layout, std::span<const WeightExtent> extents,
                                 int64_t most_bytes) {
  std::vector<Piece> pieces;
  for (const WeightExtent& extent : extents) {
    auto slot = std::ranges::upper_bound(layout.slots, extent.begin, {}, &WeightSlot::end_bytes);
    for (; slot != layout.slots.end() && slot->offset_bytes < extent.end; ++slot) {
      const int64_t end = std::min(extent.end, slot->end_bytes());
      for (int64_t at = std::max(extent.begin, slot->offset_bytes); at < end; at += most_bytes) {
        const int64_t element_bytes = DTypeBytes(slot->dtype);
        pieces.push_back({.slot = &*slot,
                          .begin = (at - slot->offset_bytes) / element_bytes,
                          .count = std::min(most_bytes, end - at) / element_bytes,
                          .to = extent.to + (at - extent.begin)});
      }
    }
  }
  return pieces;
}

absl::Status ConvertPiece(const ModelWeights& host, const Piece& piece, ThreadPool& pool, void* staging) {
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

absl::Status DrawPiece(const Piece& piece, uint64_t seed, float stddev, Backend& backend) {
  const WeightSlot& slot = *piece.slot;
  KernelSet& kernels = backend.kernels();
  if (IsNorm(slot.role)) {
    const std::vector<float> ones(static_cast<size_t>(piece.count), 1.0F);
    return kernels.CopyIn(piece.to, ones.data(), piece.size_bytes(), backend.stream());
  }
  if (slot.rule->is_bias) return kernels.Zero(piece.to, piece.size_bytes(), backend.stream());
  // Seeds below 2^40 give every matrix of every model a stream of its own.
  const auto matrix = static_cast<uint64_t>(slot.layer * kNumWeightRoles + static_cast<int>(slot.role));
  return kernels.FillRandom({.out = piece.to,
                             .dtype = slot.dtype,
                             .count = piece.count,
                             .stddev = stddev,
                             .seed = seed ^ matrix << 40,
                             .first = piece.begin},
                            backend.stream());
}

}  // namespace

absl::Status CopyWeights(const ModelWeights& host, const WeightLayout& layout,
                         std::span<const WeightExtent> extents, Backend& backend) {
  Buffer staging[2];
  for (Buffer& buffer : staging) {
    LF_ASSIGN_OR_RETURN(buffer,
                        backend.host_memory().Allocate(kWeightStagingBytes, "staging of the weights"));
  }
  ThreadPool pool(static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1U, kMaxConvertThreads)));
  const std::vector<Piece> pieces = CutIntoPieces(layout, extents, kWeightStagingBytes);
  // Piece i is converted by other threads while piece i - 1 is copied by this one.
  for (size_t i = 0; i <= pieces.size(); ++i) {
    std::future<absl::Status> conversion;
    if (i < pieces.size()) {
      conversion = std::async(std::launch::async, ConvertPiece, std::cref(host), std::cref(pieces[i]),
                              std::ref(pool), staging[i % 2].data());
    }
    absl::Status copied;
    if (i > 0) {
      const Piece& piece = pieces[i - 1];
      copied = backend.kernels().CopyIn(piece.to, staging[(i - 1) % 2].data(), piece.size_bytes(),
                                        backend.stream());
    }
    const absl::Status converted = conversion.valid() ? conversion.get() : absl::OkStatus();
    LF_RETURN_IF_ERROR(copied);
    LF_RETURN_IF_ERROR(converted);
  }
  return backend.stream().Sync();
}

absl::Status DrawWeights(const ModelConfig& config, uint64_t seed, const WeightLayout& layout,
                         std::span<const WeightExtent> extents, Backend& backend) {
  for (const Piece& piece : CutIntoPieces(layout, extents, layout.size_bytes)) {
    LF_RETURN_IF_ERROR(DrawPiece(piece, seed, static_cast<float>(config.initializer_range), backend));
  }
  return backend.stream().Sync();
}

void PointTo(const WeightSlot& slot, const ModelConfig& config, void* data, LinearWeights* linear,
             const float** norm) {
  if (IsNorm(slot.role)) {
    *norm = static_cast<const float*>(data);
  } else if (slot.rule->is_bias) {
    linear->bias = data;
  } else {
    const RoleShape shape = ShapeOf(slot.role, config);
    linear->weight = data;
    linear->dtype = slot.dtype;
    linear->out_width = shape.out_width;
    linear->in_width = shape.in_width;
  }
}

// What may write into ModelWeights.
struct WeightAllocator {
  static void SetPointers(const ModelConfig& config, const WeightLayout& layout, int64_t num_layers,
                          ModelWeights& weights) {
    weights.layers_.resize(static_cast<size_t>(num_layers));
    weights.owned_bytes_ = weights.device_.size_bytes();
    weights.num_parameters_ = layout.num_parameters;
    for (const WeightSlot& slot : layout.slots) {
      if (slot.end_bytes() > weights.device_.size_bytes()) break;
      std::byte* const data = weights.device_.as<std::byte>() + slot.offset_bytes;
      const bool is_norm = IsNorm(slot.role);
      PointTo(slot, config, data, is_norm ? nullptr : &weights.Linear(slot.role, slot.layer),
              is_norm ? &weights.Norm(slot.role, slot.layer) : nullptr);
    }
    if (config.tie_word_embeddings) weights.lm_head_ = weights.embedding_;
  }

  static absl::StatusOr<UnfilledWeights> Run(const ModelConfig& config, const WeightLayout& layout,
                                             int64_t num_layers, Backend& backend) {
    std::unique_ptr<ModelWeights> weights(new ModelWeights);
    const int64_t bytes = layout.layers_begin + num_layers * layout.layer_bytes;
    LF_ASSIGN_OR_RETURN(weights->device_, backend.memory().Allocate(bytes, "the weights of the model"));
    SetPointers(config, layout, num_layers, *weights);
    const WeightExtent extent = {0, bytes, weights->device_.as<std::byte>()};
    return UnfilledWeights{std::move(weights), extent};
  }
};

absl::StatusOr<UnfilledWeights> AllocateWeights(const ModelConfig& config, const WeightLayout& layout,
                                                int64_t num_layers, Backend& backend) {
  return WeightAllocator::Run(config, layout, num_layers, backend);
}

}  // namespace longfill
