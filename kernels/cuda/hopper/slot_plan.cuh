#ifndef LONGFILL_KERNELS_CUDA_HOPPER_SLOT_PLAN_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_SLOT_PLAN_CUH_

// The planner: from the index of a head to the slots of one tile, by one whole warp, without a list for each
// row block. What a half covers is what kernels/sparse/coverage.h defines for its row block; parity coverage
// is not served.
//
// A run is a window of keys of half 0; half 1's is 64 keys later. Slots are cut at multiples of 64 from where
// half 0's window begins (from the diagonal, if the run reaches it), so that both halves of a coarse run of
// whole 64s use whole slots and share all but two. Columns that a half's windows leave out, wholly or in some
// rows, are gathered with the rows that still need them. Stretches of 64 columns that no window touches and
// all rows see are slots of consecutive keys.

#include <cstdint>

#include "kernels/cuda/attention/tile_rows.cuh"
#include "kernels/cuda/hopper/block_windows.cuh"
#include "kernels/cuda/hopper/run_window.cuh"
#include "kernels/cuda/hopper/slot.cuh"
#include "kernels/sparse/index_view.h"

namespace longfill::cuda::hopper {

inline constexpr int32_t kNoColumnDue = INT32_MIN;

// What most steps look at; in registers meanwhile.
struct PlanCursor {
  int32_t next_slot;    // of the windows in the table, or of the stretch
  int32_t next_column;  // in the head's list
  int32_t column_end;   // columns below are due: windows to come do not cover them in any half
  uint32_t gathered;    // entries written to the ring since the thread block began
};

struct PlanState {
  // Ascending keys. The first was in the table before, or is before all keys; those without a run are
  // kNoWindow.
  RunWindow windows[kPlanWindows];
  RunWindow stretch;  // of columns
  IndexView index;
  PlanTile tile;
  PlanCursor cursor;
  int32_t in_stretch;     // 1: slots are those of the stretch
  int32_t num_slots;      // of the windows in the table, or of the stretch
  int32_t next_run;       // runs [0, next_run) are still to come
  int32_t has_before;     // run next_run is in the table
  int32_t has_ranges;     // more runs or key blocks are to come
  int32_t num_columns;    // of the head's list
  BlockLists blocks;      // of a block list
  int64_t covered_pairs;  // of the tile so far
};

class SlotPlanner {
 public:
  __device__ __forceinline__ SlotPlanner(PlanState* state, GatherRing* ring) : state_(*state), ring_(*ring) {
    if (attention::Lane() == 0) state_.cursor.gathered = 0;
    __syncwarp();
  }

  __device__ __forceinline__ void Start(const IndexView& index, const TileRows& tile) {
    const int lane = attention::Lane();
    cursor_ = {0, 0, kNoColumnDue, state_.cursor.gathered};
    __syncwarp();
    if (lane < 2) {
      const uint64_t rows = tile.rows[lane];
      const int32_t row_end = tile.first_row + (lane + 1) * kHalfRows - __clzll(static_cast<long long>(rows));
      state_.tile.half_end[lane] = rows == 0 ? INT32_MIN : min(row_end, tile.key_end);
      state_.tile.num_rows[lane] = __popcll(rows);
    }
    if (lane == 0) {
      state_.index = index;
      state_.tile.rows = tile;
      state_.in_stretch = 0;
      state_.num_slots = 0;
      state_.has_before = 0;
      state_.has_ranges = tile.key_begin < tile.key_end ? 1 : 0;
      state_.covered_pairs = 0;
    }
    __syncwarp();
    if (state_.has_ranges != 0) {
      if (state_.index.form == IndexView::Form::kBlockList) {
        StartBlocks(state_.index, state_.tile, &state_.blocks);
      } else {
        StartRuns();
      }
    }
    StoreCursor();
  }

