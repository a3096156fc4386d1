#include "parallel/index_storage.h"

#include <vector>

#include "tests/testing/guarded_backend.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

// Layers that differ in both parts of their index.
TEST(IndexStorageTest, HoldsNoMoreThanTheLargestLayerOfSeveral) {
  constexpr int64_t kTokens = 3000;
  const std::vector<std::vector<HeadPattern>> layers = {
      {AShape{7, 70}, AShape{8, 70}, Dense{}, AShape{9, 70}},
      {VerticalSlash{100, 200}, VerticalSlash{1000, 2000}, BlockSparse{20}, BlockSparse{3}},
      {BlockShare{4, 0.2}, BlockSparse{2}, BlockShare{4, 0.1}, Dense{}},
      {AShape{7, 70}, VerticalSlash{50, 60}, Dense{}, BlockSparse{1}},
      {AShape{7, 70}, VerticalSlash{50, 60}, Dense{}, BlockSparse{1}}};
  const auto backend = CreateGuardedBackend();
  IndexStorage storage;
  int64_t largest = 0;
  for (const std::vector<HeadPattern>& patterns : layers) {
    LF_ASSERT_OK(storage.Allocate(*backend, kTokens, Coverage::kTiles, patterns));
    EXPECT_EQ(backend->memory().bytes_in_use(), IndexStorage::Bytes(kTokens, patterns));
    EXPECT_EQ(storage.views().size(), patterns.size());
    largest = std::max(largest, IndexStorage::Bytes(kTokens, patterns));
    EXPECT_EQ(backend->memory().peak_bytes(), largest);
  }
}

// Up to there lists never have no room, whatever is selected (index_storage.h).
TEST(IndexStorageTest, HasRoomForAllBlocksOf65536Tokens) {
  constexpr int64_t kRows = 65536 / kRowBlock;
  EXPECT_EQ(ShareListCapacity(65536, 3), 3 * kRows * (kRows + 1) / 2);
  EXPECT_LT(ShareListCapacity(2 * 65536, 3), 3 * kRows * (2 * kRows + 1));
}

}  // namespace
}  // namespace longfill
