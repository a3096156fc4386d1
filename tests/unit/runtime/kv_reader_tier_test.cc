// The service where KV pages go straight to a waiting reader: rings far smaller than a layer, over real gRPC.

#include <atomic>
#include <chrono>
#include <future>
#include <string>
#include <thread>

#include "runtime/client/cancellation.h"
#include "runtime/client/convert.h"
#include "tests/unit/runtime/service_cluster.h"

namespace longfill {
namespace {

using std::chrono::milliseconds;
using testing::AllOf;
using testing::HasSubstr;

constexpr int64_t kTokens = 30000;
constexpr int64_t kRowBytes = 2 * 2 * 4 * 4;  // keys and values of 2 heads of 4 floats
constexpr int64_t kRingRows = 1500;           // a layer of one of 4 ranks has 7500

Cluster::Options Options(milliseconds reader_timeout = milliseconds(10000)) {
  Cluster::Options options = Cluster::Defaults();
  options.ring_bytes = kRingRows * kRowBytes;
  options.server.store.reader_timeout = reader_timeout;
  return options;
}

std::unique_ptr<PrefillClient> SmallMessages(Cluster& cluster) {
  return cluster.Client({.page_message_bytes = 16 << 10});
}

// Takes `pause` for each page, and an error after so many.
class SlowConsumer final : public CheckingConsumer {
 public:
  SlowConsumer(milliseconds pause, int pages) : pause_(pause), pages_(pages) {}
  absl::Status OnPage(const KvPageView& page) override {
    std::this_thread::sleep_for(pause_);
    if (--pages_ < 0) return absl::ResourceExhaustedError("the disk is full");
    return CheckingConsumer::OnPage(page);
  }

 private:
  const milliseconds pause_;
  std::atomic<int> pages_;
};

TEST(KvReaderTier, ClientThatReadsGetsEverythingOnce) {
  Cluster cluster(Options());
  CheckingConsumer consumer;
  LF_ASSERT_OK_AND_ASSIGN(const Prefilled prefilled,
                          SmallMessages(cluster)->Prefill(Ids(kTokens), {}, &consumer));
  EXPECT_EQ(prefilled.kv_bytes_received, 3 * kTokens * kRowBytes);
  consumer.ExpectEverythingOnce(3, kTokens);
  EXPECT_TRUE(cluster.StoresEmptySoon());
}

TEST(KvReaderTier, SlowClientHoldsThePromptAndLosesNothing) {
  Cluster cluster(Options());
  SlowConsumer consumer(milliseconds(3), 1 << 20);
  LF_ASSERT_OK(SmallMessages(cluster)->Prefill(Ids(kTokens), {}, &consumer).status());
  consumer.ExpectEverythingOnce(3, kTokens);
  EXPECT_TRUE(cluster.StoresEmptySoon());
}

TEST(KvReaderTier, ClientThatWantsNoPagesIsServed) {
  Cluster cluster(Options());
  LF_EXPECT_OK(SmallMessages(cluster)->Prefill(Ids(kTokens), {}, nullptr).status());
  EXPECT_TRUE(cluster.StoresEmptySoon());
}

TEST(KvReaderTier, ConsumerThatFailsEndsThePromptAndTheNextOneRuns) {
  Cluster cluster(Options());
  SlowConsumer consumer(milliseconds(0), 5);
  EXPECT_THAT(SmallMessages(cluster)->Prefill(Ids(kTokens), {}, &consumer).status(),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("disk is full")));
  EXPECT_TRUE(cluster.StoresEmptySoon());
  CheckingConsumer next;
  LF_EXPECT_OK(SmallMessages(cluster)->Prefill(Ids(kTokens), {}, &next).status());
  next.ExpectEverythingOnce(3, kTokens);
}

// A client that keeps its Prefill call and reads nothing: the bare protocol.
TEST(KvReaderTier, LayerThatNobodyReadsEndsThePromptNamingIt) {
  Cluster cluster(Options(milliseconds(200)));
  grpc::ClientContext context;
  const auto call = cluster.PrefillStub()->Prefill(&context);
  v1::PrefillRequest header, chunk;
  header.mutable_header()->set_num_tokens(kTokens);
  header.mutable_header()->mutable_attention()->set_spec("dense");
  for (const int32_t id : Ids(kTokens)) chunk.mutable_tokens()->add_ids(id);
  ASSERT_TRUE(call->Write(header));
  ASSERT_TRUE(call->Write(chunk));
  ASSERT_TRUE(call->WritesDone());
  v1::PrefillEvent event;
  while (call->Read(&event)) {
  }
  EXPECT_THAT(FromGrpc(call->Finish()),
              StatusIs(absl::StatusCode::kDeadlineExceeded,
                       AllOf(HasSubstr("layer 0 waited 200 ms"), HasSubstr("nobody reads"))));
  EXPECT_TRUE(cluster.StoresEmptySoon());
}

TEST(KvReaderTier, CancelledClientEndsAPromptThatWaitsForIt) {
  Cluster cluster(Options());
  SlowConsumer consumer(milliseconds(50), 1 << 20);
  Cancellation cancellation;
  auto prefill = std::async(std::launch::async, [&] {
    return SmallMessages(cluster)->Prefill(Ids(kTokens), {}, &consumer, {}, &cancellation).status();
  });
  ASSERT_TRUE(Cluster::Soon([&] { return consumer.TokensOfLayer(0) > 0; }));
  const auto start = std::chrono::steady_clock::now();
  cancellation.Cancel();
  EXPECT_THAT(prefill.get(), StatusIs(absl::StatusCode::kCancelled, testing::_));
  EXPECT_TRUE(cluster.StoresEmptySoon());
  EXPECT_LT(std::chrono::steady_clock::now() - start, milliseconds(5000));
}

TEST(KvReaderTier, DrainLetsTheReaderFinish) {
  Cluster cluster(Options());
  SlowConsumer consumer(milliseconds(5), 1 << 20);
  auto prefill = std::async(std::launch::async, [&] {
    return SmallMessages(cluster)->Prefill(Ids(kTokens), {}, &consumer).status();
  });
  ASSERT_TRUE(Cluster::Soon([&] { return consumer.TokensOfLayer(0) > 0; }));
  LF_EXPECT_OK(cluster.End());
  LF_EXPECT_OK(prefill.get());
  consumer.ExpectEverythingOnce(3, kTokens);
}

}  // namespace
}  // namespace longfill
