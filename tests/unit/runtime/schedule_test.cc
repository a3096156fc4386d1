// Times of schedules that were worked out by hand, and what must hold of every schedule.

#include "runtime/scaling/schedule.h"

#include <random>

#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using Kind = ScheduleStep::Kind;
using testing::AllOf;
using testing::DoubleNear;
using testing::HasSubstr;

constexpr double kEpsilon = 1e-9;
constexpr int kBeside = 1;  // a stream

// 1 GB/s on every link and no latency, so that a gigabyte takes a second; nodes of 8.
LinkRates OneGigabyte() {
  return {.node_gbs = 1, .network_gbs = 1, .node_latency_us = 0, .network_latency_us = 0};
}

// The steps of one rank.
class Steps {
 public:
  Steps& Work(int stream, double seconds) {
    rank.steps.push_back({.kind = Kind::kWork, .stream = stream, .seconds = seconds});
    return *this;
  }
  Steps& Record(int stream, int event) {
    return Add({.kind = Kind::kRecord, .stream = stream, .event = event});
  }
  Steps& Wait(int stream, int event) { return Add({.kind = Kind::kWait, .stream = stream, .event = event}); }
  Steps& HostWait(int event) { return Add({.kind = Kind::kHostWait, .event = event}); }
  Steps& HostSync(int stream) { return Add({.kind = Kind::kHostSync, .stream = stream}); }
  Steps& Exchange(int stream, ExchangeCall call, int group = 0) {
    const auto number = static_cast<int>(rank.exchanges.size());
    rank.exchanges.push_back({group, std::move(call)});
    return Add({.kind = Kind::kExchange, .stream = stream, .exchange = number});
  }
  // Everybody brings as much.
  Steps& Gather(int stream, double gigabytes, int num_ranks, int group = 0) {
    const auto bytes = static_cast<int64_t>(gigabytes * 1e9);
    return Exchange(stream,
                    {.kind = ExchangeKind::kAllGather,
                     .sent = std::vector<int64_t>(static_cast<size_t>(num_ranks), bytes)},
                    group);
  }
  Steps& Copy(int stream, double gigabytes) {
    return Add({.kind = Kind::kPeerCopy, .stream = stream, .bytes = static_cast<int64_t>(gigabytes * 1e9)});
  }
  Steps& Agree() { return Exchange(kHostStream, {.kind = ExchangeKind::kAllReduce, .bytes = 0}); }

  RankSchedule rank;

 private:
  Steps& Add(const ScheduleStep& step) {
    rank.steps.push_back(step);
    return *this;
  }
};

Schedule Of(std::vector<Steps> ranks) {
  Schedule schedule;
  schedule.groups.emplace_back();
  for (Steps& steps : ranks) {
    schedule.groups[0].push_back(static_cast<int>(schedule.ranks.size()));
    schedule.ranks.push_back(std::move(steps.rank));
  }
  return schedule;
}

TEST(Schedule, OneRankTakesTheSumOfItsWork) {
  LF_ASSERT_OK_AND_ASSIGN(
      const ScheduleTimes times,
      Simulate(Of({Steps().Work(0, 1).Record(0, 0).HostWait(0).Work(0, 2.5).Agree()}), LinkRates{}));
  EXPECT_THAT(times.seconds, DoubleNear(3.5, kEpsilon));
  EXPECT_THAT(times.ranks[0].main_work_seconds, DoubleNear(3.5, kEpsilon));
  EXPECT_EQ(times.ranks[0].exchange_seconds, 0);
}

TEST(Schedule, StreamsRunSideBySideUntilOneWaits) {
  // Beside: 0 to 3. Main: 0 to 1, waits until 3, 3 to 5.
  LF_ASSERT_OK_AND_ASSIGN(
      const ScheduleTimes times,
      Simulate(Of({Steps().Work(kBeside, 3).Record(kBeside, 7).Work(0, 1).Wait(0, 7).Work(0, 2)}),
               OneGigabyte()));
  EXPECT_THAT(times.seconds, DoubleNear(5, kEpsilon));
}

TEST(Schedule, AnEventThatWasNeverRecordedIsPast) {
  LF_ASSERT_OK_AND_ASSIGN(const ScheduleTimes times,
                          Simulate(Of({Steps().Wait(0, 3).HostWait(4).Work(0, 1)}), OneGigabyte()));
  EXPECT_THAT(times.seconds, DoubleNear(1, kEpsilon));
}

