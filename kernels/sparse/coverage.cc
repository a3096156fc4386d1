#include "kernels/sparse/coverage.h"

#include <algorithm>

#include "kernels/base/status.h"

namespace longfill {
namespace {

// From here on a stretch of consecutive columns is cheaper as a range than gathered one by one.
constexpr int64_t kMinColumnStretch = kRowBlock;

// The rows and the end of the keys of one tile. last_row does not depend on the prompt's end, so that a row
// block's ranges are the same for every prompt that holds them.
struct Tile {
  int64_t first_row = 0;
  int64_t last_row = 0;
  int64_t key_end = 0;
};

Tile TileOf(int64_t row_block, int64_t num_tokens) {
  LF_CHECK(row_block >= 0 && row_block * kRowBlock < num_tokens);
  const int64_t first = row_block * kRowBlock;
  return {first, first + kRowBlock - 1, std::min(first + kRowBlock, num_tokens)};
}

// Distances of the causal pairs of a range of keys; limits outside of them limit nothing and are dropped.
KeyRange WithoutIdleLimits(KeyRange range, const Tile& tile) {
  if (range.max_distance > tile.last_row - range.begin) range.max_distance = kNoMaxDistance;
  if (range.min_distance <= std::max<int64_t>(0, tile.first_row - (range.end - 1))) range.min_distance = 0;
  return range;
}

bool AllCausal(const KeyRange& range) {
  return range.min_distance == 0 && range.max_distance == kNoMaxDistance;
}

// First index >= from with values[index] >= value. Doubling steps: the cost is the log of the way, not of the
// list.
size_t GallopUp(std::span<const int32_t> values, size_t from, int64_t value) {
  size_t step = 1;
  size_t low = from;
  while (low + step <= values.size() && values[low + step - 1] < value) {
    low += step;
    step *= 2;
  }
  const auto first = values.begin() + low;
  const auto last = values.begin() + std::min(values.size(), low + step);
  return std::lower_bound(first, last, value) - values.begin();
}

// Number of leading entries below `value`, given that at most `count` are.
size_t GallopDown(std::span<const int32_t> values, size_t count, int64_t value) {
  size_t step = 1;
  size_t high = count;
  while (high >= step && values[high - step] >= value) {
    high -= step;
    step *= 2;
  }
  const auto first = values.begin() + (high >= step ? high - step : 0);
  return std::lower_bound(first, values.begin() + high, value) - values.begin();
}

// End of the stretch of consecutive positions that starts at values[from]; unique and ascending is what makes
// the test at one place enough.
size_t StretchEnd(std::span<const int32_t> values, size_t from) {
  const int64_t base = static_cast<int64_t>(values[from]) - static_cast<int64_t>(from);
  const auto consecutive = [&](size_t i) { return values[i] - static_cast<int64_t>(i) == base; };
  size_t low = from;  // known to be in the stretch
  size_t step = 1;
  while (low + step < values.size() && consecutive(low + step)) {
    low += step;
    step *= 2;
  }
  size_t high = std::min(values.size(), low + step);  // known to be outside
  while (high - low > 1) {
    const size_t middle = low + (high - low) / 2;
    (consecutive(middle) ? low : high) = middle;
  }
  return high;
}

// Pairs of rows [row_begin, row_end) and keys [begin, end) with row - key >= distance: a key at least
// `distance` before row_begin has all rows, the ones after it one row less each.
int64_t PairsAtLeast(int64_t distance, int64_t begin, int64_t end, int64_t row_begin, int64_t row_end) {
  if (distance >= row_end - begin) return 0;
  const int64_t rows = row_end - row_begin;
  const int64_t full_end = std::clamp(row_begin - distance + 1, begin, end);
  const int64_t part_end = std::clamp(row_end - distance, full_end, end);
  const int64_t part = part_end - full_end;
  const int64_t first_rows = row_end - distance - full_end;  // rows of the key full_end
  return (full_end - begin) * rows + part * first_rows - part * (part - 1) / 2;
}

// What is done with the keys of a tile. Ranges and columns come ascending, each key once.
class KeySink {  // stores them
 public:
  static constexpr bool kStretchesAsRanges = true;
  explicit KeySink(TileKeys* keys) : keys_(keys) {}

