#include "kernels/cpu/selection.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/workspace.h"

namespace longfill {
namespace {

constexpr int64_t kEntriesPerTask = int64_t{1} << 16;
constexpr float kForced = std::numeric_limits<float>::infinity();
constexpr uint64_t kNoThreshold = ~uint64_t{0};  // no key is as large

int64_t NumBlocks(int64_t num_keys) { return (num_keys + kSelectionBlock - 1) / kSelectionBlock; }

// Larger scores first, then smaller indices; unique where the index is.
uint64_t SelectionKey(float score, int64_t index) {
  return uint64_t{std::bit_cast<uint32_t>(score)} << 32 | (0xFFFFFFFFU - static_cast<uint32_t>(index));
}

absl::Status CheckPositions(std::string_view operation, const PositionMap& map) {
  if (map.Ascends()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(std::string(operation), ": position map ", ToString(map), " does not ascend"));
}

absl::Status CheckLists(std::string_view operation, const SelectionLists& lists) {
  LF_RETURN_IF_ERROR(CheckAtLeast(operation, "num_lists", lists.num_lists, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast(operation, "num_entries", lists.num_entries, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast(operation, "list_stride", lists.list_stride, lists.num_entries));
  LF_RETURN_IF_ERROR(CheckPositions(operation, lists.positions));
  if (lists.num_entries == 0) return absl::OkStatus();
  const int64_t last = lists.positions.Position(lists.num_entries - 1);
  return CheckAtLeast(operation, "last_query", lists.last_query, last);
}

absl::Status CheckPass(std::string_view operation, int pass) {
  if (pass >= 0 && pass < kSelectionPasses) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(std::string(operation), ": pass ", pass, " of ", kSelectionPasses));
}

// Lowest bit of the digit of a pass.
int DigitShift(int pass) {
  int shift = 64;
  for (int i = 0; i <= pass; ++i) shift -= kSelectionDigitBits[i];
  return shift;
}

// Calls body(key, index) for entries [begin, end) of a list.
template <typename Body>
void ForKeys(const SelectionLists& lists, int64_t list, int64_t begin, int64_t end, const Body& body) {
  const float* scores = lists.scores + list * lists.list_stride;
  const bool distances = list % 2 == 1;
  const PositionMap& map = lists.positions;
  while (begin < end) {  // one piece of consecutive positions at a time
    const int64_t piece_end =
        std::min(end, ((begin + map.skipped) / map.block + 1) * map.block - map.skipped);
    const int64_t first = map.Position(begin) - begin;
    for (int64_t e = begin; e < piece_end; ++e) {
      const int64_t index = distances ? lists.last_query - (first + e) : first + e;
      body(SelectionKey(scores[e], index), index);
    }
    begin = piece_end;
  }
}

// Calls body(list, begin, end) for stretches of the entries of all lists for which `wanted`.
template <typename Wanted, typename Body>
void ForStretches(const SelectionLists& lists, ThreadPool& pool, const Wanted& wanted, const Body& body) {
  const int64_t stretches = (lists.num_entries + kEntriesPerTask - 1) / kEntriesPerTask;
  pool.ParallelFor(lists.num_lists * stretches, [&](int64_t task, int) {
    const int64_t list = task / stretches;
    if (!wanted(list)) return;
    const int64_t begin = task % stretches * kEntriesPerTask;
    body(list, begin, std::min(lists.num_entries, begin + kEntriesPerTask));
  });
}

// Takes the next digit from the histogram. Without enough keys the list stays as it is, and every later
// histogram has too few as well.
void AdvanceCut(const uint64_t* histogram, int pass, SelectionCut* cut) {
  const int digit_bits = kSelectionDigitBits[pass];
  int64_t above = 0;
  for (int64_t bin = (int64_t{1} << digit_bits) - 1; bin >= 0; --bin) {
    const int64_t count = static_cast<int64_t>(histogram[bin]);
    if (above + count < cut->missing) {
      above += count;
      continue;
    }
    cut->prefix = cut->prefix << digit_bits | static_cast<uint64_t>(bin);
    cut->missing -= above;
    if (count == cut->missing) {  // the whole bin is taken
      cut->settled = 1;
      cut->threshold = cut->prefix << DigitShift(pass);
    }
    return;
  }
}

// The two lists of one block of keys.
void JoinBlock(const JoinScoresParams& params, int64_t head, int64_t block) {
  const int64_t num_blocks = NumBlocks(params.num_keys);
  const int64_t row = block * kSelectionBlock;
  const int64_t rows = std::min(kSelectionBlock, params.num_keys - row);
  const int64_t first_key = params.key_positions.Position(row);
  float* vertical = params.scores + 2 * head * params.score_stride + row;
  float* slash = vertical + params.score_stride;
  const float* window = params.slash + (head * num_blocks + block) * kDiagonalWindow;
  const float* before = nullptr;  // what the block before it adds
  if (params.overlaps != nullptr) {
    before = params.overlaps + (head * num_blocks + block) * kDiagonalOverlap;
  } else if (block > 0) {
    before = window - kDiagonalWindow + kSelectionBlock;
  }
  const int64_t joined = before == nullptr ? 0 : std::min(rows, kDiagonalOverlap);
  for (int64_t e = 0; e < joined; ++e) slash[e] = window[e] + before[e];
  for (int64_t e = joined; e < rows; ++e) slash[e] = window[e];
  for (int64_t e = 0; e < rows && first_key + e < params.forced_keys; ++e) vertical[e] = kForced;
  // Distances fall with the key.
  const int64_t first_forced = params.last_query - params.forced_distances + 1 - first_key;
  for (int64_t e = std::max<int64_t>(0, first_forced); e < rows; ++e) slash[e] = kForced;
}

}  // namespace

absl::Status CpuJoinScores(const JoinScoresParams& params, ThreadPool& pool) {
  constexpr std::string_view kName = "join scores";
  LF_RETURN_IF_ERROR(CheckAtLeast(kName, "num_heads", params.num_heads, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast(kName, "num_keys", params.num_keys, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast(kName, "score_stride", params.score_stride, params.num_keys));
  LF_RETURN_IF_ERROR(CheckPositions(kName, params.key_positions));
  const int64_t num_blocks = NumBlocks(params.num_keys);
  constexpr int64_t kBlocksPerTask = kEntriesPerTask / kSelectionBlock;
  const int64_t stretches = (num_blocks + kBlocksPerTask - 1) / kBlocksPerTask;
  pool.ParallelFor(params.num_heads * stretches, [&](int64_t task, int) {
    const int64_t begin = task % stretches * kBlocksPerTask;
    const int64_t end = std::min(num_blocks, begin + kBlocksPerTask);
    for (int64_t block = begin; block < end; ++block) JoinBlock(params, task / stretches, block);
  });
  return absl::OkStatus();
}

absl::Status CpuSelectionStart(std::span<const int64_t> budgets, SelectionCut* cuts) {
  for (size_t l = 0; l < budgets.size(); ++l) {
    LF_RETURN_IF_ERROR(CheckAtLeast("selection start", absl::StrCat("budget of list ", l), budgets[l], 0));
    cuts[l] = {.threshold = kNoThreshold, .missing = budgets[l], .settled = budgets[l] == 0 ? 1 : 0};
  }
  return absl::OkStatus();
}

absl::Status CpuSelectionHistogram(const SelectionLists& lists, int pass, const SelectionCut* cuts,
                                   uint64_t* histogram, ThreadPool& pool) {
  LF_RETURN_IF_ERROR(CheckLists("selection histogram", lists));
  LF_RETURN_IF_ERROR(CheckPass("selection histogram", pass));
  std::fill_n(histogram, lists.num_lists * kSelectionBins, uint64_t{0});
  const int digit_shift = DigitShift(pass);
  const int digit_bits = kSelectionDigitBits[pass];
  const uint64_t mask = (uint64_t{1} << digit_bits) - 1;
  ForStretches(
      lists, pool, [cuts](int64_t list) { return cuts[list].settled == 0; },
      [&](int64_t list, int64_t begin, int64_t end) {
        uint32_t counts[kSelectionBins] = {};
        if (pass == 0) {  // no digit is known: all keys count
          ForKeys(lists, list, begin, end,
                  [&](uint64_t key, int64_t) { ++counts[key >> digit_shift & mask]; });
        } else {
          const uint64_t prefix = cuts[list].prefix;
          ForKeys(lists, list, begin, end, [&](uint64_t key, int64_t) {
            const uint64_t digits = key >> digit_shift;
            if (digits >> digit_bits == prefix) ++counts[digits & mask];
          });
        }
        for (int64_t bin = 0; bin < kSelectionBins; ++bin) {
          if (counts[bin] == 0) continue;
          std::atomic_ref<uint64_t>(histogram[list * kSelectionBins + bin])
              .fetch_add(counts[bin], std::memory_order_relaxed);
        }
      });
  return absl::OkStatus();
}

absl::Status CpuSelectionAdvance(int64_t num_lists, int pass, const uint64_t* histogram, SelectionCut* cuts) {
  LF_RETURN_IF_ERROR(CheckAtLeast("selection advance", "num_lists", num_lists, 0));
  LF_RETURN_IF_ERROR(CheckPass("selection advance", pass));
  for (int64_t list = 0; list < num_lists; ++list) {
    if (cuts[list].settled == 0) AdvanceCut(histogram + list * kSelectionBins, pass, cuts + list);
  }
  return absl::OkStatus();
}

absl::Status CpuSelectionMark(const SelectionLists& lists, const SelectionCut* cuts, uint64_t* bits,
                              int64_t words_per_list, ThreadPool& pool) {
  LF_RETURN_IF_ERROR(CheckLists("selection mark", lists));
  if (lists.num_entries == 0) return absl::OkStatus();
  const int64_t words = lists.last_query / 64 + 1;  // positions and distances are at most last_query
  LF_RETURN_IF_ERROR(CheckAtLeast("selection mark", "words_per_list", words_per_list, words));
  ForStretches(
      lists, pool, [cuts](int64_t list) { return cuts[list].settled != 0; },
      [&](int64_t list, int64_t begin, int64_t end) {
        const uint64_t threshold = cuts[list].threshold;
        uint64_t* const out = bits + list * words_per_list;
        ForKeys(lists, list, begin, end, [&](uint64_t key, int64_t index) {
          if (key < threshold) return;
          // Two stretches may meet in one word.
          std::atomic_ref<uint64_t>(out[index / 64])
              .fetch_or(uint64_t{1} << index % 64, std::memory_order_relaxed);
        });
      });
  return absl::OkStatus();
}

}  // namespace longfill
