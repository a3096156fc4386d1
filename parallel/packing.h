#ifndef LONGFILL_PARALLEL_PACKING_H_
#define LONGFILL_PARALLEL_PACKING_H_

// How rows get into and out of the buffers of an exchange, on the device.

#include <cstdint>
#include <functional>
#include <span>

#include "kernels/api/kernel_set.h"
#include "parallel/mesh.h"

namespace longfill {

using CopyFunction = std::function<absl::Status(const Copy2DParams&)>;

// Copies that differ only in where they start, such as those of heads: how many, and bytes from one to the
// next.
struct CopyPlanes {
  int64_t count = 1;
  int64_t to_pitch = 0;
  int64_t from_pitch = 0;
};

// `bytes` in blocks of block_bytes, the last of which may be shorter; blocks start to_pitch and from_pitch
// bytes apart.
absl::Status CopyBlocks(const CopyFunction& copy, void* to, int64_t to_pitch, const void* from,
                        int64_t from_pitch, int64_t block_bytes, int64_t bytes,
                        const CopyPlanes& planes = {});
// With KernelSet::Copy2D.
absl::Status CopyBlocks(KernelSet& kernels, void* to, int64_t to_pitch, const void* from, int64_t from_pitch,
                        int64_t block_bytes, int64_t bytes, Stream& stream);

// Rows of row_bytes, bytes in all, one behind the other at `from`, to `to` + row_bytes *
// places.Position(row).
absl::Status CopyToPlaces(const CopyFunction& copy, void* to, const PositionMap& places, const void* from,
                          int64_t row_bytes, int64_t bytes, const CopyPlanes& planes = {});
// With KernelSet::Copy2D.
absl::Status CopyToPlaces(KernelSet& kernels, void* to, const PositionMap& places, const void* from,
                          int64_t row_bytes, int64_t bytes, Stream& stream, const CopyPlanes& planes = {});

// Rows [begin, end) of some heads of `from`, of `width` elements of the compute dtype, to
// [heads.size(), end - begin, width] at `to`. Returns the byte behind them.
absl::StatusOr<char*> PackHeads(KernelSet& kernels, HeadsView<const void> from,
                                std::span<const int32_t> heads, const TokenRange& rows, int64_t width,
                                char* to, Stream& stream);

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_PACKING_H_
