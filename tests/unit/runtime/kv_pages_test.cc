// Pages that are read when their transfer ends, and the memory that a device's pages are parts of.

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "runtime/kv/kv_store.h"
#include "runtime/kv/kv_tier.h"
#include "runtime/kv/region_memory.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using std::chrono::milliseconds;
using testing::HasSubstr;

// Pages whose reads wait until they are let go.
class SlowPages final : public KvPages {
 public:
  explicit SlowPages(std::atomic<bool>* go) : go_(go) {}
  int64_t bytes() const override { return 77; }
  absl::Status Write(int64_t, int64_t, int64_t, HeadsView<const void>, HeadsView<const void>,
                     DType) override {
    return absl::OkStatus();
  }
  absl::Status WriteOnDevice(int64_t, int64_t, int64_t, HeadsView<const void>,
                             HeadsView<const void>) override {
    return absl::OkStatus();
  }
  absl::Status Read(int64_t, int64_t, const KvPageShape&, std::byte*, std::byte*) const override {
    while (!*go_) std::this_thread::sleep_for(milliseconds(1));
    return absl::OkStatus();
  }

 private:
  std::atomic<bool>* const go_;
};

class SlowTier final : public KvTier {
 public:
  absl::StatusOr<std::unique_ptr<KvPages>> Open(const KvTransferSpec&) override {
    return std::make_unique<SlowPages>(&go);
  }
  std::atomic<bool> go = false;
};

TEST(KvPagesBeingRead, StayUntilTheCopyIsDone) {
  SlowTier tier;
  KvStore store({}, &tier);
  const KvTransferSpec spec{
      .transfer_id = "id", .plan = ShardPlan({1, 1}, 10), .num_layers = 1, .num_kv_heads = 1, .head_dim = 4};
  LF_ASSERT_OK_AND_ASSIGN(const auto sink, store.Open(spec));
  LF_ASSERT_OK(sink->Append(0, 0, 10, {}, {}, DType::kFloat32));
  LF_ASSERT_OK_AND_ASSIGN(auto reader, store.Read("id"));
  std::thread copy([&] {
    std::string key, value;
    EXPECT_THAT(reader->Copy(0, {.num_tokens = 10}, KvLayout::kHeadsTokens, &key, &value), IsOk());
  });
  std::this_thread::sleep_for(milliseconds(20));
  LF_ASSERT_OK_AND_ASSIGN(const TransferStatus ended,
                          store.End("id", TransferState::kAborted, absl::OkStatus()));
  EXPECT_EQ(ended.bytes_held, 77);
  EXPECT_EQ(store.usage().bytes_lingering, 77);
  tier.go = true;
  copy.join();
  EXPECT_EQ(store.usage().bytes_lingering, 0);
  LF_EXPECT_OK(sink->Finish(absl::OkStatus()));
}

// ---- Parts of one allocation

TEST(RegionMemory, GapsAreUsedAgainAndJoined) {
  CpuMemoryResource memory;
  LF_ASSERT_OK_AND_ASSIGN(Buffer region, memory.Allocate(10 * RegionMemoryResource::kAlignment, "region"));
  RegionMemoryResource parts(std::move(region));
  const auto take = [&](int64_t units) {
    return parts.Allocate(units * RegionMemoryResource::kAlignment - 5, "part").value_or(Buffer());
  };
  Buffer a = take(3), b = take(4), c = take(3);
  EXPECT_NE(c.data(), nullptr);
  EXPECT_THAT(parts.Allocate(1, "one more"),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("one more")));
  const void* const of_b = b.data();
  b = {};
  EXPECT_EQ(take(5).data(), nullptr);
  b = take(2);
  EXPECT_EQ(b.data(), of_b);
  for (const bool forward : {true, false}) {
    (forward ? a : c) = {};
    b = {};
    (forward ? c : a) = {};
    Buffer all = take(10);
    EXPECT_NE(all.data(), nullptr) << forward;
    all = {};
    a = take(3);
    b = take(4);
    c = take(3);
  }
}

}  // namespace
}  // namespace longfill