  __device__ __forceinline__ int32_t Next(Slot* slots) {
    cursor_ = state_.cursor;
    slots_ = slots;
    count_ = 0;
    gathered_slots_ = 0;
    pairs_ = 0;
    bool finished = false;
    while (HasRoom() && !finished) {
      if (cursor_.next_slot < state_.num_slots) {
        AddConsecutive();
      } else if (cursor_.column_end != kNoColumnDue) {
        AddColumns();
      } else if (state_.has_ranges != 0) {
        if (state_.index.form == IndexView::Form::kBlockList) {
          AddBlocks();
        } else {
          NextWindows();
        }
      } else {
        Finish();
        finished = true;
      }
    }
    const int32_t pairs = __reduce_add_sync(attention::kAllLanes, pairs_);
    if (attention::Lane() == 0) state_.covered_pairs += pairs;
    StoreCursor();
    return count_;
  }

  __device__ __forceinline__ int64_t covered_pairs() const { return state_.covered_pairs; }

 private:
  // A step that begins with fewer slots than this has room for what it adds: columns add at most
  // kMostGathered slots, the others stop at the end of the batch.
  static constexpr int kEnoughSlots = 28;
  // 64 columns are gathered at a time; each may need three entries, and what is left of the chunk before is
  // one slot more.
  static constexpr int kMostGathered = 3 + 1;
  static constexpr int kEnoughGathered = kGatherRoomChunks - kMostGathered;
  static_assert(kEnoughSlots + kMostGathered <= kBatchSlots && kEnoughGathered > 0);

  __device__ __forceinline__ bool HasRoom() const {
    return count_ < kEnoughSlots && gathered_slots_ < kEnoughGathered;
  }

  __device__ __forceinline__ void StoreCursor() {
    __syncwarp();
    if (attention::Lane() == 0) state_.cursor = cursor_;
    __syncwarp();
  }

  // ---- Slots of consecutive keys.

  __device__ __forceinline__ void PutSlot(int place, int32_t first, uint32_t used, uint32_t masked,
                                          const RunWindow& window, const HalfKeys& keys) {
    Slot& slot = slots_[place];
    slot.first = first;
    slot.kind = SlotKind::kConsecutive;
    slot.used = static_cast<uint8_t>(used);
    slot.masked = static_cast<uint8_t>(masked);
    slot.min_distance = window.min_distance;
    slot.max_distance = window.max_distance;
    slot.key_begin = keys.begin;
    slot.key_end = keys.end;
  }

  // Adds the lanes' slots in the order of lanes as far as they fit: keys [first, first + 64) of the window,
  // of lanes that have one. Where both halves need a mask and not the same, each has its own slot; those that
  // no half uses are left out. Returns how many lanes are done with.
  __device__ __forceinline__ int32_t AddSlots(bool have, int32_t first, const RunWindow& window) {
    HalfKeys keys = KeysOfHalf(state_.tile, 0, first, window);
    const HalfKeys keys_1 = KeysOfHalf(state_.tile, 1, first, window);
    const uint32_t used = have ? ((keys.used ? 1U : 0U) | (keys_1.used ? 2U : 0U)) & window.halves : 0;
    const uint32_t masked = ((keys.masked ? 1U : 0U) | (keys_1.masked ? 2U : 0U)) & used;
    const bool split = masked == 3 && (keys.begin != keys_1.begin || keys.end != keys_1.end);
    const uint32_t lanes = __ballot_sync(attention::kAllLanes, used != 0);
    const uint32_t splits = __ballot_sync(attention::kAllLanes, split);
    const uint32_t below = attention::LanesBelow(attention::Lane());
    const int place = count_ + __popc(lanes & below) + __popc(splits & below);
    const bool fits = place + (split ? 1 : 0) < kBatchSlots;
    if (used != 0 && fits) {
      if (split) PutSlot(place + 1, first, 2, 2, window, keys_1);
      if (masked == 2) keys = keys_1;
      PutSlot(place, first, split ? 1 : used, split ? 1 : masked, window, keys);
    }
    const uint32_t waiting = __ballot_sync(attention::kAllLanes, used != 0 && !fits);
    const int32_t done = waiting == 0 ? 32 : __ffs(static_cast<int>(waiting)) - 1;
    const uint32_t served = waiting == 0 ? attention::kAllLanes : attention::LanesBelow(done);
    const int32_t begin = count_;
    count_ += __popc(lanes & served) + __popc(splits & served);
    CountPairs(begin);
    return done;
  }

