#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/packed.cuh"

namespace longfill {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsOfBlock = 16;  // whose cosines and sines are computed once for all heads
constexpr int kMaxPairs = 128;
constexpr int64_t kMaxRowElements = int64_t{1} << 26;  // of all heads, so that 32 bits count a block's

struct RotaryArguments {
  const void* x;
  int64_t x_stride;
  double inv_freq[kMaxPairs];
  float attention_scale;
  int num_pairs;
  PositionMap positions;
  int64_t row_offset;
  int64_t num_rows;
  int num_heads;
  int head_dim;
  void* out;
  int64_t head_stride;
};

// Cosine and sine of position * inv_freq, rounded to fp32, times attention_scale. In half turns the reduction
// to [-1, 1] is exact.
__device__ float2 CosSin(double position, double inv_freq, float attention_scale) {
  constexpr double kOneOverPi = 0.31830988618379067154;
  double half_turns = static_cast<double>(static_cast<float>(position * inv_freq)) * kOneOverPi;
  half_turns -= 2 * rint(half_turns * 0.5);
  float sine;
  float cosine;
  sincospif(static_cast<float>(half_turns), &sine, &cosine);
  return {cosine * attention_scale, sine * attention_scale};
}

// table[row][pair] for the rows of the block. A thread stays with one pair, whose frequency it reads once.
__device__ void FillTable(const RotaryArguments& arguments, int64_t row_begin, int rows, float2* table) {
  __shared__ double positions[kRowsOfBlock];
  if (static_cast<int>(threadIdx.x) < rows) {
    positions[threadIdx.x] =
        static_cast<double>(arguments.positions.Position(arguments.row_offset + row_begin + threadIdx.x));
  }
  __syncthreads();
  const int pairs = arguments.num_pairs;
  const int rows_at_once = kThreads / pairs;
  const int pair = static_cast<int>(threadIdx.x) % pairs;
  const int first = static_cast<int>(threadIdx.x) / pairs;
  if (first < rows_at_once) {
    const double inv_freq = arguments.inv_freq[pair];
    for (int row = first; row < rows; row += rows_at_once) {
      table[row * pairs + pair] = CosSin(positions[row], inv_freq, arguments.attention_scale);
    }
  }
  __syncthreads();
}

// Rotates kCount pairs, which begin at pair `first` of a row of one head. What comes as two accesses is,
// half-split, the first and the second elements of the pairs, interleaved, the pairs one after another.
template <typename T, int kCount, bool kInterleaved>
__device__ void RotatePairs(const T* x, const float2* cos_sin, int first, int num_pairs, T* out) {
  const int low = kInterleaved ? 2 * first : first;
  const int high = kInterleaved ? 2 * first + kCount : first + num_pairs;
  float values[2][kCount];
  Packed<T, kCount>::Load(x + low).Widen(values[0]);
  Packed<T, kCount>::Load(x + high).Widen(values[1]);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float& a = kInterleaved ? values[2 * i / kCount][2 * i % kCount] : values[0][i];
    float& b = kInterleaved ? values[(2 * i + 1) / kCount][(2 * i + 1) % kCount] : values[1][i];
    const float2 turn = cos_sin[first + i];
    const float turned_a = a * turn.x - b * turn.y;
    b = b * turn.x + a * turn.y;
    a = turned_a;
  }
  Packed<T, kCount>::Narrow(values[0]).Store(out + low);
  Packed<T, kCount>::Narrow(values[1]).Store(out + high);
}

// A block takes kRowsOfBlock rows of all heads. The units of a head's row are kCount pairs each, then kCount
// elements each that are only moved.
template <typename T, int kCount, bool kInterleaved>
__global__ void __launch_bounds__(kThreads) RotaryKernel(const __grid_constant__ RotaryArguments arguments) {
  __shared__ float2 table[kRowsOfBlock * kMaxPairs];
  const int64_t row_begin = int64_t{blockIdx.x} * kRowsOfBlock;
  const int rows = static_cast<int>(min(int64_t{kRowsOfBlock}, arguments.num_rows - row_begin));
  const int pairs = arguments.num_pairs;
  const int head_dim = arguments.head_dim;
  if (pairs > 0) FillTable(arguments, row_begin, rows, table);

  const int turned = pairs / kCount;
  const int units_of_head = turned + (head_dim - 2 * pairs) / kCount;
  const int units_of_row = units_of_head * arguments.num_heads;
  const T* x = static_cast<const T*>(arguments.x) + row_begin * arguments.x_stride;
  T* out = static_cast<T*>(arguments.out) + (arguments.row_offset + row_begin) * head_dim;
  for (int i = static_cast<int>(threadIdx.x); i < rows * units_of_row; i += kThreads) {
    const int row = i / units_of_row;
    const int head = i % units_of_row / units_of_head;
    const int unit = i % units_of_head;
    const T* from = x + row * arguments.x_stride + int64_t{head} * head_dim;
    T* to = out + head * arguments.head_stride + int64_t{row} * head_dim;
    if (unit < turned) {
      RotatePairs<T, kCount, kInterleaved>(from, table + row * pairs, unit * kCount, pairs, to);
    } else {
      const int element = 2 * pairs + (unit - turned) * kCount;
      Packed<T, kCount>::Load(from + element).Store(to + element);
    }
  }
}

