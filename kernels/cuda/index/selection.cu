#include "kernels/cuda/index/selection.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/launch.h"

namespace longfill {
namespace {

constexpr int kThreads = 512;
constexpr int kThreadBlocksPerSm = 4;
constexpr int kQuad = 4;    // entries of a load
constexpr int kUnroll = 4;  // loads of a thread on their way at a time
constexpr int kBins = static_cast<int>(kSelectionBins);
constexpr int kCopies = 2;  // of a histogram in shared memory: neighbouring lanes add to different ones
constexpr uint64_t kNoThreshold = ~uint64_t{0};  // no key is as large
constexpr unsigned kAllLanes = 0xFFFFFFFFU;

// Lowest bit of the digit of a pass.
constexpr int DigitShift(int pass) {
  int shift = 64;
  for (int i = 0; i <= pass; ++i) shift -= kSelectionDigitBits[i];
  return shift;
}
static_assert(DigitShift(2) == 32 && DigitShift(kSelectionPasses - 1) == 0,
              "three passes over the score, three over the index");

__device__ int64_t IndexOfEntry(const SelectionLists& lists, int64_t list, int64_t entry) {
  const int64_t position = lists.positions.Position(entry);
  return list % 2 == 1 ? lists.last_query - position : position;
}

// The low half of an entry's key: smaller indices are larger.
__device__ uint32_t IndexKey(const SelectionLists& lists, int64_t list, int64_t entry) {
  return 0xFFFFFFFFU - static_cast<uint32_t>(IndexOfEntry(lists, list, entry));
}

// Calls body(entry, score bits) for the entries of this thread block's stretch of the list, whose first one
// is a multiple of four. `aligned`: lists begin at multiples of 16 bytes.
template <typename Body>
__device__ void ForStretch(const SelectionLists& lists, int64_t list, int64_t stretch_entries, bool aligned,
                           const Body& body) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * stretch_entries;
  const auto count = static_cast<int>(min(stretch_entries, lists.num_entries - begin));
  const float* scores = lists.scores + list * lists.list_stride + begin;
  for (int first = 0; first < count; first += kThreads * kQuad * kUnroll) {
    float values[kUnroll][kQuad];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int at = first + (i * kThreads + static_cast<int>(threadIdx.x)) * kQuad;
      if (aligned && at + kQuad <= count) {
        *reinterpret_cast<float4*>(values[i]) = *reinterpret_cast<const float4*>(scores + at);
        continue;
      }
#pragma unroll
      for (int j = 0; j < kQuad; ++j) values[i][j] = at + j < count ? scores[at + j] : 0.0F;
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int at = first + (i * kThreads + static_cast<int>(threadIdx.x)) * kQuad;
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        if (at + j < count) body(begin + at + j, __float_as_uint(values[i][j]));
      }
    }
  }
}

bool Aligned(const SelectionLists& lists) {
  return cuda::AlignedTo16(lists.scores, lists.list_stride * int64_t{sizeof(float)});
}

struct Budgets {
  static constexpr int kMost = 256;  // of a launch: kernel parameters are limited
  int64_t of_list[kMost];
};

__global__ void SelectionStartKernel(const __grid_constant__ Budgets budgets, int num_lists,
                                     SelectionCut* cuts) {
  const int list = static_cast<int>(threadIdx.x);
  if (list >= num_lists) return;
  const int64_t budget = budgets.of_list[list];
  cuts[list] = {.threshold = kNoThreshold, .missing = budget, .settled = budget == 0 ? 1 : 0};
}

// Digits of the score need no index. In later passes few keys share the prefix, unless many scores are equal.
template <bool kOfScore>
__global__ __launch_bounds__(kThreads) void SelectionHistogramKernel(
    const __grid_constant__ SelectionLists lists, int digit_shift, int digit_bits, int64_t stretch_entries,
    bool aligned, const SelectionCut* cuts, uint64_t* histogram) {
  __shared__ uint32_t counts[kBins * kCopies];
  const int64_t list = blockIdx.y;
  if (cuts[list].settled != 0) return;
  const uint64_t prefix = cuts[list].prefix;
  for (int i = static_cast<int>(threadIdx.x); i < kBins * kCopies; i += kThreads) counts[i] = 0;
  __syncthreads();
  const uint32_t mask = (1U << digit_bits) - 1;
  const int copy = static_cast<int>(threadIdx.x) % kCopies;
  ForStretch(lists, list, stretch_entries, aligned, [&](int64_t entry, uint32_t score) {
    if constexpr (kOfScore) {
      const uint32_t digits = score >> (digit_shift - 32);
      if (digits >> digit_bits != prefix) return;
      atomicAdd(counts + (digits & mask) * kCopies + copy, 1U);
    } else {
      const int index_bits = 32 - digit_shift - digit_bits;  // of the prefix
      if (score != prefix >> index_bits) return;
      const uint64_t digits = (uint64_t{score} << 32 | IndexKey(lists, list, entry)) >> digit_shift;
      if (digits >> digit_bits != prefix) return;
      atomicAdd(counts + (static_cast<uint32_t>(digits) & mask) * kCopies + copy, 1U);
    }
  });
  __syncthreads();
  for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads) {
    uint32_t sum = 0;
    for (int i = 0; i < kCopies; ++i) sum += counts[bin * kCopies + i];
    if (sum != 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(histogram + list * kBins + bin),
                static_cast<unsigned long long>(sum));
    }
  }
}