  // The pairs of the batch's slots from `begin` on, all of consecutive keys.
  __device__ __forceinline__ void CountPairs(int32_t begin) {
    __syncwarp();
    const int lane = attention::Lane();
    uint32_t masked = 0;
    if (begin + lane < count_) {
      const Slot& slot = slots_[begin + lane];
      masked = slot.masked;
      const uint32_t whole = slot.used & ~masked;
      pairs_ += kSlotKeys * (((whole & 1) != 0 ? state_.tile.num_rows[0] : 0) +
                             ((whole & 2) != 0 ? state_.tile.num_rows[1] : 0));
    }
    for (uint32_t lanes = __ballot_sync(attention::kAllLanes, masked != 0); lanes != 0; lanes &= lanes - 1) {
      pairs_ += MaskedPairs(state_.tile, slots_[begin + __ffs(static_cast<int>(lanes)) - 1]);
    }
  }

  // Slots of the table, or of the stretch.
  __device__ __forceinline__ void AddConsecutive() {
    const int32_t number = cursor_.next_slot + attention::Lane();
    int32_t place = 0;  // the last window that begins with this slot or before
#pragma unroll
    for (int step = kPlanWindows / 2; step > 0; step /= 2) {
      if (state_.windows[place + step].slots_before <= number) place += step;
    }
    const RunWindow& window = state_.in_stretch != 0 ? state_.stretch : state_.windows[place];
    const int32_t done = AddSlots(number < state_.num_slots,
                                  window.first_slot + (number - window.slots_before) * kSlotKeys, window);
    cursor_.next_slot += done;
  }

  // ---- Runs.

  __device__ __forceinline__ void StartRuns() {
    const IndexView& index = state_.index;
    const int32_t num_columns = index.counts->columns;
    cursor_.next_column = attention::CountBelow(num_columns, state_.tile.rows.key_begin,
                                                [&](int32_t i) { return index.columns[i]; });
    // Runs that half 1 has keys of.
    const int64_t distance_end = int64_t{state_.tile.rows.first_row} + kTileRows - state_.tile.rows.key_begin;
    const int32_t num_runs = attention::CountBelow(index.counts->runs, distance_end,
                                                   [&](int32_t i) { return index.runs[i].d_lo; });
    if (attention::Lane() == 0) {
      state_.num_columns = num_columns;
      state_.next_run = num_runs;
    }
  }

  // The next 31 runs, the one of the largest distances first, into the table, after the last one of the batch
  // before: half 1 still has keys of that among the columns to come.
  __device__ __forceinline__ void NextWindows() {
    const int lane = attention::Lane();
    const TileRows& tile = state_.tile.rows;
    const int32_t left = state_.next_run;
    RunWindow window = {kNoWindow, kNoWindow, 0, attention::kAnyDistance, 3, 0, 0};
    if (lane == 0) window.begin = window.end = INT32_MIN;
    int32_t slots = 0;
    if (lane <= left && lane + state_.has_before > 0) {
      window = WindowOf(state_.tile.rows, state_.index.runs[left - lane]);
      if (lane > 0) slots = PlaceSlots(state_.tile, &window);
    }
    const int32_t slots_through = attention::InclusiveSum(slots);
    window.slots_before = slots_through - slots;
    __syncwarp();
    state_.windows[lane] = window;
    if (lane == kPlanWindows - 1) state_.num_slots = slots_through;
    __syncwarp();
    const RunWindow& last = state_.windows[kPlanWindows - 1];
    // Windows without a run count as beyond the keys.
    const bool has_more = left >= kPlanWindows && last.begin < tile.key_end;
    cursor_.next_slot = 0;
    cursor_.column_end = has_more ? min(last.end, tile.key_end) : tile.key_end;
    if (cursor_.next_column >= state_.num_columns) cursor_.column_end = kNoColumnDue;
    if (lane == 0) {
      state_.in_stretch = 0;
      state_.has_ranges = has_more ? 1 : 0;
      state_.next_run = left - (kPlanWindows - 1);
      state_.has_before = 1;
    }
    __syncwarp();
  }

