#ifndef LONGFILL_KERNELS_CUDA_HOPPER_HALF_ROWS_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_HALF_ROWS_CUH_

// The 64 rows of a tile that one consumer warpgroup has: scores, online softmax, values. Each warp has 16 of
// them, each lane two, 8 apart (wgmma.cuh).

#include <cmath>
#include <cstdint>

#include "kernels/cuda/attention/attention_args.h"
#include "kernels/cuda/attention/mma.cuh"
#include "kernels/cuda/attention/tile_rows.cuh"
#include "kernels/cuda/hopper/key_products.cuh"
#include "kernels/cuda/hopper/product_turns.cuh"
#include "kernels/cuda/hopper/slot_reader.cuh"
#include "kernels/cuda/hopper/wgmma.cuh"

namespace longfill::cuda::hopper {

// The row maximum that probabilities are relative to follows the true one when that has grown by this factor,
// as a power of two: sums are fp32 and probabilities have the same relative error at any size, so nothing is
// lost, and the sums so far are seldom rescaled.
inline constexpr float kMaxSlackLog2 = 8;

// 2^x for x below 127 by the units that multiply, where those for exponentials are the limit; 0 for
// -infinity. A polynomial on [-1/2, 1/2] around the nearest integer, with the least largest relative error of
// degree 5, 1.1e-7: sums of it are as good as sums of ex2.approx.
__device__ __forceinline__ float PolynomialExp2(float x) {
  constexpr float kRound = 12582912;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  x = fmaxf(x, -127);                 // whose power comes out as 0
  const float rounded = x + kRound;
  const float rest = x - (rounded - kRound);
  float power = fmaf(0.0013264727F, rest, 0.0096715130F);
  power = fmaf(fmaf(power, rest, 0.0555073359F), rest, 0.2402224243F);
  power = fmaf(fmaf(power, rest, 0.6931470037F), rest, 1);
  return __int_as_float(__float_as_int(power) + (__float_as_int(rounded) << 23));
}

// Which of its 16 keys of a slot each row of a lane sees: bits 0 .. 15 are of its first row, 16 .. 31 of the
// other, 8 rows on; of the two keys of each 8 side by side that the lane has.

// `position` is that of the lane's first row.
__device__ __forceinline__ uint32_t SeenConsecutive(const Slot& slot, int32_t position) {
  // Keys of the lane that are before key i of the slot.
  const int32_t column = attention::Lane() % 4 * 2;
  const auto before = [&](int32_t i) {
    const int32_t key = attention::Clamp(i, 0, kSlotKeys);
    return key / 8 * 2 + attention::Clamp(key % 8 - column, 0, 2);
  };
  uint32_t seen = 0;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int32_t at = position + 8 * row;
    const int32_t begin = before(::max(slot.key_begin, at - slot.max_distance + 1) - slot.first);
    const int32_t end = before(::min(slot.key_end, at - slot.min_distance + 1) - slot.first);
    if (begin < end) seen |= ((1U << end) - (1U << begin)) << (16 * row);
  }
  return seen;
}

// `rows` are of the slot's entries (PackRows), `row` the lane's first in the tile.
__device__ __forceinline__ uint32_t SeenGathered(const uint16_t* rows, int32_t row) {
  uint32_t seen = 0;
#pragma unroll 2
  for (int i = 0; i < kSlotKeys / 8; ++i) {
    const uint32_t rows_of_two = *reinterpret_cast<const uint32_t*>(&rows[8 * i + attention::Lane() % 4 * 2]);
#pragma unroll
    for (int key = 0; key < 2; ++key) {
      const uint32_t from = rows_of_two >> (16 * key) & 0xFF;
      const uint32_t count = (rows_of_two >> (16 * key + 8) & 0xFF) - from;
      if (static_cast<uint32_t>(row) - from < count) seen |= 1U << (2 * i + key);
      if (static_cast<uint32_t>(row + 8) - from < count) seen |= 1U << (16 + 2 * i + key);
    }
  }
  return seen;
}