  void Range(const KeyRange& range) {
    if (!keys_->ranges.empty()) {
      KeyRange& before = keys_->ranges.back();
      if (before.end == range.begin && before.min_distance == range.min_distance &&
          before.max_distance == range.max_distance) {
        before.end = range.end;
        return;
      }
    }
    keys_->ranges.push_back(range);
  }
  void Columns(const int32_t* first, const int32_t* last) {
    keys_->columns.insert(keys_->columns.end(), first, last);
  }

 private:
  TileKeys* const keys_;
};

class PairSink {  // counts their pairs; columns may come in larger pieces than KeySink wants
 public:
  static constexpr bool kStretchesAsRanges = false;
  explicit PairSink(const Tile& tile) : row_begin_(tile.first_row), row_end_(tile.key_end) {}

  void Range(const KeyRange& range) {
    pairs_ += PairsAtLeast(range.min_distance, range.begin, range.end, row_begin_, row_end_);
    if (range.max_distance == kNoMaxDistance) return;
    pairs_ -= PairsAtLeast(range.max_distance, range.begin, range.end, row_begin_, row_end_);
  }
  void Columns(const int32_t* first, const int32_t* last) {
    for (; last != first && *(last - 1) > row_begin_; --last) {  // at most 64: columns end with the tile
      pairs_ += std::max<int64_t>(0, row_end_ - *(last - 1));
    }
    pairs_ += (last - first) * (row_end_ - row_begin_);
  }
  int64_t pairs() const { return pairs_; }

 private:
  const int64_t row_begin_;
  const int64_t row_end_;  // rows beyond the prompt do not count
  int64_t pairs_ = 0;
};

// Builds the keys of one tile from left to right out of ranges (ascending, disjoint unless their predicates
// are equal) and columns.
template <typename Sink>
class TileWriter {
 public:
  TileWriter(const Tile& tile, std::span<const int32_t> columns, Sink* sink)
      : tile_(tile), columns_(columns), sink_(sink) {}

  void AddRange(KeyRange range) {
    range.begin = std::max(range.begin, std::max<int64_t>(position_, 0));
    range.end = std::min(range.end, tile_.key_end);
    if (range.begin >= range.end) return;
    AddColumnsBelow(range.begin);
    range = WithoutIdleLimits(range, tile_);
    if (AllCausal(range)) {
      sink_->Range(range);
    } else {
      AddLimited(range);
    }
    next_column_ = GallopUp(columns_, next_column_, range.end);
    position_ = range.end;
  }

  void Finish() { AddColumnsBelow(tile_.key_end); }

 private:
  // A range with distance limits. Where the limits let every causal pair of the tile pass, columns add
  // nothing; elsewhere a column adds the rows that the limits leave out, so its key is taken out of the range
  // and covered for all rows.
  void AddLimited(const KeyRange& range) {
    const int64_t full_begin =
        range.max_distance == kNoMaxDistance ? range.begin : tile_.last_row - range.max_distance + 1;
    const int64_t full_end = range.min_distance == 0 ? range.end : tile_.first_row - range.min_distance + 1;
    int64_t done = range.begin;
    const auto add_rest = [&](int64_t end) {
      if (done < end)
        sink_->Range(WithoutIdleLimits({done, end, range.min_distance, range.max_distance}, tile_));
    };
    while (true) {
      if (next_column_ < columns_.size() && columns_[next_column_] >= full_begin && full_begin < full_end) {
        next_column_ = GallopUp(columns_, next_column_, full_end);
      }
      if (next_column_ == columns_.size() || columns_[next_column_] >= range.end) break;
      const int64_t begin = columns_[next_column_];
      const bool before_full = begin < full_begin && full_begin < full_end;
      add_rest(begin);
      done = AddStretch(before_full ? std::min(full_begin, range.end) : range.end);
    }
    add_rest(range.end);
  }

