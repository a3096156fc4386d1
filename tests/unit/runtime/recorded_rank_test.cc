// What is written down of a device's streams and of calls without peers.

#include <cmath>
#include <thread>

#include "kernels/api/backend.h"
#include "runtime/scaling/link_traffic.h"
#include "runtime/scaling/recorded_backend.h"
#include "runtime/scaling/recorded_communicator.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using Kind = ScheduleStep::Kind;
using testing::ElementsAre;
using testing::HasSubstr;

class RecordedDevice : public testing::Test {
 protected:
  absl::Status Zero(Stream& stream) { return backend_.kernels().Zero(values_.data(), 256, stream); }

  // Without the host's own time.
  std::vector<ScheduleStep> TakeSteps() {
    const absl::StatusOr<RecordedSteps> taken = backend_.recorder().Take();
    EXPECT_THAT(taken, IsOk());
    std::vector<ScheduleStep> steps = taken->schedule.steps;
    std::erase_if(steps, [](const ScheduleStep& step) {
      return step.kind == Kind::kWork && step.stream == kHostStream;
    });
    return steps;
  }

  const std::unique_ptr<Backend> device_ = CreateCpuBackend(1);
  RecordedBackend backend_{*device_};
  std::vector<float> values_ = std::vector<float>(64, 1.0F);
};

TEST_F(RecordedDevice, StepsComeInTheOrderGiven) {
  LF_ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Stream> beside, backend_.NewStream());
  LF_ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Event> event, backend_.NewEvent());
  LF_ASSERT_OK(Zero(backend_.stream()));
  LF_ASSERT_OK(Zero(backend_.stream()));
  LF_ASSERT_OK(event->Record(backend_.stream()));
  LF_ASSERT_OK(beside->WaitFor(*event));
  LF_ASSERT_OK(Zero(*beside));
  LF_ASSERT_OK(Zero(backend_.stream()));
  LF_ASSERT_OK(event->Wait());
  LF_ASSERT_OK(beside->Sync());
  const std::vector<ScheduleStep> steps = TakeSteps();
  ASSERT_EQ(steps.size(), 7);
  const auto is = [&](size_t i, Kind kind, int stream) {
    EXPECT_EQ(steps[i].kind, kind) << i;
    EXPECT_EQ(steps[i].stream, stream) << i;
  };
  is(0, Kind::kWork, kMainStream);  // of two calls
  is(1, Kind::kRecord, kMainStream);
  is(2, Kind::kWait, 1);
  is(3, Kind::kWork, 1);
  is(4, Kind::kWork, kMainStream);
  EXPECT_EQ(steps[5].kind, Kind::kHostWait);
  is(6, Kind::kHostSync, 1);
  EXPECT_EQ(steps[2].event, steps[1].event);
  EXPECT_GT(steps[0].seconds, 0);
  EXPECT_EQ(values_[63], 0);
  EXPECT_TRUE(TakeSteps().empty());
}

TEST_F(RecordedDevice, PartsAreTimedApart) {
  const std::vector<float> weight(64, 1.0F);
  LF_ASSERT_OK(Zero(backend_.stream()));
  LF_ASSERT_OK(backend_.kernels().RmsNorm({.x = values_.data(),
                                           .weight = weight.data(),
                                           .epsilon = 1,
                                           .num_rows = 1,
                                           .width = 64,
                                           .out = values_.data()},
                                          backend_.stream()));
  LF_ASSERT_OK_AND_ASSIGN(const RecordedSteps taken, backend_.recorder().Take());
  EXPECT_GT(taken.of(WorkPart::kCopy), 0);
  EXPECT_GT(taken.of(WorkPart::kOther), 0);
  EXPECT_EQ(taken.of(WorkPart::kGemm), 0);
}

TEST_F(RecordedDevice, TimeOfTheHostBetweenCallsIsItsWork) {
  LF_ASSERT_OK(backend_.recorder().Take().status());
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  LF_ASSERT_OK(backend_.stream().Sync());
  LF_ASSERT_OK_AND_ASSIGN(const RecordedSteps taken, backend_.recorder().Take());
  ASSERT_EQ(taken.schedule.steps.size(), 2);
  EXPECT_EQ(taken.schedule.steps[0].stream, kHostStream);
  EXPECT_GE(taken.schedule.steps[0].seconds, 0.02);
}

TEST_F(RecordedDevice, StreamsThatNobodyRecordsAreRefused) {
  CpuStream other;
  CpuEvent event;
  EXPECT_THAT(Zero(other), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("nobody records")));
  EXPECT_THAT(backend_.stream().WaitFor(event),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("event")));
}

TEST_F(RecordedDevice, GroupsAreThoseOfTheMesh) {
  EXPECT_THAT(MeshGroups({2, 3}).members(),
              ElementsAre(ElementsAre(0, 1, 2, 3, 4, 5), ElementsAre(0, 1, 2), ElementsAre(3, 4, 5),
                          ElementsAre(0, 3), ElementsAre(1, 4), ElementsAre(2, 5)));
  MeshGroups groups({2, 3});
  RecordedRank rank(groups, 4, backend_, nullptr);
  const std::unique_ptr<Communicator> world = rank.World();
  EXPECT_EQ(world->rank(), 4);
  LF_ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Communicator> head, world->Split(1, 1));
  EXPECT_EQ(head->size(), 3);
  EXPECT_EQ(head->rank(), 1);
  EXPECT_THAT(head->Split(0, 0), StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("not split")));
  EXPECT_THAT(world->Split(0, 4), StatusIs(absl::StatusCode::kInternal, HasSubstr("color 0 and key 4")));
}