TEST(Schedule, NothingBeginsBeforeTheHostHasGivenIt) {
  // The host waits for main until 4, only then gives 1 s to the other stream.
  LF_ASSERT_OK_AND_ASSIGN(const ScheduleTimes times,
                          Simulate(Of({Steps().Work(0, 4).HostSync(0).Work(kBeside, 1)}), OneGigabyte()));
  EXPECT_THAT(times.seconds, DoubleNear(5, kEpsilon));
}

TEST(Schedule, AnExchangeBeginsWithItsLastMember) {
  // Rank 0 is there at 1, rank 1 at 3; each receives 2 GB: both are through at 5. Rank 0 then works until 6.
  LF_ASSERT_OK_AND_ASSIGN(
      const ScheduleTimes times,
      Simulate(Of({Steps().Work(0, 1).Gather(0, 2, 2).Work(0, 1), Steps().Work(0, 3).Gather(0, 2, 2)}),
               OneGigabyte()));
  EXPECT_THAT(times.ranks[0].end_seconds, DoubleNear(6, kEpsilon));
  EXPECT_THAT(times.ranks[1].end_seconds, DoubleNear(5, kEpsilon));
  EXPECT_THAT(times.ranks[0].exchange_seconds, DoubleNear(2, kEpsilon));
  EXPECT_THAT(times.ranks[0].bytes.node, DoubleNear(2e9, 1));
}

TEST(Schedule, CopiesFromPeersTakeTheLinkAndNobodyElse) {
  // 2 GB until 2 beside work until 3; the peer waits for nobody.
  Steps reads;
  reads.Copy(kBeside, 2)
      .Record(kBeside, 0)
      .Work(0, 3)
      .Wait(0, 0)
      .Copy(kBeside, 4)
      .Record(kBeside, 1)
      .Wait(0, 1);
  LF_ASSERT_OK_AND_ASSIGN(ScheduleTimes times, Simulate(Of({reads, Steps().Work(0, 1)}), OneGigabyte()));
  EXPECT_THAT(times.ranks[0].end_seconds, DoubleNear(6, kEpsilon));
  EXPECT_THAT(times.ranks[0].exchange_seconds, DoubleNear(6, kEpsilon));
  EXPECT_THAT(times.ranks[0].bytes.node, DoubleNear(6e9, 1));
  EXPECT_THAT(times.ranks[1].end_seconds, DoubleNear(1, kEpsilon));
  LF_ASSERT_OK_AND_ASSIGN(times, Simulate(Of({reads, Steps().Work(0, 1)}), LinkRates::Instant()));
  EXPECT_THAT(times.ranks[0].end_seconds, DoubleNear(3, kEpsilon));
}

// Two rounds as ParallelAttention enqueues them: the exchange of the second runs beside attention of the
// first.
Steps TwoRounds(double gigabytes, double attention) {
  Steps steps;
  steps.Gather(kBeside, gigabytes, 2).Record(kBeside, 0);
  steps.Gather(kBeside, gigabytes, 2).Record(kBeside, 1);
  steps.Wait(0, 0).Work(0, attention).Wait(0, 1).Work(0, attention);
  return steps;
}

TEST(Schedule, TheFirstRoundIsExposedAndTheSecondHides) {
  // 1 s of exchange, then attention of 3 s each; the second exchange ends at 2.
  LF_ASSERT_OK_AND_ASSIGN(ScheduleTimes times,
                          Simulate(Of({TwoRounds(1, 3), TwoRounds(1, 3)}), OneGigabyte()));
  EXPECT_THAT(times.seconds, DoubleNear(7, kEpsilon));
  // 4 s of exchange each: attention 4 to 7, the second exchange ends at 8, attention 8 to 11.
  LF_ASSERT_OK_AND_ASSIGN(times, Simulate(Of({TwoRounds(4, 3), TwoRounds(4, 3)}), OneGigabyte()));
  EXPECT_THAT(times.seconds, DoubleNear(11, kEpsilon));
}

TEST(Schedule, ExchangesOfOneRankFollowOneAnotherOnItsLinks) {
  // Two streams with 2 GB each, given at once.
  const auto steps = [] { return Steps().Gather(0, 2, 2).Gather(kBeside, 2, 2); };
  LF_ASSERT_OK_AND_ASSIGN(const ScheduleTimes times, Simulate(Of({steps(), steps()}), OneGigabyte()));
  EXPECT_THAT(times.seconds, DoubleNear(4, kEpsilon));
}

TEST(Schedule, GroupsThatShareNoRankExchangeSideBySide) {
  const auto steps = [](int group) { return Steps().Gather(0, 1, 2, group); };
  Schedule schedule = Of({steps(1), steps(2), steps(1), steps(2)});
  schedule.groups.push_back({0, 2});
  schedule.groups.push_back({1, 3});
  LF_ASSERT_OK_AND_ASSIGN(const ScheduleTimes times, Simulate(schedule, OneGigabyte()));
  EXPECT_THAT(times.seconds, DoubleNear(1, kEpsilon));
}