  __device__ __forceinline__ void AddBlocks() {
    const int32_t num_slots = NextBlocks(&state_.blocks, state_.windows);
    cursor_.next_slot = 0;
    if (attention::Lane() == 0) {
      state_.num_slots = num_slots;
      state_.has_ranges = state_.blocks.left[0] > 0 || state_.blocks.left[1] > 0 ? 1 : 0;
    }
    __syncwarp();
  }

  // ---- Columns.

  // The lane's two of the next 64 columns.
  struct Columns {
    int32_t keys[2];
  };
  // From the column at `place` on; INT32_MAX beyond the last.
  __device__ __forceinline__ Columns ColumnsAt(int32_t place) const {
    place += attention::Lane();
    const int32_t* columns = state_.index.columns + place;
    const int32_t left = state_.num_columns - place;
    return {{left > 0 ? columns[0] : INT32_MAX, left > 32 ? columns[32] : INT32_MAX}};
  }

  // Columns that are due: a stretch, or as many as the batch has room for.
  __device__ __forceinline__ void AddColumns() {
    Columns columns = ColumnsAt(cursor_.next_column);
    const int32_t last_of_slot = (attention::Lane() + 1) * kSlotKeys - 1;
    const bool exists = last_of_slot < state_.num_columns - cursor_.next_column;
    const int32_t last_key = exists ? state_.index.columns[cursor_.next_column + last_of_slot] : -1;
    const int32_t first = __shfl_sync(attention::kAllLanes, columns.keys[0], 0);
    if (first >= cursor_.column_end) {
      cursor_.column_end = kNoColumnDue;
      return;
    }
    // Columns ascend and are unique, so the lanes that find consecutive keys up to theirs are the first ones.
    const uint32_t stretch = __ballot_sync(attention::kAllLanes, last_key - first == last_of_slot);
    if (stretch != 0 && StartStretch(first, __popc(stretch))) return;
    while (HasRoom()) {
      const Columns next = ColumnsAt(cursor_.next_column + 64);
      const int32_t num_due = AllRowsNeed(columns) ? GatherWhole(columns) : GatherDue(columns);
      cursor_.next_column += num_due;
      if (num_due < 64) {
        cursor_.column_end = kNoColumnDue;
        break;
      }
      columns = next;
    }
  }

  // The consecutive columns from `first` on, as far as no window touches them and all rows see them, become
  // slots. False if there are none.
  __device__ __forceinline__ bool StartStretch(int32_t first, int32_t slots) {
    const int lane = attention::Lane();
    const RunWindow& window = state_.windows[lane];
    const int32_t next_window = window.end > first - kHalfRows ? window.begin : kNoWindow;
    const int32_t limit = min(__reduce_min_sync(attention::kAllLanes, next_window),
                              min(cursor_.column_end, state_.tile.rows.first_row + 1));
    if (limit < first + kSlotKeys) return false;
    slots = min(slots, (limit - first) / kSlotKeys);
    cursor_.next_slot = 0;
    cursor_.next_column += slots * kSlotKeys;
    if (lane == 0) {
      state_.stretch = AllKeys();
      state_.stretch.first_slot = first;
      state_.in_stretch = 1;
      state_.num_slots = slots;
    }
    __syncwarp();
    return true;
  }

