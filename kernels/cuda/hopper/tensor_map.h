#ifndef LONGFILL_KERNELS_CUDA_HOPPER_TENSOR_MAP_H_
#define LONGFILL_KERNELS_CUDA_HOPPER_TENSOR_MAP_H_

// What the copy engine must know of a head-major array: host code.

#include <cuda.h>

#include <cstdint>
#include <string_view>

#include "kernels/base/dtype.h"
#include "kernels/base/status.h"

namespace longfill::cuda::hopper {

// Rows of 16-bit elements, and the box of them that one copy brings to shared memory. Strides in elements;
// rows and heads start at multiples of 16 bytes.
struct HeadsBox {
  int64_t head_dim = 0;
  int64_t num_rows = 0;  // of each head; what a box has beyond them arrives as zeros
  int64_t num_heads = 0;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
  int box_dims = 0;       // of a row
  int box_rows = 0;       // at most 256
  int swizzle_bytes = 0;  // 32, 64 or 128, the bytes of box_dims
};

// A map with the coordinates (dim, row, head). `name` is for errors.
absl::Status EncodeTensorMap(std::string_view name, const void* data, DType dtype, const HeadsBox& box,
                             CUtensorMap* map);

// A map with the coordinates (dim of a block, row, block, head), blocks being of box_dims dims, which divide
// head_dim. A box has all blocks of its rows, one behind the other.
absl::Status EncodeWholeRowsMap(std::string_view name, const void* data, DType dtype, const HeadsBox& box,
                                CUtensorMap* map);

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_TENSOR_MAP_H_
