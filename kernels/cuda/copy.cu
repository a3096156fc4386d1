#include "kernels/cuda/copy.h"

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_stream.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/upload.h"

namespace longfill {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 4;  // accesses in flight
constexpr int kUnitsOfBlock = kThreads * kPerThread;

// Pitches and width in units. A block takes some whole rows, or a part of one that is longer than
// kUnitsOfBlock.
struct Tiling {
  int64_t width = 0;
  uint32_t blocks_per_row = 1;
  int rows_of_block = 1;
};

template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    Copy2DKernel(Unit* to, int64_t to_pitch, const Unit* from, int64_t from_pitch, int64_t num_rows,
                 int64_t to_plane_pitch, int64_t from_plane_pitch, Tiling tiling) {
  const int64_t row_begin = int64_t{blockIdx.x / tiling.blocks_per_row} * tiling.rows_of_block;
  const int64_t column_begin = int64_t{blockIdx.x % tiling.blocks_per_row} * kUnitsOfBlock;
  const int rows = static_cast<int>(min(int64_t{tiling.rows_of_block}, num_rows - row_begin));
  const int width = static_cast<int>(min(int64_t{kUnitsOfBlock}, tiling.width - column_begin));
  to += blockIdx.y * to_plane_pitch + row_begin * to_pitch + column_begin;
  from += blockIdx.y * from_plane_pitch + row_begin * from_pitch + column_begin;
  Unit units[kPerThread];
#pragma unroll
  for (int p = 0; p < kPerThread; ++p) {
    const int i = p * kThreads + static_cast<int>(threadIdx.x);
    if (i < rows * width) units[p] = from[i / width * from_pitch + i % width];
  }
#pragma unroll
  for (int p = 0; p < kPerThread; ++p) {
    const int i = p * kThreads + static_cast<int>(threadIdx.x);
    if (i < rows * width) to[i / width * to_pitch + i % width] = units[p];
  }
}

template <typename Unit>
absl::Status RunCopy2D(const Copy2DParams& params, cudaStream_t stream) {
  constexpr int64_t kUnit = sizeof(Unit);
  Tiling tiling;
  tiling.width = params.row_bytes / kUnit;
  const int64_t blocks_per_row = CeilDiv(tiling.width, kUnitsOfBlock);
  tiling.blocks_per_row = static_cast<uint32_t>(blocks_per_row);
  if (tiling.width < kUnitsOfBlock) tiling.rows_of_block = static_cast<int>(kUnitsOfBlock / tiling.width);
  return Launch("Copy2DKernel", Copy2DKernel<Unit>,
                {.grid_x = CeilDiv(params.rows, tiling.rows_of_block) * blocks_per_row,
                 .grid_y = params.planes,
                 .block = kThreads},
                stream, static_cast<Unit*>(params.to), params.to_pitch / kUnit,
                static_cast<const Unit*>(params.from), params.from_pitch / kUnit, params.rows,
                params.to_plane_pitch / kUnit, params.from_plane_pitch / kUnit, tiling);
}

bool IsPageLocked(const void* host) {
  cudaPointerAttributes attributes = {};
  const cudaError_t error = cudaPointerGetAttributes(&attributes, host);
  return CudaStatus(error, "cudaPointerGetAttributes").ok() && attributes.type == cudaMemoryTypeHost;
}

}  // namespace
}  // namespace cuda

absl::Status CudaCopyIn(void* to, const void* host, int64_t bytes, Stream& stream) {
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("copy in", "bytes", bytes, 0));
  if (bytes == 0) return absl::OkStatus();
  LF_ASSIGN_OR_RETURN(const cudaStream_t cuda_stream, CudaStreamOf(stream));
  if (bytes <= kInlineCopyBytes && reinterpret_cast<uintptr_t>(to) % 4 == 0) {
    return Upload(to, host, bytes, cuda_stream);
  }
  LF_RETURN_IF_CUDA_ERROR(
      cudaMemcpyAsync(to, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, cuda_stream));
  // From pageable memory the driver has copied into buffers of its own by the time it returns.
  return cuda::IsPageLocked(host) ? stream.Sync() : absl::OkStatus();
}

absl::Status CudaCopyOut(void* host, const void* from, int64_t bytes, cudaStream_t stream) {
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("copy out", "bytes", bytes, 0));
  if (bytes == 0) return absl::OkStatus();
  return CudaStatus(cudaMemcpyAsync(host, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, stream),
                    "cudaMemcpyAsync");
}

absl::Status CudaCopy2D(const Copy2DParams& params, cudaStream_t stream) {
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("copy 2D", "rows", params.rows, 0));
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("copy 2D", "row_bytes", params.row_bytes, 0));
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("copy 2D", "planes", params.planes, 0));
  if (params.rows == 0 || params.row_bytes == 0 || params.planes == 0) return absl::OkStatus();
  Copy2DParams pieces = params;
  if (params.rows > 1) {
    LF_RETURN_IF_ERROR(cuda::CheckAtLeast("copy 2D", "to_pitch", params.to_pitch, params.row_bytes));
    LF_RETURN_IF_ERROR(cuda::CheckAtLeast("copy 2D", "from_pitch", params.from_pitch, 0));
    if (params.to_pitch == params.row_bytes && params.from_pitch == params.row_bytes) {
      pieces.row_bytes = params.rows * params.row_bytes;
      pieces.rows = 1;
    }
  } else {
    pieces.to_pitch = pieces.from_pitch = 0;
  }
  if (params.planes == 1) pieces.to_plane_pitch = pieces.from_plane_pitch = 0;
  if (cuda::AlignedTo16(pieces.to, pieces.from, pieces.to_pitch, pieces.from_pitch, pieces.row_bytes,
                        pieces.to_plane_pitch, pieces.from_plane_pitch)) {
    return cuda::RunCopy2D<uint4>(pieces, stream);
  }
  return cuda::RunCopy2D<uint8_t>(pieces, stream);
}

absl::Status CudaZero(void* data, int64_t bytes, cudaStream_t stream) {
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("zero", "bytes", bytes, 0));
  if (bytes == 0) return absl::OkStatus();
  return CudaStatus(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream), "cudaMemsetAsync");
}

}  // namespace longfill
