#ifndef LONGFILL_KERNELS_CUDA_HOPPER_INDEX_SHARE_CONSUMER_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_INDEX_SHARE_CONSUMER_CUH_

// A warpgroup of selection by share that has the 64 rows of a row block. Of two stages the products of the
// second run beside the maximum of the first; the other two warpgroups fill the rest.

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/hopper/index/e4m3_queries.cuh"
#include "kernels/cuda/hopper/index/score_list.cuh"
#include "kernels/cuda/hopper/index/share_memory.cuh"
#include "kernels/cuda/hopper/key_products.cuh"
#include "kernels/cuda/hopper/row_pieces.cuh"
#include "kernels/cuda/hopper/wgmma.cuh"

namespace longfill::cuda::hopper::share {

// Element is that of queries, ShapeOf what they are multiplied with.
template <typename Element, typename ShapeOf>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const ShareSelectionArgs& args, int row_block, Memory<ShapeOf>* memory)
      : args_(args),
        tile_(memory->tile),
        memory_(*memory),
        row_block_(row_block),
        thread_(static_cast<int>(threadIdx.x) % kWarpgroupThreads),
        rows_(args.scale_log2, args.share_log2[memory->tile.head()],
              memory->tile.num_rows() - FirstRowOfWarp()) {}

  __device__ __forceinline__ void Run() {
    LoadQueries();
    ClearBits();
    if (args_.num_samples > 0) TakeOwnKeys();
    Sweep();
    Judge();
    SyncWarpgroup(row_block_);  // nobody changes bits from here on
    if (thread_ == 0 && tile_.Exists(row_block_)) tile_.SetForcedBlocks(args_, row_block_);
  }

 private:
  using Ring = typename Memory<ShapeOf>::Ring;
  static constexpr int kStages = Memory<ShapeOf>::kStages;
  static constexpr bool kFp8 = Memory<ShapeOf>::kFp8;

  __device__ __forceinline__ static int FirstRowOfWarp() { return attention::Thread() / 32 * 16; }
  __device__ __forceinline__ ScoreEntry* entries() const { return memory_.entries[attention::Thread() / 32]; }

  __device__ __forceinline__ void LoadQueries() {
    const char* q = static_cast<const char*>(args_.q) +
                    2 * (tile_.head() * args_.q_head_stride + tile_.first_row() * args_.q_row_stride);
    if constexpr (kFp8) {
      E4m3Queries<Element, ShapeOf> queries;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = RowOf(half);
        queries.Load(q + 2 * row * args_.q_row_stride, row < tile_.num_rows(), half);
      }
      const E4m3Scale scale = E4m3Scale::Of(LargestOfRowBlock(queries.Largest()));
      queries.Round(scale.scale, &q_);
      rows_.ScaleBy(scale.inverse);
      scaled_bonus_ = args_.sample_bonus * scale.scale;
    } else {
      const int row[2] = {RowOf(0), RowOf(1)};
      LoadQueryRows({q + 2 * row[0] * args_.q_row_stride, q + 2 * row[1] * args_.q_row_stride},
                    {row[0] < tile_.num_rows(), row[1] < tile_.num_rows()}, &q_);
    }
  }
  __device__ __forceinline__ float LargestOfRowBlock(float largest) {
    largest = share_selection::WarpMax(largest);
    float* const of_warps = memory_.largest_query + 4 * row_block_;
    if (attention::Lane() == 0) of_warps[thread_ / 32] = largest;
    SyncWarpgroup(row_block_);
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = fmaxf(largest, of_warps[i]);
    return largest;
  }

  __device__ __forceinline__ void ClearBits() {
    if (tile_.Exists(row_block_)) {
      uint64_t* const bits = tile_.BitsOf(args_, row_block_);
      for (int64_t w = thread_; w < args_.words_per_row; w += kWarpgroupThreads) bits[w] = 0;
    }
    SyncWarpgroup(row_block_);
  }

  // The next stage when it is there; each is given back once.
  __device__ __forceinline__ uint32_t Take(Ring* ring, RingPlace<kStages>* place) {
    const uint32_t taken = place->place;
    Wait(&ring->full[taken], place->parity);
    place->Next();
    return taken;
  }
  __device__ __forceinline__ void GiveBack(Ring* ring, uint32_t stage) { ArriveAsWarp(&ring->empty[stage]); }

  // Starts products = q stage^T, a group.
  __device__ __forceinline__ void Multiply(uint32_t stage, float (&products)[32]) {
    using Factor = std::conditional_t<kFp8, E4m3, Element>;
    MultiplySlotKeys<Factor, ShapeOf>(q_, SharedAddress(memory_.stages[stage]), products);
    EndProducts();
  }
  __device__ __forceinline__ void RaiseScores(const float (&products)[32]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      float& score = rows_.scores[0][i / 4][i % 4];
      score = fmaxf(score, products[i]);
    }
  }
  // The first stage of a chunk gives all scores.
  __device__ __forceinline__ void MultiplyFirst(Ring* ring, RingPlace<kStages>* place) {
    float(&scores)[32] = reinterpret_cast<float(&)[32]>(rows_.scores);
    const uint32_t stage = Take(ring, place);
    if (ring == &memory_.gathered) FenceSharedForAsync();
    Pin(scores);
    StartProducts();
    Multiply(stage, scores);
    WaitForProducts<0>();
    Pin(scores);
    GiveBack(ring, stage);
  }
  // Later ones raise them. Before products start no value is given to what they are written to, so that none
  // is kept in registers for it.
  __device__ __forceinline__ void MultiplyStages(int count, Ring* ring, RingPlace<kStages>* place) {
    for (; InAllLanes(count > 1); count -= 2) {
      // Both are waited for before products start: a wait between them would make the compiler end the first.
      const uint32_t first = Take(ring, place);
      const uint32_t second = Take(ring, place);
      if (ring == &memory_.gathered) FenceSharedForAsync();
      float products[2][32];
      StartProducts();
      Multiply(first, products[0]);
      Multiply(second, products[1]);
      WaitForProducts<1>();
      Pin(products[0]);
      RaiseScores(products[0]);
      WaitForProducts<0>();
      Pin(products[1]);
      GiveBack(ring, first);
      GiveBack(ring, second);
      RaiseScores(products[1]);
    }
    if (InAllLanes(count != 1)) return;
    const uint32_t stage = Take(ring, place);
    if (ring == &memory_.gathered) FenceSharedForAsync();
    float products[32];
    StartProducts();
    Multiply(stage, products);
    WaitForProducts<0>();
    Pin(products);
    GiveBack(ring, stage);
    RaiseScores(products);
  }
  // Scores of 64 blocks, of which each representative is a stage.
  template <int kCount>
  __device__ __forceinline__ void ScoreBlocks(Ring* ring, RingPlace<kStages>* place,
                                              const BlockScales<kFp8, kCount>& scales, uint32_t number) {
    MultiplyFirst(ring, place);
    int others = args_.num_representatives - 1;
    if (args_.num_samples > 0) {
      MultiplyStages(args_.num_samples - 1, ring, place);
      others -= args_.num_samples - 1;
      if constexpr (kFp8) {
        ForEachScore(scales.of_block[number],
                     [&](float score, float scale) { return fmaf(scaled_bonus_, Inverse(scale), score); });
      } else {
#pragma unroll
        for (int i = 0; i < 32; ++i) rows_.scores[0][i / 4][i % 4] += args_.sample_bonus;
      }
    }
    MultiplyStages(others, ring, place);
    if constexpr (kFp8)
      ForEachScore(scales.of_block[number], [](float score, float scale) { return score * scale; });
  }
  // Of a power of two.
  __device__ __forceinline__ static float Inverse(float scale) {
    return __uint_as_float((254U << 23) - __float_as_uint(scale));
  }
  // score = change(score, scale of its block)
  template <typename Change>
  __device__ __forceinline__ void ForEachScore(const float (&scales)[kChunkBlocks], const Change& change) {
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
      const float2 of_columns = *reinterpret_cast<const float2*>(scales + 8 * n + attention::Lane() % 4 * 2);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& score = rows_.scores[0][n][e];
        score = change(score, e % 2 == 0 ? of_columns.x : of_columns.y);
      }
    }
  }
  __device__ __forceinline__ void Skip(int count, Ring* ring, RingPlace<kStages>* place) {
    for (; count > 0; --count) GiveBack(ring, Take(ring, place));
  }

  // The keys of the row block itself, into the sums of its rows.
  __device__ __forceinline__ void TakeOwnKeys() {
    for (int i = 0; i < kRowBlocks; ++i) {
      if (InAllLanes(i != row_block_)) {
        Skip(1, &memory_.chunks, &place_);
        continue;
      }
      MultiplyFirst(&memory_.chunks, &place_);
      if constexpr (kFp8) {
        const float scale = tile_.Exists(i) ? args_.own_scales[tile_.first_row() / kRowBlock + i] : 0;
#pragma unroll
        for (int j = 0; j < 32; ++j) rows_.scores[0][j / 4][j % 4] *= scale;
      }
      rows_.MaskLater(FirstRowOfWarp() % int{kRowBlock});
      rows_.Accumulate();
    }
  }

  // From the nearest chunk to the first, since most rows give near blocks much of their share: their
  // thresholds are close to the last ones soon.
  __device__ __forceinline__ void Sweep() {
    const int32_t blocks_before = tile_.BlocksBefore(row_block_);
    for (RingPlace<Memory<ShapeOf>::kChunks> chunk;; chunk.Next()) {
      Wait(&memory_.chunks.full[place_.place], place_.parity);
      const Eight(&eights)[kEights] = memory_.eights[chunk.place];
      if (InAllLanes(eights[0].number_and_open == kNoMore.number_and_open)) break;
      const uint32_t open = OpenOf(eights);
      if (InAllLanes(open == 0)) {
        Skip(args_.num_representatives, &memory_.chunks, &place_);
        continue;
      }
      ScoreBlocks(&memory_.chunks, &place_, memory_.chunk_scales, chunk.place);
      if (open != 0xFF || eights[kEights - 1].first_block() + 8 > blocks_before) {
        rows_.Mask([&](int n) { return (open >> n & 1) != 0 ? blocks_before - eights[n].first_block() : 0; });
      }
      rows_.Accumulate();
      if (!rows_.HasCandidates()) continue;
      SetThresholds();
      if (rows_.HasCandidates()) NoteCandidates(eights);
    }
    SetThresholds();  // of all blocks
    if (args_.sums != nullptr) StoreSums();
  }
  // Bit n: the n-th eight is open to the row block.
  __device__ __forceinline__ uint32_t OpenOf(const Eight (&eights)[kEights]) const {
    const int lane = attention::Lane();
    return __ballot_sync(attention::kAllLanes, lane < kEights && eights[lane].IsOpen(row_block_));
  }
  __device__ __forceinline__ static int RowOf(int half) {
    return FirstRowOfWarp() + attention::Lane() / 4 + 8 * half;
  }
  __device__ __forceinline__ void SetThresholds() {
    rows_.SetThresholds([&](int, int half) { return tile_.CoarseSum(args_, RowOf(half)); });
  }
  __device__ __forceinline__ void StoreSums() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = rows_.LogSum(0, half);
      if (attention::Lane() % 4 == 0) tile_.StoreSum(args_, RowOf(half), sum);
    }
  }

  __device__ __forceinline__ void NoteCandidates(const Eight (&eights)[kEights]) {
    if (!spilled_ && list_.Add(rows_, eights, entries())) return;
    if (!spilled_) MarkListed(share_selection::kCandidateSlack);
    spilled_ = true;
    const uint64_t votes = rows_.Votes(share_selection::kCandidateSlack);
    const int lane = attention::Lane();
    const uint64_t of_eight = lane < kEights ? votes >> (8 * lane) & 0xFF : 0;
    if (of_eight == 0) return;
    const int32_t number = eights[lane].number();
    tile_.SetBlocks(args_, row_block_, number / 8, of_eight << (number % 8 * 8));
  }
  __device__ __forceinline__ void MarkListed(float slack) {
    list_.ForEach(rows_, slack, entries(), [&](int32_t block) { tile_.SetBlock(args_, row_block_, block); });
  }

  __device__ __forceinline__ void Judge() {
    if (spilled_) memory_.spilled = 1;  // whoever writes, writes the same
    SyncConsumers();
    const bool spilled = InAllLanes(memory_.spilled != 0);
    // A warp that has spilled has marked its list.
    if (!spilled_) MarkListed(spilled ? share_selection::kCandidateSlack : 0);
    ArriveAsWarp(&memory_.marked);
    if (spilled) ClearOthers();
  }

  __device__ __forceinline__ void ClearOthers() {
    RingPlace<kStages> place;
    for (int32_t n = 0;; ++n) {
      const int32_t list = PlaceOf<kLists>(n);
      Wait(&memory_.list_full[list], FullParity<kLists>(n));
      const int size = memory_.list_size[list];
      if (InAllLanes(size == 0)) return;
      ScoreBlocks(&memory_.gathered, &place, memory_.list_scales, static_cast<uint32_t>(list));
      // Blocks that the rows do not see may get votes; their bits are not set, so nothing clears them.
      const uint64_t votes = rows_.Votes();
      uint64_t* const votes_of_row_block = memory_.votes[n % 2] + 4 * row_block_;
      if (attention::Lane() == 0) votes_of_row_block[thread_ / 32] = votes;
      SyncWarpgroup(row_block_);
      if (thread_ < size && tile_.Exists(row_block_)) {
        uint64_t all = 0;
        for (int i = 0; i < 4; ++i) all |= votes_of_row_block[i];
        if ((all >> thread_ & 1) == 0) tile_.ClearBlock(args_, row_block_, memory_.lists[list][thread_]);
      }
      ArriveAsWarp(&memory_.list_empty[list]);
    }
  }

  const ShareSelectionArgs& args_;
  const Tile& tile_;
  Memory<ShapeOf>& memory_;
  const int row_block_;       // of the tile
  const int thread_;          // of the warpgroup
  RingPlace<kStages> place_;  // of the first sweep
  uint32_t q_[ShapeOf::kSteps][4];
  float scaled_bonus_ = 0;  // as queries are
  share_selection::RowScores<1> rows_;
  ScoreList list_;
  bool spilled_ = false;  // this warp
};

}  // namespace longfill::cuda::hopper::share

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_INDEX_SHARE_CONSUMER_CUH_
