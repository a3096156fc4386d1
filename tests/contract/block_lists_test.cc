#include <algorithm>
#include <bit>

#include "tests/contract/backend_fixture.h"

namespace longfill {
namespace {

class BlockListsTest : public BackendTest {
 protected:
  struct Lists {
    std::vector<int64_t> row_offsets;  // [heads, row blocks + 1]
    std::vector<int32_t> key_blocks;   // [capacity]
    int64_t num_entries = 0;
  };
  // bits [heads, row blocks, words]; calls of `heads_at_once` heads, or of `rows_at_once` row blocks of one.
  Lists Build(const std::vector<uint64_t>& bits, int64_t heads, int64_t row_blocks, int64_t words,
              int64_t capacity, int64_t heads_at_once, int64_t rows_at_once) {
    const Buffer on_backend = Upload(bits);
    const Buffer offsets = Bytes(heads * (row_blocks + 1) * 8);
    const Buffer key_blocks = Bytes(capacity * 4);
    const Buffer entries = Bytes(8);
    LF_EXPECT_OK(kernels().Zero(entries.data(), 8, stream()));
    for (int64_t head = 0; head < heads; head += heads_at_once) {
      for (int64_t row = 0; row < row_blocks; row += rows_at_once) {
        BuildBlockListsParams params;
        params.bits = on_backend.as<uint64_t>() + (head * row_blocks + row) * words;
        params.words_per_row = words;
        params.num_heads = std::min(heads_at_once, heads - head);
        params.num_row_blocks = std::min(rows_at_once, row_blocks - row);
        params.row_offsets = offsets.as<int64_t>() + head * (row_blocks + 1) + row;
        params.row_offsets_stride = row_blocks + 1;
        params.key_blocks = key_blocks.as<int32_t>();
        params.capacity = capacity;
        params.num_entries = entries.as<int64_t>();
        const Workspace workspace =
            NewWorkspace(kernels().BuildBlockListsWorkspaceBytes(params.num_heads, params.num_row_blocks));
        LF_EXPECT_OK(kernels().BuildBlockLists(params, workspace, stream()));
      }
    }
    return {Download<int64_t>(offsets.data(), heads * (row_blocks + 1)),
            Download<int32_t>(key_blocks.data(), capacity), Download<int64_t>(entries.data(), 1)[0]};
  }
};
LF_INSTANTIATE_BACKENDS(BlockListsTest);

TEST_P(BlockListsTest, AreTheBitsInOrderHeadAfterHead) {
  for (const int64_t row_blocks : {1, 2, 63, 64, 65, 1031}) {
    for (const int64_t words : {1, 2, 17, 70}) {
      const int64_t heads = 5;
      std::vector<uint64_t> bits;
      for (const float value : NormalFloats(heads * row_blocks * words, static_cast<uint32_t>(words))) {
        const uint64_t word = std::bit_cast<uint32_t>(value) * 0x9E3779B97F4A7C15ULL;
        bits.push_back(value < -1  ? 0
                       : value < 1 ? word & word << 7 & word >> 5
                       : value < 2 ? word
                                   : ~uint64_t{0});
      }
      std::vector<int64_t> offsets;
      std::vector<int32_t> key_blocks;
      for (int64_t row = 0; row < heads * row_blocks; ++row) {
        if (row % row_blocks == 0) offsets.push_back(std::ssize(key_blocks));
        for (int64_t n = 0; n < words * 64; ++n) {
          if ((bits[row * words + n / 64] >> (n % 64) & 1) != 0)
            key_blocks.push_back(static_cast<int32_t>(n));
        }
        offsets.push_back(std::ssize(key_blocks));
      }
      const int64_t total = std::ssize(key_blocks);
      for (const int64_t capacity : {total, total + 3, total / 2, int64_t{0}}) {
        SCOPED_TRACE(testing::Message() << row_blocks << " row blocks of " << words << " words, room for "
                                        << capacity << " of " << total);
        std::vector<int64_t> cut_offsets = offsets;
        for (int64_t& offset : cut_offsets) offset = std::min(offset, capacity);
        std::vector<int32_t> cut_blocks = key_blocks;
        cut_blocks.resize(static_cast<size_t>(capacity), 0x7F7F7F7F);  // what Bytes() left there
        for (const auto& [heads_at_once, rows_at_once] :
             {std::pair(heads, row_blocks), {int64_t{2}, row_blocks}, {int64_t{1}, int64_t{48}}}) {
          const Lists got = Build(bits, heads, row_blocks, words, capacity, heads_at_once, rows_at_once);
          ASSERT_EQ(got.num_entries, total);
          ASSERT_EQ(got.row_offsets, cut_offsets);
          ASSERT_EQ(got.key_blocks, cut_blocks);
        }
      }
    }
  }
}

}  // namespace
}  // namespace longfill
