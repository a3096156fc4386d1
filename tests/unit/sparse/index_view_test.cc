#include "kernels/sparse/index_view.h"

#include <cstring>

#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using ::testing::ElementsAreArray;

template <typename T>
std::span<const T> List(const T* first, int64_t count) {
  return {first, static_cast<size_t>(count)};
}

// As on its way to a device: packed, copied elsewhere, and read there.
TEST(PackedIndices, SayTheSameFromACopyElsewhere) {
  BlockListIndex blocks{{0, 1, 3}, {0, 0, 1}};
  const std::vector<SparseIndex> indices = {MakeVerticalSlashIndex({9, 2, 5}, {300, 64, 1}, Coverage::kTiles),
                                            MakeDenseIndex(),
                                            blocks,
                                            MakeVerticalSlashIndex({7}, {3}, Coverage::kParity),
                                            MakeAShapeIndex({3, 70}),
                                            BlockListIndex{{0}, {}}};
  const PackedIndices packed(indices);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(packed.data()) % 16, 0U);
  std::vector<uint64_t> memory(packed.size_bytes() / 8 + 2);
  uint64_t* const copy = memory.data() + (reinterpret_cast<uintptr_t>(memory.data()) % 16 == 0 ? 0 : 1);
  std::memcpy(copy, packed.data(), packed.size_bytes());
  const std::vector<IndexView> views = packed.Views(copy);
  ASSERT_EQ(views.size(), indices.size());
  for (size_t i = 0; i < views.size(); ++i) {
    SCOPED_TRACE(i);
    const IndexView& view = views[i];
    if (const auto* list = std::get_if<BlockListIndex>(&indices[i])) {
      EXPECT_EQ(view.form, IndexView::Form::kBlockList);
      EXPECT_EQ(reinterpret_cast<uintptr_t>(view.row_offsets) % 16, 0U);
      EXPECT_EQ(reinterpret_cast<uintptr_t>(view.key_blocks) % 16, 0U);
      EXPECT_THAT(List(view.row_offsets, list->row_offsets.size()), ElementsAreArray(list->row_offsets));
      EXPECT_THAT(List(view.key_blocks, view.row_offsets[list->row_offsets.size() - 1]),
                  ElementsAreArray(list->key_blocks));
      continue;
    }
    const auto& diagonal = std::get<DiagonalColumnIndex>(indices[i]);
    EXPECT_EQ(view.form, IndexView::Form::kDiagonalColumn);
    EXPECT_EQ(view.coverage, diagonal.coverage);
    EXPECT_EQ(view.counts->overflow, 0);
    for (const void* part : {static_cast<const void*>(view.columns), static_cast<const void*>(view.distances),
                             static_cast<const void*>(view.runs), static_cast<const void*>(view.counts)}) {
      EXPECT_EQ(reinterpret_cast<uintptr_t>(part) % 16, 0U);
    }
    EXPECT_THAT(List(view.columns, view.counts->columns), ElementsAreArray(diagonal.columns));
    EXPECT_THAT(List(view.distances, view.counts->distances), ElementsAreArray(diagonal.distances));
    EXPECT_THAT(List(view.runs, view.counts->runs), ElementsAreArray(diagonal.runs));
  }
}

TEST(PackedIndices, OfNothingAreNothing) {
  const PackedIndices packed({});
  EXPECT_EQ(packed.size_bytes(), 0);
  EXPECT_TRUE(packed.Views(nullptr).empty());
}

}  // namespace
}  // namespace longfill