constexpr int kAdvanceThreads = 256;
constexpr int kBinsOfThread = kBins / kAdvanceThreads;

// Sum of the values of all threads before this one.
__device__ int64_t SumBefore(int64_t value) {
  __shared__ int64_t sums[kAdvanceThreads / 32];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  int64_t inclusive = value;
  for (int step = 1; step < 32; step *= 2) {
    const int64_t other = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == 31) sums[warp] = inclusive;
  __syncthreads();
  int64_t before = inclusive - value;
  for (int i = 0; i < warp; ++i) before += sums[i];
  return before;
}

// A thread has eight bins, thread 0 the largest ones. The one with the cut in its bins takes the digit; with
// too few keys there is none, and every later histogram has too few as well.
__global__ __launch_bounds__(kAdvanceThreads) void SelectionAdvanceKernel(int digit_shift, int digit_bits,
                                                                          const uint64_t* histogram,
                                                                          SelectionCut* cuts) {
  const int64_t list = blockIdx.x;
  const SelectionCut cut = cuts[list];
  if (cut.settled != 0) return;
  const int first_bin = kBins - 1 - kBinsOfThread * static_cast<int>(threadIdx.x);
  int64_t counts[kBinsOfThread];
  int64_t sum = 0;
#pragma unroll
  for (int i = 0; i < kBinsOfThread; ++i) {
    counts[i] = static_cast<int64_t>(histogram[list * kBins + first_bin - i]);
    sum += counts[i];
  }
  int64_t above = SumBefore(sum);
  if (above >= cut.missing || above + sum < cut.missing) return;
#pragma unroll
  for (int i = 0; i < kBinsOfThread; ++i) {
    if (above < cut.missing && above + counts[i] >= cut.missing) {
      SelectionCut next = cut;
      next.prefix = cut.prefix << digit_bits | static_cast<uint64_t>(first_bin - i);
      next.missing = cut.missing - above;
      if (counts[i] == next.missing) {  // the whole bin is taken
        next.settled = 1;
        next.threshold = next.prefix << digit_shift;
      }
      cuts[list] = next;
    }
    above += counts[i];
  }
}

__global__ __launch_bounds__(kThreads,
                             3) void SelectionMarkKernel(const __grid_constant__ SelectionLists lists,
                                                         int64_t stretch_entries, bool aligned,
                                                         const SelectionCut* cuts, uint64_t* bits,
                                                         int64_t words_per_list) {
  const int64_t list = blockIdx.y;
  const uint64_t threshold = cuts[list].threshold;
  if (threshold == kNoThreshold) return;
  const auto score_threshold = static_cast<uint32_t>(threshold >> 32);
  const auto index_threshold = static_cast<uint32_t>(threshold);
  auto* words = reinterpret_cast<unsigned long long*>(bits + list * words_per_list);
  ForStretch(lists, list, stretch_entries, aligned, [&](int64_t entry, uint32_t score) {
    if (score < score_threshold) return;
    if (score == score_threshold && IndexKey(lists, list, entry) < index_threshold) return;
    const int64_t index = IndexOfEntry(lists, list, entry);
    atomicOr(words + index / 64, 1ULL << index % 64);
  });
}

absl::Status CheckLists(const char* operation, const SelectionLists& lists) {
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast(operation, "num_lists", lists.num_lists, 0));
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast(operation, "num_entries", lists.num_entries, 0));
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast(operation, "list_stride", lists.list_stride, lists.num_entries));
  const PositionMap& map = lists.positions;
  if (!map.Ascends() || (lists.num_entries > 0 && map.Position(lists.num_entries - 1) > lists.last_query)) {
    return absl::InvalidArgumentError(absl::StrCat(operation, ": ", lists.num_entries,
                                                   " entries at positions that do not ascend up to ",
                                                   lists.last_query, ": ", ToString(map)));
  }
  return absl::OkStatus();
}

