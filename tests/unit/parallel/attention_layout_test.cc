// How many KV heads a round takes, and when two rounds have places of their own.

#include "parallel/attention_layout.h"

#include "tests/testing/guarded_backend.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

constexpr AttentionGeometry kLlama8B = {.num_q_heads = 32, .num_kv_heads = 8, .head_dim = 128, .scale = 0.1f};
constexpr int64_t kMiB = int64_t{1} << 20;

bool OnePlace(const AttentionLayout& layout) {
  return layout.received[0].all_k == layout.received[1].all_k && layout.received[0].q == layout.received[1].q;
}

TEST(AttentionLayout, LongPromptsOfADeviceTakeSeveralRoundsOfBoundedSize) {
  const auto device = CreateGuardedBackend();  // rows of 512 bytes
  const AttentionLayout million(device->kernels(), kLlama8B, ShardPlan({8, 1}, 1 << 20), {});
  EXPECT_EQ(million.kv_heads, 2) << "2 GiB";
  EXPECT_EQ(million.first_kv_heads, 1);
  EXPECT_FALSE(OnePlace(million));
  EXPECT_EQ(million.received[0].all_v - million.received[0].all_k, 2 * 512 * kMiB);
  const AttentionLayout shorter(device->kernels(), kLlama8B, ShardPlan({8, 1}, 1 << 17), {});
  EXPECT_EQ(shorter.kv_heads, 2) << "a quarter of the heads";
  EXPECT_FALSE(OnePlace(shorter));
  const AttentionLayout read(device->kernels(), kLlama8B, ShardPlan({8, 1}, 1 << 17), {.from_peers = true});
  EXPECT_EQ(read.kv_heads, 4) << "half of the heads";
  EXPECT_EQ(read.first_kv_heads, 4);
  EXPECT_EQ(read.send, read.recv) << "nothing is packed";
}

TEST(AttentionLayout, ShortPromptsTakeOneRoundAndOnePlace) {
  const auto device = CreateGuardedBackend();
  for (const Mesh& mesh : {Mesh{8, 1}, Mesh{1, 8}, Mesh{2, 4}}) {
    const AttentionLayout layout(device->kernels(), kLlama8B, ShardPlan(mesh, 2048), {});
    EXPECT_EQ(layout.kv_heads, 8) << ToString(mesh);
    EXPECT_TRUE(OnePlace(layout)) << ToString(mesh);
  }
  const AttentionLayout alone(device->kernels(), kLlama8B, ShardPlan({1, 1}, 1 << 20), {});
  EXPECT_EQ(alone.kv_heads, 8) << "nothing is received";
}

TEST(AttentionLayout, RoundsHoldAsManyHeadsAsTheyAreGivenBytesForAndOneAtLeast) {
  const auto device = CreateGuardedBackend();
  const ShardPlan plan({2, 1}, 1024);  // 1 MiB of K and V for a head
  EXPECT_EQ(AttentionLayout(device->kernels(), kLlama8B, plan, {.round_bytes = 1}).kv_heads, 1);
  EXPECT_EQ(AttentionLayout(device->kernels(), kLlama8B, plan, {.round_bytes = 3 * kMiB}).kv_heads, 3);
  EXPECT_EQ(AttentionLayout(device->kernels(), kLlama8B, plan, {.round_bytes = 100 * kMiB}).kv_heads, 8);
}

}  // namespace
}  // namespace longfill
