#ifndef LONGFILL_KERNELS_CUDA_ATTENTION_ATTENTION_TABLES_H_
#define LONGFILL_KERNELS_CUDA_ATTENTION_ATTENTION_TABLES_H_

// From the parameters of a call to what its kernels read: arguments, and tables that go to the workspace.

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "kernels/api/kernel_set.h"
#include "kernels/cuda/attention/attention_args.h"

namespace longfill::cuda::attention {

// Items are counted in 32 bits; each thread block takes one more than there are.
inline constexpr int64_t kMaxItems = std::numeric_limits<int32_t>::max() - (1 << 20);

struct SequenceTable {
  std::vector<SequenceEntry> entries;  // of the sequences that have query rows, in order
  int64_t num_items = 0;
};

// For tiles of tile_rows rows of num_heads query heads.
SequenceTable SequencesOf(const AttentionParams& params, int64_t num_heads, int64_t tile_rows);
// Of the query heads `heads`, ascending.
std::vector<HeadEntry> HeadsByKvHead(const AttentionParams& params, std::span<const int32_t> heads);
std::vector<IndexView> IndicesOf(const AttentionParams& params);

// All but what lies in the workspace.
Args ArgsOf(const AttentionParams& params);

}  // namespace longfill::cuda::attention

#endif  // LONGFILL_KERNELS_CUDA_ATTENTION_ATTENTION_TABLES_H_
