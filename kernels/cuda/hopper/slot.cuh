#ifndef LONGFILL_KERNELS_CUDA_HOPPER_SLOT_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_SLOT_CUH_

// What a tile has to multiply, as slots of 64 keys: the seam between the planner (slot_plan.cuh), which makes
// them from the index of a head, the loaders, which bring their rows of K and V, and the two halves of the
// tile, which multiply those that are theirs.
//
// A tile is 128 query rows, half h being rows [64 h, 64 h + 64) from its first position. Slots come in any
// order; a half multiplies its own in that order, two at a time, so the order decides the rounding and must
// be a function of the index and the tile alone.

#include <cstdint>

namespace longfill::cuda::hopper {

inline constexpr int kTileRows = 128;
inline constexpr int kHalfRows = 64;
inline constexpr int kSlotKeys = 64;

enum class SlotKind : uint8_t {
  kConsecutive,  // keys [first, first + 64)
  kGathered,     // entries [first, first + 64) of the gather ring
  kEnd,          // the tile has no more; nothing else is set
  kStop,         // the thread block has no more; not from the planner
};

struct alignas(16) Slot {
  // A key position, which may lie outside of the keys given (rows read as zeros), or a place in the gather
  // ring, which is a multiple of 64.
  int32_t first;
  SlotKind kind;
  // Bit h: half h multiplies it, and not all of its rows see all 64 keys. `used` is not 0 but in kEnd:
  // barriers count on it.
  uint8_t used;
  uint8_t masked;
  uint8_t unused;
  // Of a consecutive slot, for the halves in `masked`: the row at position p sees key k iff
  //   min_distance <= p - k < max_distance  and  key_begin <= k < key_end.
  // max_distance may be INT32_MAX, min_distance is at least 0.
  int32_t min_distance;
  int32_t max_distance;
  int32_t key_begin;
  int32_t key_end;
  int32_t padding[2];

  // kind, used and masked as one word: the kind in the low bits, then from these bits on `used` and `masked`.
  static constexpr int kUsedShift = 8;
  static constexpr int kMaskedShift = 16;
  __device__ __forceinline__ uint32_t Facts() const { return reinterpret_cast<const uint32_t*>(this)[1]; }
  static __device__ __forceinline__ SlotKind KindOf(uint32_t facts) {
    return static_cast<SlotKind>(facts & 0xFF);
  }
  static __device__ __forceinline__ uint32_t UsedOf(uint32_t facts) { return facts >> kUsedShift & 3; }
};
static_assert(sizeof(Slot) == 32);

// Keys of gathered slots and the rows of the tile that see them. An entry's rows are PackRows(from, to) of
// kernels/cuda/attention/key_queue.cuh with to <= 128, or kNoRows at kNoKey; they count for the halves in
// `masked`. A ring of chunks of 64 entries, each of which becomes one gathered slot.
inline constexpr int kGatherCapacity = 1024;
inline constexpr int kGatherChunks = kGatherCapacity / kSlotKeys;
struct GatherRing {
  alignas(16) int32_t keys[kGatherCapacity];
  alignas(4) uint16_t rows[kGatherCapacity];
};

// Slots go from the planner to the loaders and the pairing warp in batches.
inline constexpr int kBatchSlots = 32;
struct SlotBatch {
  Slot slots[kBatchSlots];
  int32_t count;
};

// What slot_plan.cuh offers. All functions are for one whole warp; every lane gets the same results. They
// wait for nothing.
//
//   struct PlanState;  // memory of the planner in shared memory, at most 4 KB, no constructor
//
//   class SlotPlanner {
//    public:
//     // Once in the life of a thread block.
//     SlotPlanner(PlanState* state, GatherRing* ring);
//     // Begins a tile. `index` (global memory) and `tile` (shared memory) stay until its kEnd. A tile whose
//     // key range is empty has kEnd alone.
//     void Start(const IndexView& index, const attention::Tile<kTileRows>& tile);
//     // The next 1 to kBatchSlots slots of the tile; returns how many. The tile's last slot is kEnd, after
//     // which Start is called for the next.
//     int32_t Next(Slot* slots);
//     // Of the whole tile, once Next has given kEnd. Rows that are not given do not count.
//     int64_t covered_pairs() const;
//   };
//
// Back-pressure of the gather ring. With g gathered slots given since the start of the thread block, a call
// of Next may write to chunks g, g + 1, .. g + kGatherRoomChunks - 1 (modulo kGatherChunks) and to no other;
// it gives a gathered slot for each chunk that it fills, so that at most one chunk is partly filled between
// calls. The last chunk of a tile is padded with kNoKey, so that the next tile begins with a new one. The
// caller waits for the room before the call.
inline constexpr int kGatherRoomChunks = 8;

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_SLOT_CUH_
