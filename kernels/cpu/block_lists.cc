#include "kernels/cpu/block_lists.h"

#include <algorithm>
#include <bit>

#include "kernels/cpu/workspace.h"

namespace longfill {
namespace {

// Words of bits that one task reads, about.
constexpr int64_t kWordsPerTask = int64_t{1} << 14;

absl::Status Check(const BuildBlockListsParams& params) {
  LF_RETURN_IF_ERROR(CheckAtLeast("block lists", "num_heads", params.num_heads, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("block lists", "num_row_blocks", params.num_row_blocks, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("block lists", "words_per_row", params.words_per_row, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("block lists", "capacity", params.capacity, 0));
  if (params.num_heads < 2) return absl::OkStatus();
  return CheckAtLeast("block lists", "row_offsets_stride", params.row_offsets_stride,
                      params.num_row_blocks + 1);
}

int64_t CountBits(const uint64_t* words, int64_t num_words) {
  int64_t count = 0;
  for (int64_t w = 0; w < num_words; ++w) count += std::popcount(words[w]);
  return count;
}

}  // namespace

absl::Status CpuBuildBlockLists(const BuildBlockListsParams& params, ThreadPool& pool) {
  LF_RETURN_IF_ERROR(Check(params));
  const int64_t num_rows = params.num_heads * params.num_row_blocks;
  const int64_t rows_per_task =
      std::max<int64_t>(1, kWordsPerTask / std::max<int64_t>(1, params.words_per_row));
  const int64_t num_tasks = (num_rows + rows_per_task - 1) / rows_per_task;
  const auto bits_of = [&](int64_t row) { return params.bits + row * params.words_per_row; };
  // Where row block i of a head starts; the count of row block i waits at i + 1 until the scan.
  const auto offsets_of = [&](int64_t row) {
    return params.row_offsets + row / params.num_row_blocks * params.row_offsets_stride +
           row % params.num_row_blocks;
  };
  const auto for_rows = [&](const auto& body) {
    pool.ParallelFor(num_tasks, [&](int64_t task, int) {
      const int64_t end = std::min(num_rows, (task + 1) * rows_per_task);
      for (int64_t row = task * rows_per_task; row < end; ++row) body(row);
    });
  };

  for_rows([&](int64_t row) { offsets_of(row)[1] = CountBits(bits_of(row), params.words_per_row); });
  int64_t total = *params.num_entries;
  for (int64_t head = 0; head < params.num_heads; ++head) {
    int64_t* const offsets = params.row_offsets + head * params.row_offsets_stride;
    offsets[0] = std::min(total, params.capacity);
    for (int64_t i = 1; i <= params.num_row_blocks; ++i) {
      total += offsets[i];
      offsets[i] = std::min(total, params.capacity);
    }
  }
  *params.num_entries = total;
  for_rows([&](int64_t row) {
    const int64_t* const offsets = offsets_of(row);
    int64_t place = offsets[0];
    for (int64_t w = 0; w < params.words_per_row; ++w) {
      for (uint64_t word = bits_of(row)[w]; word != 0 && place < offsets[1]; word &= word - 1) {
        params.key_blocks[place++] = static_cast<int32_t>(w * 64 + std::countr_zero(word));
      }
    }
  });
  return absl::OkStatus();
}

}  // namespace longfill
