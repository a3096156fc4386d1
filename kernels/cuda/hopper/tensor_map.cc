#include "kernels/cuda/hopper/tensor_map.h"

#include <cuda_runtime_api.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/cuda_status.h"

namespace longfill::cuda::hopper {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver that is there: nothing is linked with it.
absl::StatusOr<Encode> FindEncode() {
  constexpr unsigned kSince = 12000;  // CUDA version
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  LF_RETURN_IF_CUDA_ERROR(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kSince,
                                                           cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess || function == nullptr) {
    return absl::UnavailableError("the CUDA driver has no cuTensorMapEncodeTiled");
  }
  return reinterpret_cast<Encode>(function);
}

CUtensorMapSwizzle SwizzleOf(int bytes) {
  if (bytes == 32) return CU_TENSOR_MAP_SWIZZLE_32B;
  return bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B;
}

}  // namespace

absl::Status EncodeTensorMap(std::string_view name, const void* data, DType dtype, const HeadsBox& box,
                             CUtensorMap* map) {
  static const absl::StatusOr<Encode> encode = FindEncode();
  LF_RETURN_IF_ERROR(encode.status());
  const cuuint64_t dims[] = {static_cast<cuuint64_t>(box.head_dim), static_cast<cuuint64_t>(box.num_rows),
                             static_cast<cuuint64_t>(box.num_heads)};
  // The stride of a single row or head means nothing, but is checked.
  const int64_t row_stride = box.num_rows == 1 ? box.head_dim : box.row_stride;
  const int64_t head_stride = box.num_heads == 1 ? row_stride : box.head_stride;
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(2 * row_stride),
                                static_cast<cuuint64_t>(2 * head_stride)};
  const cuuint32_t box_size[] = {static_cast<cuuint32_t>(box.box_dims), static_cast<cuuint32_t>(box.box_rows),
                                 1};
  const cuuint32_t steps[] = {1, 1, 1};
  const CUresult result = (*encode)(
      map, dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
      const_cast<void*>(data), dims, strides, box_size, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      SwizzleOf(box.swizzle_bytes), CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(
      std::string(name), ": cuTensorMapEncodeTiled gives error ", static_cast<int>(result), " for ",
      box.num_heads, " heads of ", box.num_rows, " rows of ", box.head_dim, ", strides ", box.head_stride,
      " and ", box.row_stride, ", boxes of ", box.box_rows, " rows of ", box.box_dims));
}

}  // namespace longfill::cuda::hopper