TEST(Schedule, AHostThatAgreesWaitsForTheSlowest) {
  // Main of rank 0 has ended at 1, its host waits in the agreement until 5.
  LF_ASSERT_OK_AND_ASSIGN(const ScheduleTimes times,
                          Simulate(Of({Steps().Work(0, 1).HostSync(0).Agree().Work(0, 1),
                                       Steps().Work(0, 5).HostSync(0).Agree()}),
                                   OneGigabyte()));
  EXPECT_THAT(times.ranks[0].end_seconds, DoubleNear(6, kEpsilon));
}

// Layers of a random number of seconds with a gather and an agreement in each.
std::vector<Steps> RandomLayers(int num_ranks, int num_layers, double gigabytes, std::mt19937& random,
                                std::vector<std::vector<double>>* seconds) {
  std::uniform_real_distribution<double> draw(0.1, 2);
  std::vector<Steps> ranks(static_cast<size_t>(num_ranks));
  seconds->assign(static_cast<size_t>(num_layers), {});
  for (int layer = 0; layer < num_layers; ++layer) {
    for (Steps& rank : ranks) {
      const double work = (*seconds)[static_cast<size_t>(layer)].emplace_back(draw(random));
      rank.Gather(kBeside, gigabytes, num_ranks).Record(kBeside, 0).Wait(0, 0);
      rank.Work(0, work).HostSync(0).Agree();
    }
  }
  return ranks;
}

TEST(Schedule, WithInstantLinksEachLayerTakesItsSlowestRank) {
  std::mt19937 random(3);
  std::vector<std::vector<double>> seconds;
  const Schedule schedule = Of(RandomLayers(5, 7, 3, random, &seconds));
  double expected = 0;
  for (const auto& layer : seconds) expected += *std::ranges::max_element(layer);
  LF_ASSERT_OK_AND_ASSIGN(const ScheduleTimes times, Simulate(schedule, LinkRates::Instant()));
  EXPECT_THAT(times.seconds, DoubleNear(expected, kEpsilon));
}

TEST(Schedule, WithoutWorkExchangesAddUp) {
  std::mt19937 random(4);
  std::vector<std::vector<double>> seconds;
  std::vector<Steps> ranks = RandomLayers(3, 5, 1, random, &seconds);
  for (Steps& rank : ranks) {
    for (ScheduleStep& step : rank.rank.steps) step.seconds = 0;
  }
  LinkRates links = OneGigabyte();
  links.node_latency_us = 1e5;
  LF_ASSERT_OK_AND_ASSIGN(const ScheduleTimes times, Simulate(Of(std::move(ranks)), links));
  // A gather of 2 GB from others and an agreement of none, with 0.1 s each.
  EXPECT_THAT(times.seconds, DoubleNear(5 * (2 + 0.1 + 0.1), kEpsilon));
}

TEST(Schedule, SlowerLinksAreNeverFaster) {
  std::mt19937 random(5);
  std::vector<std::vector<double>> seconds;
  const Schedule schedule = Of(RandomLayers(4, 6, 1, random, &seconds));
  double before = 0;
  for (const double gbs : {1e6, 10.0, 2.0, 1.0, 0.1}) {
    LinkRates links = OneGigabyte();
    links.node_gbs = gbs;
    LF_ASSERT_OK_AND_ASSIGN(const ScheduleTimes times, Simulate(schedule, links));
    EXPECT_GE(times.seconds, before);
    before = times.seconds;
  }
}

TEST(Schedule, CallsThatDoNotFitAreNamed) {
  EXPECT_THAT(Simulate(Of({Steps().Gather(0, 1, 2), Steps().Agree()}), OneGigabyte()),
              StatusIs(absl::StatusCode::kInternal, AllOf(HasSubstr("all-gather"), HasSubstr("all-reduce"))));
  EXPECT_THAT(Simulate(Of({Steps().Gather(0, 1, 2).Work(0, 1), Steps().Work(0, 1)}), OneGigabyte()),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("rank 0 waits in all-gather")));
  LinkRates links = OneGigabyte();
  links.network_gbs = -2;
  EXPECT_THAT(Simulate(Of({Steps()}), links),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("network_gbs is -2")));
}

// Bytes on the links, by hand.
class Links : public testing::Test {
 protected:
  static LinkBytes Of(const ExchangeCall& call, std::vector<int> members, int me, int ranks_per_node) {
    LinkRates links = OneGigabyte();
    links.ranks_per_node = ranks_per_node;
    return BytesOnLinks(call, members, me, links);
  }
  static void ExpectBytes(const LinkBytes& bytes, double node, double network) {
    EXPECT_THAT(bytes.node, DoubleNear(node, 1e-6));
    EXPECT_THAT(bytes.network, DoubleNear(network, 1e-6));
  }
};