template <typename Element, typename ShapeOf>
class HalfRows {
 public:
  static constexpr int kHeadDim = ShapeOf::kHeadDim;
  // One of so many exponentials of a lane's 64 goes by the polynomial: at head dim 64 they take as long as
  // the products.
  static constexpr int kOneInPolynomial = kHeadDim == 64 ? 4 : 33;
  using Descriptor = BDescriptor<ShapeOf::kRowBytes>;
  using Reader = SlotReader<ShapeOf>;

  __device__ __forceinline__ HalfRows(const attention::Args& args, SharedMemory<ShapeOf>* shared)
      : args_(args), shared_(*shared) {}

  uint32_t q[kHeadDim / 16][4];
  float out[kHeadDim / 2];
  float row_max[2];  // of the scores, see kMaxSlackLog2
  float row_sum[2];  // this lane's part

  __device__ __forceinline__ void Start() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      row_max[row] = -INFINITY;
      row_sum[row] = 0;
    }
  }

  // All slots of the tile. The products of a pair with V run beside those of the next pair with K and its
  // softmax, if the next is near enough.
  __device__ __forceinline__ void Run(Reader* reader, ProductTurns<ShapeOf>* turns) {
    SlotPair pair = reader->Next();
    while (InAllLanes(pair.first.exists())) {
      reader->WaitForKeys(pair);
      MultiplyKeysOf(*reader, pair);
      WaitForProducts<0>();
      PinScores();
      reader->ReleaseKeys(pair);
      reader->LookAhead();
      Softmax(*reader, pair);
      Rescale();
      PackProbabilities();
      while (true) {
        const SlotPair next = reader->Ahead();
        if (InAllLanes(!next.first.exists())) break;
        reader->Pass();
        reader->WaitFor(next, pair);
        turns->Take();
        MultiplyKeysOf(*reader, next);
        reader->LookAhead();  // while products with K run
        MultiplyValuesOf(*reader, pair);
        WaitForProducts<1>();
        PinScores();
        turns->Give();
        reader->ReleaseKeys(next);
        Softmax(*reader, next);
        WaitForProducts<0>();
        Pin(out);
        Pin(probabilities_);
        reader->ReleaseValues(pair);
        Rescale();
        PackProbabilities();
        pair = next;
      }
      reader->WaitForValues(pair);
      Pin(out);
      Pin(probabilities_);
      StartProducts();
      MultiplyValuesOf(*reader, pair);
      WaitForProducts<0>();
      Pin(out);
      reader->ReleaseValues(pair);
      pair = reader->Next();
    }
  }

 private:
  __device__ __forceinline__ void PinScores() {
    Pin(scores_[0]);
    Pin(scores_[1]);
  }

  // Starts scores = q K^T.
  __device__ __forceinline__ void MultiplyKeysOf(const Reader& reader, const SlotPair& pair) {
    PinScores();
    Pin(out);
    Pin(probabilities_);
    StartProducts();
    MultiplySlotKeys<Element, ShapeOf>(q, reader.k_address(pair.first), scores_[0]);
    MultiplySlotKeys<Element, ShapeOf>(q, reader.k_address(pair.second), scores_[1]);
    EndProducts();
  }
  // Starts out += probabilities V.
  __device__ __forceinline__ void MultiplyValuesOf(const Reader& reader, const SlotPair& pair) {
    MultiplySlotValues<0>(reader.v_address(pair.first));
    MultiplySlotValues<1>(reader.v_address(pair.second));
    EndProducts();
  }
  template <int kPlace>
  __device__ __forceinline__ void MultiplySlotValues(uint32_t v) {
    const uint32_t low = Descriptor::Low(v);
#pragma unroll
    for (int i = 0; i < kSlotKeys / 16; ++i) {
      MultiplyValues<Element>(out, probabilities_[kPlace * kSlotKeys / 16 + i],
                              Descriptor::Of(low + i * 2 * Descriptor::kStride));
    }
  }

  // Scores become probabilities relative to max, which is raised where it must be; factor_ is then what the
  // sums so far have to be multiplied by.
  __device__ __forceinline__ void Softmax(const Reader& reader, const SlotPair& pair) {
    if (pair.any_masked() || !pair.has_two()) {
      Mask(reader, pair.first, false, scores_[0]);
      Mask(reader, pair.second, !pair.has_two(), scores_[1]);
    }
    RaiseMax();
    float base[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      // A row that has seen no key: 0 instead of -inf avoids -inf - -inf, every probability below is 0.
      base[row] = row_max[row] == -INFINITY ? 0 : row_max[row] * args_.scale_log2;
    }
#pragma unroll
    for (int place = 0; place < 2; ++place) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int row = i / 2 % 2;
        const float x = fmaf(scores_[place][i], args_.scale_log2, -base[row]);
        const bool by_polynomial = i % kOneInPolynomial == kOneInPolynomial - 1;
        scores_[place][i] = by_polynomial ? PolynomialExp2(x) : attention::FastExp2(x);
      }
    }
    AddToSums();
  }

  __device__ __forceinline__ void AddToSums() {
    float part[2][2] = {};
#pragma unroll
    for (int i = 0; i < 32; ++i) {
#pragma unroll
      for (int place = 0; place < 2; ++place) part[place][i / 2 % 2] += scores_[place][i];
    }
#pragma unroll
    for (int row = 0; row < 2; ++row)
      row_sum[row] = fmaf(row_sum[row], factor_[row], part[0][row] + part[1][row]);
    ComputeBeforeHere(row_sum[0] + row_sum[1]);  // while products with V run
  }

  // Not if both are -infinity.
  __device__ __forceinline__ bool IsAbove(float largest, float before) const {
    return (largest - before) * args_.scale_log2 > kMaxSlackLog2;
  }
  __device__ __forceinline__ void RaiseMax() {
    float part[2][2];  // of a row in two chains, so that they do not wait for themselves
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      float& most = part[i / 2 % 2][i % 2];
      const float of_both = fmaxf(scores_[0][i], scores_[1][i]);
      most = i < 4 ? of_both : fmaxf(most, of_both);
    }
    const float largest[2] = {fmaxf(part[0][0], part[0][1]), fmaxf(part[1][0], part[1][1])};
    const bool raise = IsAbove(largest[0], row_max[0]) || IsAbove(largest[1], row_max[1]);
    rescale_ = __any_sync(attention::kAllLanes, raise);
    factor_[0] = factor_[1] = 1;
    if (!rescale_) return;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float all = largest[row];  // of the row's four lanes
      all = fmaxf(all, __shfl_xor_sync(attention::kAllLanes, all, 1));
      all = fmaxf(all, __shfl_xor_sync(attention::kAllLanes, all, 2));
      const float raised = IsAbove(all, row_max[row]) ? all : row_max[row];
      if (raised != row_max[row])
        factor_[row] = attention::FastExp2((row_max[row] - raised) * args_.scale_log2);
      row_max[row] = raised;
    }
  }

  __device__ __forceinline__ void Rescale() {
    if (!rescale_) return;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= factor_[i / 2 % 2];
  }

  __device__ __forceinline__ void PackProbabilities() {
#pragma unroll
    for (int place = 0; place < 2; ++place) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        probabilities_[4 * place + i / 4][i % 4] =
            attention::Pack2<Element>(scores_[place][2 * i], scores_[place][2 * i + 1]);
      }
    }
  }

  // Hides the keys of a slot from the rows that do not see them, or from all if the slot is there again.
  __device__ __forceinline__ void Mask(const Reader& reader, SlotRef slot, bool again, float (&scores)[32]) {
    if (InAllLanes(!slot.masked() && !again)) return;
    uint32_t seen = 0;
    if (!again) {
      const Slot& entry = reader.EntryOf(slot);
      seen = slot.gathered() ? SeenGathered(shared_.ring.rows + entry.first, reader.first_row())
                             : SeenConsecutive(entry, reader.first_position() + reader.first_row());
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int bit = i / 2 % 2 * 16 + i / 4 * 2 + i % 2;
      if ((seen & 1U << bit) == 0) scores[i] = -INFINITY;
    }
  }

  const attention::Args& args_;
  SharedMemory<ShapeOf>& shared_;
  float scores_[2][32];           // of the two slots of a pair
  uint32_t probabilities_[8][4];  // as A of the product with V
  float factor_[2];
  bool rescale_ = false;
};

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_HALF_ROWS_CUH_