  // The stretch of consecutive columns at next_column_, cut at `limit`; gives its end. Precondition: it
  // starts below.
  int64_t AddStretch(int64_t limit) {
    const int64_t begin = columns_[next_column_];
    const int64_t whole = static_cast<int64_t>(StretchEnd(columns_, next_column_) - next_column_);
    const int64_t count = std::min(whole, limit - begin);
    if (count >= kMinColumnStretch) {
      sink_->Range({begin, begin + count, 0, kNoMaxDistance});
    } else {
      const int32_t* first = columns_.data() + next_column_;
      sink_->Columns(first, first + count);
    }
    next_column_ += count;
    return begin + count;
  }

  void AddColumnsBelow(int64_t limit) {
    if constexpr (Sink::kStretchesAsRanges) {
      while (next_column_ < columns_.size() && columns_[next_column_] < limit) AddStretch(limit);
    } else {
      const size_t end = GallopUp(columns_, next_column_, limit);
      sink_->Columns(columns_.data() + next_column_, columns_.data() + end);
      next_column_ = end;
    }
  }

  const Tile tile_;
  const std::span<const int32_t> columns_;
  Sink* const sink_;
  size_t next_column_ = 0;
  int64_t position_ = 0;  // end of the ranges so far
};

std::span<const int32_t> ColumnsOf(const IndexView& index) {
  return {index.columns, static_cast<size_t>(index.counts->columns)};
}
std::span<const int32_t> DistancesOf(const IndexView& index) {
  return {index.distances, static_cast<size_t>(index.counts->distances)};
}
std::span<const DistanceRun> RunsOf(const IndexView& index) {
  return {index.runs, static_cast<size_t>(index.counts->runs)};
}
std::span<const int32_t> KeyBlocksOf(const IndexView& index, int64_t row_block) {
  if (index.row_offsets == nullptr) {
    return {index.key_blocks + row_block * index.row_length,
            static_cast<size_t>(std::min(index.row_length, row_block + 1))};
  }
  const int64_t begin = index.row_offsets[row_block];
  return {index.key_blocks + begin, static_cast<size_t>(index.row_offsets[row_block + 1] - begin)};
}

template <typename Sink>
void ExpandRuns(const IndexView& index, const Tile& tile, Sink* sink) {
  TileWriter<Sink> writer(tile, ColumnsOf(index), sink);
  // Runs ascend in distance, so keys ascend from the last run that reaches the tile to the first.
  const std::span<const DistanceRun> runs = RunsOf(index);
  auto run = std::upper_bound(runs.begin(), runs.end(), tile.last_row,
                              [](int64_t distance, const DistanceRun& r) { return distance < r.d_lo; });
  while (run != runs.begin()) {
    --run;
    KeyRange range{tile.first_row - run->d_hi + 1, tile.last_row + 1 - run->d_lo, 0, kNoMaxDistance};
    if (run->exact) {
      range.min_distance = run->d_lo;
      range.max_distance = run->d_hi;
    }
    writer.AddRange(range);
  }
  writer.Finish();
}

// Calls emit(begin, end) for every run of the published walk (coverage.h, AppendPublishedRuns).
template <typename Emit>
void WalkPublishedRuns(std::span<const int32_t> distances, int64_t row_block, const Emit& emit) {
  const int64_t end = (row_block + 1) * kRowBlock;
  size_t below = std::lower_bound(distances.begin(), distances.end(), end) - distances.begin();
  if (below == 0) return;
  const auto right_edge = [&](size_t count) {
    return std::max<int64_t>(end - distances[count - 1], kRowBlock);
  };
  int64_t run_end = right_edge(below);
  int64_t run_begin = run_end - kRowBlock;
  while (true) {
    // The next distance that matters is the largest whose right edge lies beyond the run: all before it
    // change nothing.
    below = GallopDown(distances, below, end - run_end);
    if (below == 0) break;
    const int64_t edge = right_edge(below);
    if (edge > run_end + kRowBlock) {
      emit(run_begin, run_end);
      run_begin = edge - kRowBlock;
      run_end = edge;
    } else {
      run_end += kRowBlock;
    }
  }
  emit(run_begin, run_end);
}

// Columns inside a run or beyond the last run are dropped, as published, even where the run overshoots the
// tile.
template <typename Sink>
void ExpandPublished(const IndexView& index, int64_t row_block, const Tile& tile, Sink* sink) {
  const std::span<const int32_t> columns = ColumnsOf(index);
  size_t next_column = 0;
  WalkPublishedRuns(DistancesOf(index), row_block, [&](int64_t begin, int64_t end) {
    const size_t inside = GallopUp(columns, next_column, begin);
    sink->Columns(columns.data() + next_column, columns.data() + inside);
    next_column = GallopUp(columns, inside, end);
    if (begin < tile.key_end) sink->Range({begin, std::min(end, tile.key_end), 0, kNoMaxDistance});
  });
}

template <typename Sink>
void Expand(const IndexView& index, int64_t row_block, const Tile& tile, Sink* sink) {
  if (index.form == IndexView::Form::kBlockList) {
    for (const int64_t block : KeyBlocksOf(index, row_block)) {
      const int64_t begin = block * kRowBlock;
      sink->Range({begin, std::min(begin + kRowBlock, tile.key_end), 0, kNoMaxDistance});
    }
  } else if (index.coverage == Coverage::kParity) {
    ExpandPublished(index, row_block, tile, sink);
  } else {
    ExpandRuns(index, tile, sink);
  }
}

// Only vertical-slash in our tiles differs from what is published; the walk reads the same distances and
// columns.
bool DiffersFromPublished(const IndexView& index) {
  return index.form == IndexView::Form::kDiagonalColumn && index.coverage == Coverage::kTiles &&
         index.counts->distances > 0;
}

}  // namespace

void ExpandTile(const IndexView& index, int64_t row_block, int64_t num_tokens, TileKeys* keys) {
  keys->Clear();
  KeySink sink(keys);
  Expand(index, row_block, TileOf(row_block, num_tokens), &sink);
}

void AppendPublishedRuns(std::span<const int32_t> distances, int64_t row_block, std::vector<KeyRange>* runs) {
  WalkPublishedRuns(distances, row_block, [runs](int64_t begin, int64_t end) {
    runs->push_back({begin, end, 0, kNoMaxDistance});
  });
}

int64_t CountTilePairs(const TileKeys& keys, int64_t row_block, int64_t num_tokens) {
  PairSink sink(TileOf(row_block, num_tokens));
  for (const KeyRange& range : keys.ranges) sink.Range(range);
  sink.Columns(keys.columns.data(), keys.columns.data() + keys.columns.size());
  return sink.pairs();
}

PairCounts CountRowBlockPairs(const IndexView& index, int64_t row_block_begin, int64_t row_block_end,
                              int64_t num_tokens) {
  const bool walk = DiffersFromPublished(index);
  PairCounts counts;
  for (int64_t m = row_block_begin; m < row_block_end; ++m) {
    const Tile tile = TileOf(m, num_tokens);
    PairSink covered(tile);
    Expand(index, m, tile, &covered);
    counts.covered += covered.pairs();
    if (!walk) continue;
    PairSink published(tile);
    ExpandPublished(index, m, tile, &published);
    counts.published += published.pairs();
  }
  if (!walk) counts.published = counts.covered;
  return counts;
}

PairCounts CountPairs(const IndexView& index, int64_t num_tokens) {
  return CountRowBlockPairs(index, 0, RowBlocksOf(num_tokens), num_tokens);
}

}  // namespace longfill
