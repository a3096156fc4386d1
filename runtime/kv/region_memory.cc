#include "runtime/kv/region_memory.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace longfill {

RegionMemoryResource::RegionMemoryResource(Buffer region) : region_(std::move(region)) {
  if (region_.size_bytes() > 0) gaps_.emplace(0, region_.size_bytes());
}

void* RegionMemoryResource::DoAllocate(int64_t size_bytes) {
  const int64_t bytes = PartBytes(size_bytes);
  const std::lock_guard lock(mutex_);
  const auto gap = std::ranges::find_if(gaps_, [&](const auto& entry) { return entry.second >= bytes; });
  if (gap == gaps_.end()) return nullptr;
  const auto [offset, gap_bytes] = *gap;
  gaps_.erase(gap);
  if (gap_bytes > bytes) gaps_.emplace(offset + bytes, gap_bytes - bytes);
  return region_.as<char>() + offset;
}

void RegionMemoryResource::DoDeallocate(void* data, int64_t size_bytes) {
  int64_t offset = static_cast<char*>(data) - region_.as<char>();
  int64_t bytes = PartBytes(size_bytes);
  const std::lock_guard lock(mutex_);
  auto next = gaps_.lower_bound(offset);
  if (next != gaps_.end() && next->first == offset + bytes) {
    bytes += next->second;
    next = gaps_.erase(next);
  }
  if (next != gaps_.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == offset) {
      offset = previous->first;
      bytes += previous->second;
      gaps_.erase(previous);
    }
  }
  gaps_.emplace(offset, bytes);
}

}  // namespace longfill