absl::Status Check(const RotaryParams& params) {
  LF_RETURN_IF_ERROR(CheckAtLeast("rotary", "num_rows", params.num_rows, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("rotary", "num_heads", params.num_heads, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("rotary", "row_offset", params.row_offset, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("rotary", "head_dim", params.head_dim, 1));
  LF_RETURN_IF_ERROR(CheckAtLeast("rotary", "x_stride", params.x_stride, params.num_heads * params.head_dim));
  LF_RETURN_IF_ERROR(CheckAtLeast("rotary", "head_stride", params.head_stride,
                                  (params.row_offset + params.num_rows) * params.head_dim));
  if (params.rotary_dim < 0 || params.rotary_dim > params.head_dim || params.rotary_dim % 2 != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "rotary: rotary_dim ", params.rotary_dim, " is not an even number up to head_dim ", params.head_dim));
  }
  if (params.rotary_dim > 2 * kMaxPairs || params.num_heads * params.head_dim > kMaxRowElements) {
    return absl::UnimplementedError(absl::StrCat(
        "rotary: no variant for rotary_dim ", params.rotary_dim, " above ", 2 * kMaxPairs, " or ",
        params.num_heads, " heads of ", params.head_dim, " elements, above ", kMaxRowElements, " in all"));
  }
  if (static_cast<int64_t>(params.inv_freq.size()) != params.rotary_dim / 2) {
    return absl::InvalidArgumentError(absl::StrCat("rotary: inv_freq has ", params.inv_freq.size(),
                                                   " entries for rotary_dim ", params.rotary_dim));
  }
  if (params.positions.block < 1 || params.positions.stride < 0) {
    return absl::InvalidArgumentError(absl::StrCat("rotary: position map ", ToString(params.positions)));
  }
  return absl::OkStatus();
}

RotaryArguments Arguments(const RotaryParams& params) {
  RotaryArguments arguments = {};
  arguments.x = params.x;
  arguments.x_stride = params.x_stride;
  std::copy(params.inv_freq.begin(), params.inv_freq.end(), arguments.inv_freq);
  arguments.attention_scale = params.attention_scale;
  arguments.num_pairs = static_cast<int>(params.rotary_dim / 2);
  arguments.positions = params.positions;
  arguments.row_offset = params.row_offset;
  arguments.num_rows = params.num_rows;
  arguments.num_heads = static_cast<int>(params.num_heads);
  arguments.head_dim = static_cast<int>(params.head_dim);
  arguments.out = params.out;
  arguments.head_stride = params.head_stride;
  return arguments;
}

}  // namespace
}  // namespace cuda

absl::Status CudaRotary(const RotaryParams& params, DType compute_dtype, const DeviceLimits& /*limits*/,
                        cudaStream_t stream) {
  if (params.num_rows == 0 || params.num_heads == 0) return absl::OkStatus();
  LF_RETURN_IF_ERROR(cuda::Check(params));
  const cuda::RotaryArguments arguments = cuda::Arguments(params);
  const bool aligned =
      params.rotary_dim % (2 * cuda::kPackedCount) == 0 && params.head_dim % cuda::kPackedCount == 0 &&
      params.x_stride % cuda::kPackedCount == 0 && params.head_stride % cuda::kPackedCount == 0 &&
      cuda::AlignedTo16(params.x, params.out);
  const LaunchShape shape = {.grid_x = CeilDiv(params.num_rows, cuda::kRowsOfBlock), .block = cuda::kThreads};
  return cuda::WithComputeType(compute_dtype, [&]<typename T>() {
    return cuda::WithPackedCount(aligned, [&]<int kCount>() {
      const auto kernel = params.form == RotaryForm::kInterleaved ? cuda::RotaryKernel<T, kCount, true>
                                                                  : cuda::RotaryKernel<T, kCount, false>;
      return Launch("RotaryKernel", kernel, shape, stream, arguments);
    });
  });
}

}  // namespace longfill
