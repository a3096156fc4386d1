#ifndef LONGFILL_KERNELS_SPARSE_REFERENCED_BLOCKS_H_
#define LONGFILL_KERNELS_SPARSE_REFERENCED_BLOCKS_H_

#include <cstdint>
#include <vector>

#include "kernels/sparse/index_view.h"

namespace longfill {

// Which blocks of keys some rows of a prompt need, under the indices of one or several heads: those that hold
// a key of a pair that is covered (coverage.h).
class ReferencedBlocks {
 public:
  // num_tokens >= 0; blocks of key_block >= 1 keys, the last one maybe in part.
  ReferencedBlocks(int64_t num_tokens, int64_t key_block);

  // Those of the rows [row_begin, row_end) of the prompt; row_begin is a multiple of kRowBlock, and row_end
  // is one or the end of the prompt. `index` is in host memory and as ValidateIndex demands. Linear in the
  // index, whatever the number of rows; for block lists and parity coverage in their lists for these rows.
  void Add(const IndexView& index, int64_t row_begin, int64_t row_end);

  // [blocks of the prompt]
  std::vector<bool> Blocks() const;

 private:
  void AddKeys(int64_t begin, int64_t end);

  const int64_t num_tokens_;
  const int64_t key_block_;
  std::vector<int64_t> steps_;  // [blocks + 1]: where ranges of blocks begin, less where they end
};

}  // namespace longfill

#endif  // LONGFILL_KERNELS_SPARSE_REFERENCED_BLOCKS_H_
