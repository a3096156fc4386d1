#include "kernels/sparse/index_view.h"

#include <cstring>

namespace longfill {
namespace {

template <typename T>
const T* At(const void* base, int64_t offset_bytes) {
  return reinterpret_cast<const T*>(static_cast<const char*>(base) + offset_bytes);
}

}  // namespace

PackedIndices::PackedIndices(std::span<const SparseIndex> indices) {
  const auto append = [this](const auto* values, size_t count) {  // gives the byte offset
    const int64_t offset = size_bytes();
    const size_t bytes = count * sizeof(*values);
    bytes_.resize(bytes_.size() + (bytes + sizeof(Unit) - 1) / sizeof(Unit));
    if (bytes > 0) std::memcpy(reinterpret_cast<char*>(bytes_.data()) + offset, values, bytes);
    return offset;
  };
  for (const SparseIndex& index : indices) {
    Place place;
    if (const auto* blocks = std::get_if<BlockListIndex>(&index)) {
      place.form = IndexView::Form::kBlockList;
      place.first = append(blocks->row_offsets.data(), blocks->row_offsets.size());
      place.second = append(blocks->key_blocks.data(), blocks->key_blocks.size());
    } else {
      const auto& diagonal = std::get<DiagonalColumnIndex>(index);
      place.coverage = diagonal.coverage;
      place.first = append(diagonal.columns.data(), diagonal.columns.size());
      place.second = append(diagonal.distances.data(), diagonal.distances.size());
      place.third = append(diagonal.runs.data(), diagonal.runs.size());
      IndexCounts counts;
      counts.columns = static_cast<int32_t>(diagonal.columns.size());
      counts.distances = static_cast<int32_t>(diagonal.distances.size());
      counts.runs = static_cast<int32_t>(diagonal.runs.size());
      place.counts = append(&counts, 1);
    }
    places_.push_back(place);
  }
}

std::vector<IndexView> PackedIndices::Views(const void* base) const {
  std::vector<IndexView> views;
  views.reserve(places_.size());
  for (const Place& place : places_) {
    IndexView view;
    view.form = place.form;
    view.coverage = place.coverage;
    if (place.form == IndexView::Form::kBlockList) {
      view.row_offsets = At<int64_t>(base, place.first);
      view.key_blocks = At<int32_t>(base, place.second);
    } else {
      view.columns = At<int32_t>(base, place.first);
      view.distances = At<int32_t>(base, place.second);
      view.runs = At<DistanceRun>(base, place.third);
      view.counts = At<IndexCounts>(base, place.counts);
    }
    views.push_back(view);
  }
  return views;
}

}  // namespace longfill