  // Whether all of the columns are due, no window is near them and all rows see them.
  __device__ __forceinline__ bool AllRowsNeed(const Columns& columns) const {
    const int32_t first = __shfl_sync(attention::kAllLanes, columns.keys[0], 0);
    const int32_t last = __shfl_sync(attention::kAllLanes, columns.keys[1], 31);
    const RunWindow& window = state_.windows[attention::Lane()];
    const bool is_near = window.begin <= last && window.end > first - kHalfRows;
    return !__any_sync(attention::kAllLanes, is_near) && last < cursor_.column_end &&
           last <= state_.tile.rows.first_row;
  }

  // All 64, for all rows; returns 64.
  __device__ __forceinline__ int32_t GatherWhole(const Columns& columns) {
    const int lane = attention::Lane();
    const uint16_t rows = attention::PackRows(0, kTileRows);
    PutGathered(lane, columns.keys[0], rows);
    PutGathered(lane + 32, columns.keys[1], rows);
    pairs_ += 2 * (state_.tile.num_rows[0] + state_.tile.num_rows[1]);
    cursor_.gathered += kSlotKeys;
    AddGathered(cursor_.gathered / kSlotKeys - 1);
    return kSlotKeys;
  }

  // Windows that hold a key, places in the table. A half has at most one for a key.
  struct WindowsOfKey {
    int place[2];
    bool inside[2];
  };

  // Gathers those of the columns that are due; returns how many are.
  __device__ __forceinline__ int32_t GatherDue(const Columns& columns) {
    int place[2] = {0, 0};  // the last window that begins at or before the key
#pragma unroll
    for (int step = kPlanWindows / 2; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (state_.windows[place[i] + step].begin <= columns.keys[i]) place[i] += step;
      }
    }
    int32_t num_due = 0;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const int32_t key = i == 0 ? columns.keys[0] : columns.keys[1];
      const int here = i == 0 ? place[0] : place[1];
      const bool due = key < cursor_.column_end;
      num_due += __popc(__ballot_sync(attention::kAllLanes, due));
      const int32_t relative = key - kHalfRows;  // windows are at least 64 keys long
      WindowsOfKey windows;
      windows.place[0] = here;
      windows.place[1] = state_.windows[here].begin > relative ? here - 1 : here;
      windows.inside[0] = key < state_.windows[here].end;
      windows.inside[1] = relative < state_.windows[windows.place[1]].end;
      AddColumn(due, key, windows);
    }
    return num_due;
  }

  __device__ __forceinline__ void AddColumn(bool due, int32_t key, const WindowsOfKey& windows) {
    bool simple = key <= state_.tile.rows.first_row;  // all rows of a half need it or none
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (windows.inside[half]) simple = simple && !IsExact(state_.windows[windows.place[half]]);
    }
    if (__any_sync(attention::kAllLanes, due && !simple)) {
      AddSplitColumn(due, key, windows);
      return;
    }
    const int32_t pairs =
        (windows.inside[0] ? 0 : state_.tile.num_rows[0]) + (windows.inside[1] ? 0 : state_.tile.num_rows[1]);
    Gather(due ? pairs : 0, key, windows.inside[0] ? kHalfRows : 0,
           windows.inside[1] ? kHalfRows : kTileRows);
  }

  // Gathers a key for the rows that see it in no window: before, between and after the rows of half 0 and
  // those of half 1 that do.
  __device__ __forceinline__ void AddSplitColumn(bool due, int32_t key, const WindowsOfKey& windows) {
    const int32_t causal = attention::Clamp(key - state_.tile.rows.first_row, 0, kTileRows);
    int32_t from[3] = {causal, causal, kTileRows};
    int32_t to[3] = {causal, kTileRows, kTileRows};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!windows.inside[half]) continue;
      const RunWindow& window = state_.windows[windows.place[half]];
      const uint32_t rows =
          attention::RowsOfKey(state_.tile.rows, key, window.min_distance, window.max_distance);
      to[half] = attention::Clamp(rows & 0xFF, half * kHalfRows, (half + 1) * kHalfRows);
      from[half + 1] = attention::Clamp(rows >> 8, half * kHalfRows, (half + 1) * kHalfRows);
    }
