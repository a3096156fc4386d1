#include "kernels/cuda/cuda_status.h"

#include "kernels/api/backend.h"
#include "kernels/cuda/poll.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

TEST(CudaStatusTest, ErrorsHaveTheirCodesAndNameTheCall) {
  const struct {
    cudaError_t error;
    absl::StatusCode code;
  } cases[] = {{cudaErrorMemoryAllocation, absl::StatusCode::kResourceExhausted},
               {cudaErrorNoDevice, absl::StatusCode::kUnavailable},
               {cudaErrorInsufficientDriver, absl::StatusCode::kUnavailable},
               {cudaErrorInvalidDevice, absl::StatusCode::kUnavailable},
               {cudaErrorNoKernelImageForDevice, absl::StatusCode::kUnimplemented},
               {cudaErrorUnsupportedPtxVersion, absl::StatusCode::kUnimplemented},
               {cudaErrorInvalidConfiguration, absl::StatusCode::kInternal},
               {cudaErrorInvalidValue, absl::StatusCode::kInternal}};
  for (const auto& [error, code] : cases) {
    EXPECT_THAT(CudaStatus(error, "cudaThis(&that, 3)"),
                StatusIs(code, AllOf(HasSubstr("cudaThis: "), HasSubstr(cudaGetErrorName(error)))));
  }
  LF_EXPECT_OK(CudaStatus(cudaSuccess, "cudaThis"));
  LF_EXPECT_OK(CublasStatus(CUBLAS_STATUS_SUCCESS, "cublasThis"));
  EXPECT_THAT(CublasStatus(CUBLAS_STATUS_ALLOC_FAILED, "cublasThis(x)"),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("cublasThis: ")));
  EXPECT_THAT(CublasStatus(CUBLAS_STATUS_ARCH_MISMATCH, "cublasThis"),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("ARCH_MISMATCH")));
}

TEST(CudaStatusTest, TheFirstErrorThatLosesADeviceIsRemembered) {
  constexpr int kNoSuchDevice = 61;
  UseDevice(kNoSuchDevice).IgnoreError();
  EXPECT_THAT(CudaStatus(cudaErrorInvalidValue, "cudaThis"),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("cudaErrorInvalidValue")));
  LF_EXPECT_OK(LostDeviceStatus(kNoSuchDevice));
  EXPECT_THAT(CudaStatus(cudaErrorIllegalAddress, "cudaStreamQuery"),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("device 61 is lost")));
  CudaStatus(cudaErrorLaunchFailure, "cudaStreamQuery").IgnoreError();
  EXPECT_THAT(LostDeviceStatus(kNoSuchDevice),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("cudaErrorIllegalAddress")));
  LF_EXPECT_OK(LostDeviceStatus(kNoSuchDevice - 1));
  UseDevice(0).IgnoreError();
}

TEST(PollTest, WaitsForTheAnswer) {
  int queries = 0;
  const auto after_three = [&] { return ++queries < 4 ? cudaErrorNotReady : cudaSuccess; };
  LF_EXPECT_OK(Poll("cudaStreamQuery", after_three));
  EXPECT_EQ(queries, 4);
  EXPECT_THAT(Poll("cudaStreamQuery", [] { return cudaErrorInvalidValue; }),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("cudaStreamQuery: cudaErrorInvalidValue")));
}

TEST(PollTest, DeviceThatHangsIsLost) {
  constexpr int kNoSuchDevice = 62;
  UseDevice(kNoSuchDevice).IgnoreError();
  const auto never = [] { return cudaErrorNotReady; };
  EXPECT_THAT(Poll("cudaEventQuery", never, std::chrono::milliseconds(20)),
              StatusIs(absl::StatusCode::kDeadlineExceeded,
                       AllOf(HasSubstr("cudaEventQuery: device 62"), HasSubstr("after 20 ms"))));
  EXPECT_THAT(LostDeviceStatus(kNoSuchDevice),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("device 62 is lost")));
  UseDevice(0).IgnoreError();
}

TEST(CudaStatusTest, WhatCannotBeMadeIsNamed) {
  const absl::StatusOr<int> count = CudaDeviceCount();
  if (!count.ok()) {
    EXPECT_THAT(count, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("cudaGetDeviceCount")));
    EXPECT_THAT(CreateCudaBackend({}),
                StatusIs(absl::StatusCode::kUnavailable, HasSubstr("cudaGetDeviceCount")));
  } else {
    EXPECT_THAT(CreateCudaBackend({.device = *count}),
                StatusIs(absl::StatusCode::kUnavailable, HasSubstr("no CUDA device")));
  }
  EXPECT_THAT(CreateCudaBackend({.compute_dtype = DType::kFloat32}),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("float32")));
}

}  // namespace
}  // namespace longfill