TEST_F(Links, AGatherBringsWhatOthersHave) {
  const ExchangeCall call{.kind = ExchangeKind::kAllGather, .sent = {10, 20, 30, 40}};
  ExpectBytes(Of(call, {0, 1, 2, 3}, 1, 8), 80, 0);
  // One member a node: everything comes over the network.
  ExpectBytes(Of(call, {0, 8, 16, 24}, 1, 8), 0, 80);
  // Two nodes of two: 70 from the other node, half of them by each; the rest inside.
  ExpectBytes(Of(call, {0, 1, 2, 3}, 1, 2), 80 - 35, 35);
}

TEST_F(Links, AReductionIsARingInEachLevel) {
  const ExchangeCall call{.kind = ExchangeKind::kAllReduce, .bytes = 80};
  ExpectBytes(Of(call, {0, 1, 2, 3}, 0, 8), 120, 0);  // 2 * 3/4 * 80
  ExpectBytes(Of(call, {0, 1, 2, 3}, 0, 2), 80, 40);  // 2 * 1/2 * 80, and 2 * 1/2 * 80 / 2
  ExpectBytes(Of(call, {0, 8}, 0, 8), 0, 80);         // 2 * 1/2 * 80
}

TEST_F(Links, PiecesOfAnAllToAllGoOnTheLinkToTheirRank) {
  const ExchangeCall call{.kind = ExchangeKind::kAllToAll, .sent = {5, 6, 7, 8}, .received = {1, 50, 3, 4}};
  ExpectBytes(Of(call, {0, 1, 2, 3}, 0, 8), 57, 0);   // received without its own: 50 + 3 + 4
  ExpectBytes(Of(call, {0, 1, 2, 3}, 0, 2), 50, 15);  // received 50 inside, sent 7 + 8 outside
}

TEST_F(Links, ABroadcastUsesTheLinksThatItNeeds) {
  const ExchangeCall call{.kind = ExchangeKind::kBroadcast, .bytes = 9};
  ExpectBytes(Of(call, {0, 1}, 0, 8), 9, 0);
  ExpectBytes(Of(call, {0, 8}, 0, 8), 0, 9);
  ExpectBytes(Of(call, {0, 1, 8, 9}, 3, 8), 9, 9);
}

TEST_F(Links, ACallTakesItsLatencyAndTheSlowestTransfer) {
  const LinkRates links{.node_gbs = 100,
                        .network_gbs = 10,
                        .node_latency_us = 20,
                        .network_latency_us = 50,
                        .ranks_per_node = 2};
  const std::vector<LinkBytes> bytes = {{.node = 1e9}, {.node = 3e9, .network = 2e9}};
  const std::vector<int> near = {0, 1}, far = {1, 2}, alone = {0};
  EXPECT_THAT(ExchangeSeconds(bytes, near, links), DoubleNear(0.2 + 20e-6, kEpsilon));
  EXPECT_THAT(ExchangeSeconds(bytes, far, links), DoubleNear(0.2 + 50e-6, kEpsilon));
  EXPECT_EQ(ExchangeSeconds(std::span(bytes).first(1), alone, links), 0);
}

TEST_F(Links, AreReadFromNamesAndNumbers) {
  LF_ASSERT_OK_AND_ASSIGN(LinkRates links, ParseLinks("400g"));
  EXPECT_EQ(links.NodeOf(7), links.NodeOf(0));
  EXPECT_NE(links.NodeOf(8), links.NodeOf(0));
  LF_ASSERT_OK_AND_ASSIGN(links, ParseLinks("nvlink"));
  EXPECT_EQ(links.NodeOf(1023), links.NodeOf(0));
  LF_ASSERT_OK_AND_ASSIGN(links, ParseLinks("300,12.5,4"));
  EXPECT_EQ(links.node_gbs, 300);
  EXPECT_EQ(links.network_gbs, 12.5);
  EXPECT_EQ(links.ranks_per_node, 4);
  for (const char* text : {"", "ethernet", "300", "300,12,4,1", "300,x,4", "300,12,4.5"}) {
    EXPECT_THAT(ParseLinks(text), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(text))) << text;
  }
  EXPECT_THAT(ParseLinks("300,0,4"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("network_gbs is 0")));
  EXPECT_THAT(ParseLinks("300,12,0"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("ranks_per_node is 0")));
}

}  // namespace
}  // namespace longfill
