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

// A dimension of the array and of the box.
struct Dimension {
  int64_t size;
  int64_t stride;  // elements; of the first it is 1
  int box;
};

template <int kRank>
absl::Status EncodeDimensions(std::string_view name, const void* data, DType dtype, const HeadsBox& box,
                              const Dimension (&dimensions)[kRank], CUtensorMap* map) {
  static const absl::StatusOr<Encode> encode = FindEncode();
  LF_RETURN_IF_ERROR(encode.status());
  cuuint64_t sizes[kRank];
  cuuint64_t strides[kRank];  // bytes
  cuuint32_t box_sizes[kRank];
  cuuint32_t steps[kRank];
  for (int i = 0; i < kRank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(dimensions[i].size);
    strides[i] = static_cast<cuuint64_t>(2 * dimensions[i].stride);
    box_sizes[i] = static_cast<cuuint32_t>(dimensions[i].box);
    steps[i] = 1;
  }
  const CUresult result = (*encode)(
      map, dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      kRank, const_cast<void*>(data), sizes, strides + 1, box_sizes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      SwizzleOf(box.swizzle_bytes), CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(
      std::string(name), ": cuTensorMapEncodeTiled gives error ", static_cast<int>(result), " for ",
      box.num_heads, " heads of ", box.num_rows, " rows of ", box.head_dim, ", strides ", box.head_stride,
      " and ", box.row_stride, ", boxes of ", box.box_rows, " rows of ", box.box_dims));
}

// The stride of a single row or head means nothing, but is checked.
int64_t RowStrideOf(const HeadsBox& box) { return box.num_rows == 1 ? box.head_dim : box.row_stride; }
int64_t HeadStrideOf(const HeadsBox& box) { return box.num_heads == 1 ? RowStrideOf(box) : box.head_stride; }

}  // namespace

absl::Status EncodeTensorMap(std::string_view name, const void* data, DType dtype, const HeadsBox& box,
                             CUtensorMap* map) {
  return EncodeDimensions<3>(name, data, dtype, box,
                             {{box.head_dim, 1, box.box_dims},
                              {box.num_rows, RowStrideOf(box), box.box_rows},
                              {box.num_heads, HeadStrideOf(box), 1}},
                             map);
}

absl::Status EncodeWholeRowsMap(std::string_view name, const void* data, DType dtype, const HeadsBox& box,
                                CUtensorMap* map) {
  const int num_blocks = static_cast<int>(box.head_dim / box.box_dims);
  return EncodeDimensions<4>(name, data, dtype, box,
                             {{box.box_dims, 1, box.box_dims},
                              {box.num_rows, RowStrideOf(box), box.box_rows},
                              {num_blocks, box.box_dims, num_blocks},
                              {box.num_heads, HeadStrideOf(box), 1}},
                             map);
}

}  // namespace longfill::cuda::hopper
