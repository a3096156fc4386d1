#include "kernels/cuda/gemm.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_status.h"

namespace longfill {
namespace {

constexpr int64_t kLibraryWorkspaceBytes = int64_t{32} << 20;  // what NVIDIA advises for Hopper
constexpr int64_t kAlignment = 256;
constexpr size_t kMaxPlans = 1024;  // row counts of requests come in any number

cudaDataType_t DataType(DType dtype) {
  if (dtype == DType::kFloat32) return CUDA_R_32F;
  return dtype == DType::kFloat16 ? CUDA_R_16F : CUDA_R_16BF;
}

int AlignmentOf(const void* data) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  return static_cast<int>(std::min<uintptr_t>(address & (~address + 1), kAlignment));
}

// The part of the workspace that the library gets.
void* AlignedPart(Workspace workspace) {
  const auto beyond = static_cast<int64_t>(reinterpret_cast<uintptr_t>(workspace.data) % kAlignment);
  return static_cast<char*>(workspace.data) + (kAlignment - beyond) % kAlignment;
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaGemm>> CudaGemm::Create(int device, DType compute_dtype) {
  LF_RETURN_IF_ERROR(UseDevice(device));
  cublasLtHandle_t handle = nullptr;
  LF_RETURN_IF_CUBLAS_ERROR(cublasLtCreate(&handle));
  return std::unique_ptr<CudaGemm>(new CudaGemm(device, compute_dtype, handle));
}

CudaGemm::~CudaGemm() {
  if (UseDevice(device_).ok()) CublasStatus(cublasLtDestroy(handle_), "cublasLtDestroy").IgnoreError();
}

int64_t CudaGemm::WorkspaceBytes() { return kLibraryWorkspaceBytes + kAlignment; }

absl::Status CudaGemm::Check(const GemmParams& params, Workspace workspace) const {
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("gemm", "num_rows", params.num_rows, 0));
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("gemm", "in_width", params.in_width, 1));
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("gemm", "out_width", params.out_width, 0));
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("gemm", "x_stride", params.x_stride, params.in_width));
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("gemm", "out_stride", params.out_stride, params.out_width));
  if (params.weight_dtype != compute_dtype_) {
    return absl::UnimplementedError(
        absl::StrCat("gemm: no variant for weights of ", std::string(DTypeName(params.weight_dtype)),
                     " where the compute dtype is ", std::string(DTypeName(compute_dtype_))));
  }
  if (params.out_dtype != compute_dtype_ && params.out_dtype != DType::kFloat32) {
    return absl::UnimplementedError(
        absl::StrCat("gemm: no variant for an output of ", std::string(DTypeName(params.out_dtype)),
                     " where the compute dtype is ", std::string(DTypeName(compute_dtype_))));
  }
  return cuda::CheckWorkspace("gemm", workspace, WorkspaceBytes());
}

CudaGemm::Shape CudaGemm::ShapeOf(const GemmParams& params) {
  const bool float_out = params.out_dtype == DType::kFloat32;
  return {.num_rows = params.num_rows,
          .in_width = params.in_width,
          .out_width = params.out_width,
          .x_stride = params.x_stride,
          .out_stride = params.out_stride,
          .x_alignment = AlignmentOf(params.x),
          .weight_alignment = AlignmentOf(params.weight),
          .out_alignment = AlignmentOf(params.out),
          .accumulate = params.accumulate,
          .bias = params.bias != nullptr && !float_out,
          .float_out = float_out};
}

// The library thinks in columns: what is row-major [rows, columns] here is its [columns, rows].
absl::StatusOr<CudaGemm::Layout> CudaGemm::NewLayout(cudaDataType_t type, int64_t rows, int64_t columns,
                                                     int64_t stride) const {
  cublasLtMatrixLayout_t layout = nullptr;
  LF_RETURN_IF_CUBLAS_ERROR(cublasLtMatrixLayoutCreate(&layout, type, static_cast<uint64_t>(columns),
                                                       static_cast<uint64_t>(rows), stride));
  return Layout(layout);
}

// In columns: out [out_width, num_rows] = transposed weight [in_width, out_width] times x [in_width,
// num_rows].
absl::StatusOr<CudaGemm::Plan> CudaGemm::NewPlan(const Shape& shape) const {
  Plan plan;
  cublasLtMatmulDesc_t operation = nullptr;
  LF_RETURN_IF_CUBLAS_ERROR(cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  plan.operation.reset(operation);
  const cublasOperation_t transposed = CUBLAS_OP_T;
  LF_RETURN_IF_CUBLAS_ERROR(cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_TRANSA,
                                                           &transposed, sizeof(transposed)));
  if (shape.bias) {
    const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    LF_RETURN_IF_CUBLAS_ERROR(cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_EPILOGUE,
                                                             &epilogue, sizeof(epilogue)));
  }
  const cudaDataType_t type = DataType(compute_dtype_);
  const cudaDataType_t out_type = shape.float_out ? CUDA_R_32F : type;
  LF_ASSIGN_OR_RETURN(plan.weight, NewLayout(type, shape.out_width, shape.in_width, shape.in_width));
  LF_ASSIGN_OR_RETURN(plan.x, NewLayout(type, shape.num_rows, shape.in_width, shape.x_stride));
  LF_ASSIGN_OR_RETURN(plan.out, NewLayout(out_type, shape.num_rows, shape.out_width, shape.out_stride));
  LF_RETURN_IF_ERROR(ChooseAlgorithm(shape, &plan));
  return plan;
}

