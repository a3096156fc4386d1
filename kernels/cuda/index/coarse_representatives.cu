#include "absl/strings/str_cat.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/index/representatives.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/packed.cuh"
#include "kernels/sparse/share_check.h"

namespace longfill {
namespace {

constexpr char kOperation[] = "coarse representatives";
constexpr unsigned kAllLanes = 0xFFFFFFFFU;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kPacked = cuda::kPackedCount;
constexpr int kMaxHeadDim = 32 * kPacked;  // a warp for each row
constexpr int kBlocks = static_cast<int>(kCoarseBlocks);
constexpr int kMaxCandidates = kBlocks * static_cast<int>(kMaxOutliers + 1);

// A thread block for each coarse block. Candidate i is representative i / kBlocks of its block i % kBlocks.
template <typename Element>
__global__ __launch_bounds__(kThreads) void CoarseRepresentativesKernel(
    const __grid_constant__ CoarseRepresentativesParams params) {
  __shared__ float chosen[kMaxHeadDim];        // the last one
  __shared__ float distances[kMaxCandidates];  // squared, to the nearest of those chosen
  __shared__ int next;                         // candidate that is chosen
  using Row = cuda::Packed<Element, kPacked>;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int lanes = static_cast<int>(params.head_dim) / kPacked;  // that have a part of a row
  const int num_samples = static_cast<int>(params.num_samples);
  const int num_candidates = kBlocks * static_cast<int>(params.num_representatives);
  const int64_t num_coarse_blocks = gridDim.x;
  const int64_t plane = params.num_key_blocks * params.head_dim;
  const Element* const rows =
      static_cast<const Element*>(params.representatives) + int64_t{blockIdx.x} * kBlocks * params.head_dim;
  Element* const out = static_cast<Element*>(params.out) + int64_t{blockIdx.x} * params.head_dim;
  const auto row_of = [&](int i) { return rows + i / kBlocks * plane + i % kBlocks * params.head_dim; };

  for (int i = thread; i < num_candidates; i += kThreads) distances[i] = INFINITY;
  if (num_samples == 0 && thread < lanes) {  // the mean of means
    float sums[kPacked] = {};
    for (int i = 0; i < kBlocks; ++i) {
      float values[kPacked];
      Row::Load(row_of(i) + lane * kPacked).Widen(values);
#pragma unroll
      for (int j = 0; j < kPacked; ++j) sums[j] += values[j];
    }
#pragma unroll
    for (int j = 0; j < kPacked; ++j) {
      sums[j] /= static_cast<float>(kBlocks);
      chosen[lane * kPacked + j] = sums[j];
    }
    Row::Narrow(sums).Store(out + lane * kPacked);
  }
  __syncthreads();

  const int num_planes = static_cast<int>(NumRepresentatives(num_samples, params.num_coarse));
  for (int r = num_samples == 0 ? 1 : 0; r < num_planes; ++r) {
    for (int i = thread / 32; r > 0 && i < num_candidates; i += kWarps) {
      float squares = 0;
      if (lane < lanes) {
        float values[kPacked];
        Row::Load(row_of(i) + lane * kPacked).Widen(values);
#pragma unroll
        for (int j = 0; j < kPacked; ++j) {
          const float difference = values[j] - chosen[lane * kPacked + j];
          squares = fmaf(difference, difference, squares);
        }
      }
      for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(kAllLanes, squares, step);
      if (lane == 0) distances[i] = fminf(distances[i], squares);
    }
    __syncthreads();
    if (r < num_samples) {
      if (thread == 0) {
        const CoarseSample sample(num_samples, r);
        next = static_cast<int>(sample.sample * kBlocks + sample.block);
      }
    } else if (thread < 32) {
      // The largest distance, which is not negative, and of equal ones the lower candidate.
      uint64_t best = 0;
      for (int i = lane; i < num_candidates; i += 32) {
        best = max(best,
                   uint64_t{__float_as_uint(distances[i])} << 32 | (0xFFFFFFFFU - static_cast<uint32_t>(i)));
      }
      for (int step = 16; step > 0; step /= 2) {
        best = max(best, static_cast<uint64_t>(
                             __shfl_xor_sync(kAllLanes, static_cast<unsigned long long>(best), step)));
      }
      if (lane == 0) next = static_cast<int>(0xFFFFFFFFU - static_cast<uint32_t>(best));
    }
    __syncthreads();
    if (thread < lanes) {
      const Row row = Row::Load(row_of(next) + lane * kPacked);
      float values[kPacked];
      row.Widen(values);
#pragma unroll
      for (int j = 0; j < kPacked; ++j) chosen[lane * kPacked + j] = values[j];
      row.Store(out + r * num_coarse_blocks * params.head_dim + lane * kPacked);
    }
    __syncthreads();
  }
}

}  // namespace

absl::Status CudaCoarseRepresentatives(const CoarseRepresentativesParams& params, DType compute_dtype,
                                       cudaStream_t stream) {
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast(kOperation, "num_key_blocks", params.num_key_blocks, 0));
  LF_RETURN_IF_ERROR(CheckReadsRepresentatives(kOperation, params.num_representatives, params.num_samples));
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast(kOperation, "num_coarse", params.num_coarse, 1));
  LF_RETURN_IF_ERROR(CheckCoarse("coarse representatives: num_", params.num_coarse, params.num_samples));
  if (params.head_dim < kPacked || params.head_dim > kMaxHeadDim || params.head_dim % kPacked != 0) {
    return absl::UnimplementedError(absl::StrCat(kOperation, ": no variant for head_dim ", params.head_dim,
                                                 ", only for multiples of ", kPacked, " up to ",
                                                 kMaxHeadDim));
  }
  if (!cuda::AlignedTo16(params.representatives, params.out)) {
    return absl::InvalidArgumentError(
        absl::StrCat(kOperation, ": representatives and out must be aligned to 16 bytes"));
  }
  return cuda::WithComputeType(compute_dtype, [&]<typename Element>() {
    return Launch("CoarseRepresentativesKernel", CoarseRepresentativesKernel<Element>,
                  {.grid_x = params.num_key_blocks / kCoarseBlocks, .block = kThreads}, stream, params);
  });
}

}  // namespace longfill