TEST_F(RecordedDevice, ReductionsGiveAllRanksWhatTheFirstHad) {
  MeshGroups groups({2, 1});
  for (int r = 0; r < 2; ++r) {
    RecordedRank rank(groups, r, backend_, nullptr);
    const std::unique_ptr<Communicator> world = rank.World();
    int64_t value = 5 + r;
    LF_ASSERT_OK(world->AllReduce(&value, 1, ReduceType::kInt64, ReduceOp::kSum, backend_.stream()));
    EXPECT_EQ(value, 5);
    CpuStream host;
    value = 5 + r;  // a value of the host stays
    LF_ASSERT_OK(world->AllReduce(&value, 1, ReduceType::kInt64, ReduceOp::kMax, host));
    EXPECT_EQ(value, 5 + r);
    EXPECT_EQ(world->bytes_sent(), 16);
  }
  RecordedRank rank(groups, 1, backend_, nullptr);
  std::vector<int64_t> more(2);
  EXPECT_THAT(rank.World()->AllReduce(more.data(), 2, ReduceType::kInt64, ReduceOp::kSum, backend_.stream()),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("16 bytes")));
}

TEST_F(RecordedDevice, PiecesOfPeersAreWhatOneSends) {
  MeshGroups groups({3, 1});
  RecordedRank rank(groups, 1, backend_, nullptr);
  const std::unique_ptr<Communicator> world = rank.World();
  std::vector<float> own = {7, 8};
  std::vector<float> all(7, NAN);  // one more than there are
  const std::vector<int64_t> counts = {4, 8, 12};
  LF_ASSERT_OK(world->AllGather(own.data(), all.data(), counts, backend_.stream()));
  EXPECT_THAT(all, ElementsAre(7, 7, 8, 7, 8, 0, testing::IsNan()));
  // They stay until the memory may be another.
  own = {1, 2};
  LF_ASSERT_OK(world->AllGather(own.data(), all.data(), counts, backend_.stream()));
  EXPECT_THAT(std::vector<float>(all.begin(), all.begin() + 6), ElementsAre(7, 1, 2, 7, 8, 0));
  CpuStream host;
  int64_t value = 0;
  LF_ASSERT_OK(world->AllReduce(&value, 1, ReduceType::kInt64, ReduceOp::kMax, host));
  LF_ASSERT_OK(world->AllGather(own.data(), all.data(), counts, backend_.stream()));
  EXPECT_THAT(std::vector<float>(all.begin(), all.begin() + 6), ElementsAre(1, 1, 2, 1, 2, 0));
  EXPECT_THAT(world->AllGather(own.data(), all.data(), counts, host),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("peers")));

  // One that sends nothing receives something all the same.
  std::vector<float> of_others(3, NAN);
  const std::vector<int64_t> none_of_mine = {4, 0, 8};
  LF_ASSERT_OK(world->AllGather(own.data(), of_others.data(), none_of_mine, backend_.stream()));
  for (const float number : of_others) EXPECT_TRUE(std::isfinite(number));
  EXPECT_NE(of_others[1], of_others[2]);

  const std::vector<float> sent = {1, 2, 3};
  std::vector<float> received(4, NAN);
  const std::vector<int64_t> to = {8, 4, 0}, from = {0, 4, 12};
  LF_ASSERT_OK(world->AllToAll(sent.data(), to, received.data(), from, backend_.stream()));
  EXPECT_THAT(received, ElementsAre(3, 2, 3, 0));
  LF_ASSERT_OK_AND_ASSIGN(const RecordedSteps taken, backend_.recorder().Take());
  ASSERT_EQ(taken.schedule.exchanges.size(), 6);
  EXPECT_EQ(taken.schedule.exchanges[0].call.sent, counts);
  EXPECT_EQ(taken.schedule.exchanges[5].call.received, from);
  EXPECT_EQ(taken.seconds, (std::array<double, kNumWorkParts>{}));  // none of it is work
}

TEST(LinkTrafficTest, CopiesTheBytesOfExchangesAtTheRateOfTheLinks) {
  LinkRates links;
  links.node_gbs = 2;
  LF_ASSERT_OK_AND_ASSIGN(const auto traffic, LinkTraffic::Create(CreateCpuBackend(1), links));
  const std::vector<int> members = {0, 1};
  constexpr int64_t kBytes = int64_t{100} << 20;  // 52 ms
  const ExchangeCall call{.kind = ExchangeKind::kAllGather, .sent = {5, kBytes}};
  traffic->Add(call, members, 0);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (traffic->figures().seconds == 0 && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_EQ(traffic->figures().bytes, kBytes);
  EXPECT_GE(traffic->figures().seconds, static_cast<double>(kBytes) / 2e9 - 1e-6);
  traffic->Add({.kind = ExchangeKind::kAllReduce, .bytes = 0}, members, 0);
  LF_EXPECT_OK(traffic->Stop());
  EXPECT_EQ(traffic->figures().bytes, kBytes);
}

TEST(LinkTrafficTest, StopDropsWhatIsLeft) {
  LinkRates links;
  links.node_gbs = 0.5;
  LF_ASSERT_OK_AND_ASSIGN(const auto traffic, LinkTraffic::Create(CreateCpuBackend(1), links));
  const std::vector<int> members = {0, 1};
  constexpr int64_t kBytes = int64_t{1} << 40;
  traffic->Add({.kind = ExchangeKind::kAllGather, .sent = {0, kBytes}}, members, 0);
  LF_EXPECT_OK(traffic->Stop());
  EXPECT_LT(traffic->figures().bytes, kBytes);
}

}  // namespace
}  // namespace longfill