absl::Status CudaGemm::ChooseAlgorithm(const Shape& shape, Plan* plan) const {
  cublasLtMatmulPreference_t raw_preference = nullptr;
  LF_RETURN_IF_CUBLAS_ERROR(cublasLtMatmulPreferenceCreate(&raw_preference));
  const Preference preference(raw_preference);
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    return CublasStatus(
        cublasLtMatmulPreferenceSetAttribute(preference.get(), attribute, &value, sizeof(value)),
        "cublasLtMatmulPreferenceSetAttribute");
  };
  LF_RETURN_IF_ERROR(prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{kLibraryWorkspaceBytes}));
  LF_RETURN_IF_ERROR(prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                            static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE)));
  const std::pair<cublasLtMatmulPreferenceAttributes_t, int> alignments[] = {
      {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, shape.weight_alignment},
      {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, shape.x_alignment},
      {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, shape.out_alignment},
      {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, shape.out_alignment}};
  for (const auto& [attribute, bytes] : alignments) {
    LF_RETURN_IF_ERROR(prefer(attribute, static_cast<uint32_t>(bytes)));
  }
  cublasLtMatmulHeuristicResult_t result = {};
  int found = 0;
  const cublasStatus_t answer =
      cublasLtMatmulAlgoGetHeuristic(handle_, plan->operation.get(), plan->weight.get(), plan->x.get(),
                                     plan->out.get(), plan->out.get(), preference.get(), 1, &result, &found);
  if (answer == CUBLAS_STATUS_NOT_SUPPORTED || (answer == CUBLAS_STATUS_SUCCESS && found == 0)) {
    return absl::UnimplementedError(absl::StrCat(
        "gemm: cuBLASLt has no algorithm for [", shape.num_rows, ", ", shape.in_width, "] x [",
        shape.out_width, ", ", shape.in_width, "]^T of ", std::string(DTypeName(compute_dtype_)),
        ", strides ", shape.x_stride, " and ", shape.out_stride, ", alignments ", shape.x_alignment, ", ",
        shape.weight_alignment, " and ", shape.out_alignment, " bytes"));
  }
  LF_RETURN_IF_ERROR(CublasStatus(answer, "cublasLtMatmulAlgoGetHeuristic"));
  plan->algorithm = result.algo;
  return absl::OkStatus();
}

absl::StatusOr<CudaGemm::Plan*> CudaGemm::FindPlan(const Shape& shape) {
  if (const auto known = plans_.find(shape); known != plans_.end()) return &known->second;
  LF_ASSIGN_OR_RETURN(Plan plan, NewPlan(shape));
  if (plans_.size() >= kMaxPlans) plans_.clear();
  return &plans_.emplace(shape, std::move(plan)).first->second;
}

absl::Status CudaGemm::Run(const GemmParams& params, Workspace workspace, cudaStream_t stream) {
  if (params.num_rows == 0 || params.out_width == 0) return absl::OkStatus();
  LF_RETURN_IF_ERROR(Check(params, workspace));
  LF_ASSIGN_OR_RETURN(Plan * plan, FindPlan(ShapeOf(params)));
  const bool float_out = params.out_dtype == DType::kFloat32;
  if (params.bias != nullptr && !float_out) {
    LF_RETURN_IF_CUBLAS_ERROR(cublasLtMatmulDescSetAttribute(
        plan->operation.get(), CUBLASLT_MATMUL_DESC_BIAS_POINTER, &params.bias, sizeof(params.bias)));
  }
  const float alpha = 1;
  const float beta = params.accumulate ? 1 : 0;
  LF_RETURN_IF_CUBLAS_ERROR(cublasLtMatmul(
      handle_, plan->operation.get(), &alpha, params.weight, plan->weight.get(), params.x, plan->x.get(),
      &beta, params.out, plan->out.get(), params.out, plan->out.get(), &plan->algorithm,
      AlignedPart(workspace), static_cast<size_t>(kLibraryWorkspaceBytes), stream));
  if (params.bias == nullptr || !float_out) return absl::OkStatus();
  // The library adds a bias of the type of its output only.
  return AddBias(static_cast<float*>(params.out), params.out_stride, params.bias, compute_dtype_,
                 params.num_rows, params.out_width, stream);
}

}  // namespace longfill