absl::Status CheckPass(const char* operation, int pass) {
  if (pass >= 0 && pass < kSelectionPasses) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(operation, ": pass ", pass, " of ", kSelectionPasses));
}

// Entries of a list for one thread block, so that two waves of them cover all lists.
int64_t StretchEntries(const SelectionLists& lists, const DeviceLimits& limits) {
  const int64_t thread_blocks = int64_t{limits.num_sms} * kThreadBlocksPerSm * 2;
  const int64_t stretches = std::max<int64_t>(1, thread_blocks / std::max<int64_t>(1, lists.num_lists));
  constexpr int64_t kStep = kThreads * kQuad;
  return CeilDiv(CeilDiv(lists.num_entries, stretches), kStep) * kStep;
}

}  // namespace

absl::Status CudaSelectionStart(std::span<const int64_t> budgets, SelectionCut* cuts, cudaStream_t stream) {
  for (size_t l = 0; l < budgets.size(); ++l) {
    LF_RETURN_IF_ERROR(
        cuda::CheckAtLeast("selection start", absl::StrCat("budget of list ", l), budgets[l], 0));
  }
  for (size_t begin = 0; begin < budgets.size(); begin += Budgets::kMost) {
    const size_t count = std::min<size_t>(Budgets::kMost, budgets.size() - begin);
    Budgets some = {};
    std::copy_n(budgets.begin() + static_cast<int64_t>(begin), count, some.of_list);
    LF_RETURN_IF_ERROR(Launch("SelectionStartKernel", SelectionStartKernel, {.block = Budgets::kMost}, stream,
                              some, static_cast<int>(count), cuts + begin));
  }
  return absl::OkStatus();
}

absl::Status CudaSelectionHistogram(const SelectionLists& lists, int pass, const SelectionCut* cuts,
                                    uint64_t* histogram, const DeviceLimits& limits, cudaStream_t stream) {
  LF_RETURN_IF_ERROR(CheckLists("selection histogram", lists));
  LF_RETURN_IF_ERROR(CheckPass("selection histogram", pass));
  if (lists.num_lists == 0) return absl::OkStatus();
  LF_RETURN_IF_CUDA_ERROR(cudaMemsetAsync(
      histogram, 0, static_cast<size_t>(lists.num_lists * kSelectionBins) * sizeof(uint64_t), stream));
  if (lists.num_entries == 0) return absl::OkStatus();
  const int64_t stretch_entries = StretchEntries(lists, limits);
  const int digit_shift = DigitShift(pass);
  return Launch(
      "SelectionHistogramKernel",
      digit_shift >= 32 ? SelectionHistogramKernel<true> : SelectionHistogramKernel<false>,
      {.grid_x = CeilDiv(lists.num_entries, stretch_entries), .grid_y = lists.num_lists, .block = kThreads},
      stream, lists, digit_shift, kSelectionDigitBits[pass], stretch_entries, Aligned(lists), cuts,
      histogram);
}

absl::Status CudaSelectionAdvance(int64_t num_lists, int pass, const uint64_t* histogram, SelectionCut* cuts,
                                  cudaStream_t stream) {
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("selection advance", "num_lists", num_lists, 0));
  LF_RETURN_IF_ERROR(CheckPass("selection advance", pass));
  return Launch("SelectionAdvanceKernel", SelectionAdvanceKernel,
                {.grid_x = num_lists, .block = kAdvanceThreads}, stream, DigitShift(pass),
                kSelectionDigitBits[pass], histogram, cuts);
}

absl::Status CudaSelectionMark(const SelectionLists& lists, const SelectionCut* cuts, uint64_t* bits,
                               int64_t words_per_list, const DeviceLimits& limits, cudaStream_t stream) {
  LF_RETURN_IF_ERROR(CheckLists("selection mark", lists));
  if (lists.num_lists == 0 || lists.num_entries == 0) return absl::OkStatus();
  LF_RETURN_IF_ERROR(
      cuda::CheckAtLeast("selection mark", "words_per_list", words_per_list, lists.last_query / 64 + 1));
  const int64_t stretch_entries = StretchEntries(lists, limits);
  return Launch(
      "SelectionMarkKernel", SelectionMarkKernel,
      {.grid_x = CeilDiv(lists.num_entries, stretch_entries), .grid_y = lists.num_lists, .block = kThreads},
      stream, lists, stretch_entries, Aligned(lists), cuts, bits, words_per_list);
}

}  // namespace longfill
