#include "absl/strings/str_cat.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/index/representatives.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/packed.cuh"
#include "kernels/sparse/share_check.h"

namespace longfill {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFFU;
constexpr int kThreads = 256;
constexpr int kPacked = cuda::kPackedCount;
constexpr int kKeys = static_cast<int>(kRowBlock);

// Farther keys are larger; of equal distances, which are not negative, the lower key is.
__device__ uint64_t OutlierKey(const float* distances, int key) {
  return uint64_t{__float_as_uint(distances[key])} << 32 | (0xFFFFFFFFU - static_cast<uint32_t>(key));
}

// One warp: the farthest keys, in order.
__device__ void PickOutliers(const float* distances, int num_outliers, int* outliers) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint64_t first = OutlierKey(distances, lane);
  uint64_t second = OutlierKey(distances, lane + 32);
  for (int r = 0; r < num_outliers; ++r) {
    uint64_t farthest = max(first, second);
    for (int step = 16; step > 0; step /= 2) {
      farthest = max(farthest, static_cast<uint64_t>(__shfl_xor_sync(
                                   kAllLanes, static_cast<unsigned long long>(farthest), step)));
    }
    if (lane == 0) outliers[r] = static_cast<int>(0xFFFFFFFFU - static_cast<uint32_t>(farthest));
    if (first == farthest) first = 0;
    if (second == farthest) second = 0;
  }
}

// A thread block for each 64 keys of a head. `lanes` threads lie side by side over a row, eight elements
// each, and `groups` of them take turns with the rows, which the second and third time come from a cache.
template <typename Element>
__global__ __launch_bounds__(kThreads) void RepresentativesKernel(
    const __grid_constant__ RepresentativesParams params, int lanes, int groups) {
  __shared__ float partial[kThreads * kPacked];  // [groups][head_dim], then [keys][lanes]
  __shared__ float mean[kThreads];
  __shared__ float distances[kKeys];
  __shared__ int outliers[kMaxOutliers];
  const int64_t num_blocks = gridDim.x;
  const int64_t block = blockIdx.x;
  const int64_t head = blockIdx.y;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % lanes;
  const int group = thread / lanes;
  const Element* keys = static_cast<const Element*>(params.k.data) + head * params.k.head_stride +
                        block * kKeys * params.k.row_stride;
  const auto load = [&](int key, int place, float(&values)[kPacked]) {
    cuda::Packed<Element, kPacked>::Load(keys + key * params.k.row_stride + place * kPacked).Widen(values);
  };

  if (group < groups) {
    float sums[kPacked] = {};
#pragma unroll 4
    for (int key = group; key < kKeys; key += groups) {
      float values[kPacked];
      load(key, lane, values);
#pragma unroll
      for (int i = 0; i < kPacked; ++i) sums[i] += values[i];
    }
#pragma unroll
    for (int i = 0; i < kPacked; ++i) partial[(group * lanes + lane) * kPacked + i] = sums[i];
  }
  __syncthreads();
  if (thread < params.head_dim) {
    float sum = partial[thread];
    for (int other = 1; other < groups; ++other) sum += partial[other * lanes * kPacked + thread];
    mean[thread] = sum / static_cast<float>(kKeys);
  }
  __syncthreads();

  if (group < groups) {
#pragma unroll 4
    for (int key = group; key < kKeys; key += groups) {
      float values[kPacked];
      load(key, lane, values);
      float squares = 0;
#pragma unroll
      for (int i = 0; i < kPacked; ++i) {
        const float difference = values[i] - mean[lane * kPacked + i];
        squares = fmaf(difference, difference, squares);
      }
      partial[key * lanes + lane] = squares;
    }
  }
  __syncthreads();
  if (thread < kKeys) {
    float sum = 0;
    for (int i = 0; i < lanes; ++i) sum += partial[thread * lanes + i];
    distances[thread] = sum;
  }
  __syncthreads();
  const int num_samples = static_cast<int>(params.num_samples);
  const int num_outliers = static_cast<int>(params.num_outliers);
  const int num_planes = static_cast<int>(NumRepresentatives(num_samples, num_outliers));
  if (thread < 32) PickOutliers(distances, num_outliers, outliers);
  __syncthreads();

  Element* const out =
      static_cast<Element*>(params.out) + (head * num_planes * num_blocks + block) * params.head_dim;
  for (int i = thread; i < num_planes * lanes; i += kThreads) {
    const int plane = i / lanes;
    const int place = i % lanes;
    const int outlier = plane - (num_planes - num_outliers);  // below 0: a sample, or the mean
    float values[kPacked];
    if (outlier >= 0) {
      load(outliers[outlier], place, values);
    } else if (num_samples > 0) {
      load(static_cast<int>(SampledKey(num_samples, plane)), place, values);
    } else {
#pragma unroll
      for (int j = 0; j < kPacked; ++j) values[j] = mean[place * kPacked + j];
    }
    cuda::Packed<Element, kPacked>::Narrow(values).Store(out + plane * num_blocks * params.head_dim +
                                                         place * kPacked);
  }
}

}  // namespace

absl::Status CudaRepresentatives(const RepresentativesParams& params, DType compute_dtype,
                                 cudaStream_t stream) {
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("representatives", "num_heads", params.num_heads, 0));
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("representatives", "num_keys", params.num_keys, 0));
  LF_RETURN_IF_ERROR(CheckRepresentatives("representatives: num_", params.num_samples, params.num_outliers));
  if (params.head_dim < kPacked || params.head_dim > kThreads || params.head_dim % kPacked != 0) {
    return absl::UnimplementedError(absl::StrCat("representatives: no variant for head_dim ", params.head_dim,
                                                 ", only for multiples of ", kPacked, " up to ", kThreads));
  }
  if (!cuda::AlignedTo16(params.k.data, 2 * params.k.head_stride, 2 * params.k.row_stride, params.out)) {
    return absl::InvalidArgumentError(
        absl::StrCat("representatives: rows must be aligned to 16 bytes, the row stride is ",
                     params.k.row_stride, ", the head stride ", params.k.head_stride));
  }
  const int lanes = static_cast<int>(params.head_dim) / kPacked;
  const int groups = std::min(kThreads / lanes, kKeys);
  return cuda::WithComputeType(compute_dtype, [&]<typename Element>() {
    return Launch("RepresentativesKernel", RepresentativesKernel<Element>,
                  {.grid_x = params.num_keys / kRowBlock, .grid_y = params.num_heads, .block = kThreads},
                  stream, params, lanes, groups);
  });
}

}  // namespace longfill