#pragma unroll 1
    for (int part = 0; part < 3; ++part) {
      const int32_t first = part == 0 ? from[0] : part == 1 ? from[1] : from[2];
      const int32_t end = part == 0 ? to[0] : part == 1 ? to[1] : to[2];
      Gather(due ? RowsBetween(state_.tile.rows, first, end) : 0, key, first, end);
    }
  }

  // Appends the lanes' keys, each for the rows [from, to), where these have pairs.
  __device__ __forceinline__ void Gather(int32_t pairs, int32_t key, int32_t from, int32_t to) {
    pairs_ += pairs;
    const uint32_t lanes = __ballot_sync(attention::kAllLanes, pairs > 0);
    if (lanes == 0) return;
    if (pairs > 0) {
      const int lane = attention::Lane();
      PutGathered(__popc(lanes & attention::LanesBelow(lane)), key, attention::PackRows(from, to));
    }
    const uint32_t before = cursor_.gathered;
    cursor_.gathered += __popc(lanes);
    if (before / kSlotKeys != cursor_.gathered / kSlotKeys) AddGathered(before / kSlotKeys);
  }

  __device__ __forceinline__ void PutGathered(int offset, int32_t key, uint16_t rows) {
    const uint32_t place = (cursor_.gathered + offset) % kGatherCapacity;
    ring_.keys[place] = key;
    ring_.rows[place] = rows;
  }

  // The slot of a chunk of the ring that is full.
  __device__ __forceinline__ void AddGathered(uint32_t chunk) {
    __syncwarp();
    const int lane = attention::Lane();
    const uint32_t first = chunk % kGatherChunks * kSlotKeys;
    const uint32_t two = *reinterpret_cast<const uint32_t*>(&ring_.rows[first + 2 * lane]);
    uint32_t halves = 3;  // bits 0 and 1: used, bits 2 and 3: masked
    if (__any_sync(attention::kAllLanes, two != (kTileRows << 8 | uint32_t{kTileRows} << 24))) {
      halves = __reduce_or_sync(attention::kAllLanes, HalvesOfEntry(two & 0xFFFF) | HalvesOfEntry(two >> 16));
    }
    uint32_t used = halves & 3;
    if (state_.tile.num_rows[0] == 0) used &= 2;
    if (state_.tile.num_rows[1] == 0) used &= 1;
    if (lane == 0) {
      Slot& slot = slots_[count_];
      slot.first = static_cast<int32_t>(first);
      slot.kind = SlotKind::kGathered;
      slot.used = static_cast<uint8_t>(used);
      slot.masked = static_cast<uint8_t>(halves >> 2 & used);
    }
    ++count_;
    ++gathered_slots_;
  }

  // What is left of the columns, padded, and the end.
  __device__ __forceinline__ void Finish() {
    const int lane = attention::Lane();
    const int pads = static_cast<int>(-cursor_.gathered % kSlotKeys);
    if (pads > 0) {
      for (int i = lane; i < pads; i += 32) PutGathered(i, attention::kNoKey, attention::kNoRows);
      cursor_.gathered += pads;
      AddGathered(cursor_.gathered / kSlotKeys - 1);
    }
    if (lane == 0) {
      slots_[count_].kind = SlotKind::kEnd;
      slots_[count_].used = 0;
    }
    ++count_;
  }

  PlanState& state_;
  GatherRing& ring_;
  PlanCursor cursor_;
  Slot* slots_ = nullptr;
  int32_t count_ = 0;           // slots in the batch
  int32_t gathered_slots_ = 0;  // among them
  int32_t pairs_ = 0;           // of this lane in the batch
};

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_SLOT_PLAN_CUH_
