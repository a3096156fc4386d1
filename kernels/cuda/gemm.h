#ifndef LONGFILL_KERNELS_CUDA_GEMM_H_
#define LONGFILL_KERNELS_CUDA_GEMM_H_

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <compare>
#include <map>
#include <memory>
#include <type_traits>

#include "kernels/api/kernel_set.h"
#include "kernels/base/status.h"

namespace longfill {

// Products by cuBLASLt, accumulated in fp32 and never reduced at a lower precision. The library's heuristic
// is asked once for each shape; equal shapes, strides and alignments run the same algorithm and give the same
// bits. Bound to the device that was current in Create.
class CudaGemm {
 public:
  static absl::StatusOr<std::unique_ptr<CudaGemm>> Create(int device, DType compute_dtype);
  ~CudaGemm();
  CudaGemm(const CudaGemm&) = delete;
  CudaGemm& operator=(const CudaGemm&) = delete;

  static int64_t WorkspaceBytes();
  // On the current device, which is that of Create.
  absl::Status Run(const GemmParams& params, Workspace workspace, cudaStream_t stream);

 private:
  template <auto kDestroy>
  struct Destroy {
    template <typename T>
    void operator()(T* object) const {
      kDestroy(object);
    }
  };
  using Descriptor =
      std::unique_ptr<std::remove_pointer_t<cublasLtMatmulDesc_t>, Destroy<cublasLtMatmulDescDestroy>>;
  using Layout =
      std::unique_ptr<std::remove_pointer_t<cublasLtMatrixLayout_t>, Destroy<cublasLtMatrixLayoutDestroy>>;
  using Preference = std::unique_ptr<std::remove_pointer_t<cublasLtMatmulPreference_t>,
                                     Destroy<cublasLtMatmulPreferenceDestroy>>;

  // All that an algorithm is chosen by. Alignments are in bytes.
  struct Shape {
    int64_t num_rows, in_width, out_width, x_stride, out_stride;
    int x_alignment, weight_alignment, out_alignment;
    bool accumulate, bias, float_out;
    auto operator<=>(const Shape&) const = default;
  };
  struct Plan {
    Descriptor operation;
    Layout x, weight, out;
    cublasLtMatmulAlgo_t algorithm = {};
  };

  CudaGemm(int device, DType compute_dtype, cublasLtHandle_t handle)
      : device_(device), compute_dtype_(compute_dtype), handle_(handle) {}
  absl::Status Check(const GemmParams& params, Workspace workspace) const;
  static Shape ShapeOf(const GemmParams& params);
  absl::StatusOr<Layout> NewLayout(cudaDataType_t type, int64_t rows, int64_t columns, int64_t stride) const;
  absl::StatusOr<Plan> NewPlan(const Shape& shape) const;
  absl::Status ChooseAlgorithm(const Shape& shape, Plan* plan) const;
  absl::StatusOr<Plan*> FindPlan(const Shape& shape);

  const int device_;
  const DType compute_dtype_;
  const cublasLtHandle_t handle_;
  std::map<Shape, Plan> plans_;
};

// out [num_rows, width] += bias [width] of the compute dtype.
absl::Status AddBias(float* out, int64_t out_stride, const void* bias, DType bias_dtype, int64_t num_rows,
                     int64_t width, cudaStream_t stream);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_GEMM_H_
