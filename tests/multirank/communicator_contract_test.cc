// What every Communicator promises while nothing fails; run in process and under mpirun, for host memory and,
// staged in slices so small that most calls take several, for memory of a device; and over NCCL.

#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/multirank/device_communicator.h"
#include "tests/multirank/rank_backend.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using testing::ElementsAre;

CpuStream g_stream;

int64_t UnevenBytes(int rank) { return rank % 3 == 1 ? 0 : 5 + 7 * rank; }
uint8_t Byte(int from, int to, int64_t i) { return static_cast<uint8_t>(31 * from + 17 * to + i); }

constexpr int64_t kSliceBytes = 150000;

// "cpu": memory of the host, as it is.
class CommunicatorContract : public RankBackendTest {
 protected:
  void OnEveryRank(int size, const std::function<void(Communicator& world)>& body) {
    longfill::OnEveryRank(size, [&](Communicator& host) {
      LF_ASSERT_OK_AND_ASSIGN(const auto backend, RankBackend(GetParam(), host.rank()));
      LF_ASSERT_OK_AND_ASSIGN(auto device, DeviceWorld(GetParam(), host, *backend, kSliceBytes));
      if (on_cpu()) return body(host);
      DeviceCommunicator world(std::move(device), *backend);
      body(world);
    });
  }
};

TEST_P(CommunicatorContract, RanksAreNumberedAndCounted) {
  for (const int size : Sizes()) {
    OnEveryRank(size, [&](Communicator& world) {
      EXPECT_EQ(world.size(), size);
      int64_t mask = int64_t{1} << world.rank();
      LF_ASSERT_OK(world.AllReduce(&mask, 1, ReduceType::kInt64, ReduceOp::kSum, g_stream));
      EXPECT_EQ(mask, (int64_t{1} << size) - 1);
    });
  }
}

TEST_P(CommunicatorContract, AllGatherPlacesUnevenAndEmptyPiecesInRankOrder) {
  for (const int size : Sizes()) {
    OnEveryRank(size, [](Communicator& world) {
      std::vector<int64_t> counts;
      std::vector<uint8_t> expected;
      size_t own_begin = 0;
      for (int r = 0; r < world.size(); ++r) {
        counts.push_back(UnevenBytes(r));
        if (r == world.rank()) own_begin = expected.size();
        for (int64_t i = 0; i < counts[r]; ++i) expected.push_back(Byte(r, 0, i));
      }
      const std::vector<uint8_t> own(expected.begin() + own_begin,
                                     expected.begin() + own_begin + counts[world.rank()]);
      std::vector<uint8_t> received(expected.size());
      LF_ASSERT_OK(world.AllGather(own.data(), received.data(), counts, g_stream));
      EXPECT_EQ(received, expected);
      std::vector<uint8_t> in_place(expected.size());
      std::copy(own.begin(), own.end(), in_place.begin() + own_begin);
      LF_ASSERT_OK(world.AllGather(in_place.data() + own_begin, in_place.data(), counts, g_stream));
      EXPECT_EQ(in_place, expected);
    });
  }
}

TEST_P(CommunicatorContract, FloatSumsAreFormedInRankOrderOrRefused) {
  for (const int size : Sizes()) {
    if (over_nccl()) {
      OnEveryRank(size, [](Communicator& world) {
        for (const ReduceType type : {ReduceType::kFloat32, ReduceType::kFloat64}) {
          std::vector<double> data(4, 1.0);
          EXPECT_THAT(world.AllReduce(data.data(), 4, type, ReduceOp::kSum, g_stream),
                      StatusIs(absl::StatusCode::kUnimplemented, testing::HasSubstr("float sums")));
        }
        LF_EXPECT_OK(world.Barrier(g_stream)) << "the group stays usable";
      });
      continue;
    }
    OnEveryRank(size, [&](Communicator& world) {
      for (const int64_t count : {0, 1, 2, 7, 1000, 100003}) {
        const auto value = [](int rank, int64_t i) {
          return 1.0f / static_cast<float>(3 * i + 7 * rank + 1) - 0.1f;
        };
        std::vector<float> data(count), expected(count);
        for (int64_t i = 0; i < count; ++i) {
          data[i] = value(world.rank(), i);
          expected[i] = value(0, i);
          for (int r = 1; r < size; ++r) expected[i] += value(r, i);
        }
        LF_ASSERT_OK(world.AllReduce(data.data(), count, ReduceType::kFloat32, ReduceOp::kSum, g_stream));
        EXPECT_EQ(data, expected);
      }
    });
  }
}

TEST_P(CommunicatorContract, IntegerAndExtremalReductionsAreExact) {
  for (const int size : Sizes()) {
    OnEveryRank(size, [&](Communicator& world) {
      const int last = size - 1;
      std::vector<uint64_t> sum(65, (uint64_t{1} << 60) + world.rank());
      LF_ASSERT_OK(world.AllReduce(sum.data(), 65, ReduceType::kUInt64, ReduceOp::kSum, g_stream));
      EXPECT_EQ(sum, std::vector<uint64_t>(65, (uint64_t{1} << 60) * size + size * last / 2));
      double least = -world.rank();
      LF_ASSERT_OK(world.AllReduce(&least, 1, ReduceType::kFloat64, ReduceOp::kMin, g_stream));
      EXPECT_EQ(least, -last);
      std::vector<float> most{static_cast<float>(world.rank()), -INFINITY};
      LF_ASSERT_OK(world.AllReduce(most.data(), 2, ReduceType::kFloat32, ReduceOp::kMax, g_stream));
      EXPECT_THAT(most, ElementsAre(static_cast<float>(last), -INFINITY));
    });
  }
}

TEST_P(CommunicatorContract, BroadcastReachesAllFromEveryRoot) {
  for (const int size : Sizes()) {
    OnEveryRank(size, [&](Communicator& world) {
      for (int root = 0; root < size; ++root) {
        for (const int64_t bytes : {0, 1, 3000000}) {
          std::vector<uint8_t> data(bytes, world.rank() == root ? 200 + root : 1);
          LF_ASSERT_OK(world.Broadcast(data.data(), bytes, root, g_stream));
          EXPECT_EQ(data, std::vector<uint8_t>(bytes, 200 + root));
        }
      }
    });
  }
}

TEST_P(CommunicatorContract, AllToAllDeliversUnevenAndEmptyPieces) {
  for (const int size : Sizes()) {
    OnEveryRank(size, [&](Communicator& world) {
      const auto bytes = [](int from, int to) -> int64_t {
        return (from + 2 * to) % 4 == 1 ? 0 : 1000 * from + 77 * to + 1;
      };
      const int me = world.rank();
      std::vector<int64_t> send_bytes, recv_bytes;
      std::vector<uint8_t> send, expected;
      for (int r = 0; r < size; ++r) {
        send_bytes.push_back(bytes(me, r));
        recv_bytes.push_back(bytes(r, me));
        for (int64_t i = 0; i < send_bytes[r]; ++i) send.push_back(Byte(me, r, i));
        for (int64_t i = 0; i < recv_bytes[r]; ++i) expected.push_back(Byte(r, me, i));
      }
      std::vector<uint8_t> received(expected.size());
      LF_ASSERT_OK(world.AllToAll(send.data(), send_bytes, received.data(), recv_bytes, g_stream));
      EXPECT_EQ(received, expected);
    });
  }
}

TEST_P(CommunicatorContract, SplitGroupsAreOrderedByKeyAndWorkSideBySide) {
  for (const int size : Sizes()) {
    OnEveryRank(size, [&](Communicator& world) {
      LF_ASSERT_OK_AND_ASSIGN(const auto parity, world.Split(world.rank() % 2, -world.rank()));
      LF_ASSERT_OK_AND_ASSIGN(const auto all, world.Split(0, 0));
      LF_ASSERT_OK_AND_ASSIGN(const auto alone, parity->Split(parity->rank(), 0));
      EXPECT_EQ(alone->size(), 1);
      EXPECT_EQ(all->rank(), world.rank());
      const int members = (size + 1 - world.rank() % 2) / 2;
      ASSERT_EQ(parity->size(), members);
      std::vector<int32_t> order(members);
      const int32_t me = world.rank();
      LF_ASSERT_OK(parity->AllGather(&me, order.data(), std::vector<int64_t>(members, 4), g_stream));
      for (int i = 1; i < members; ++i) EXPECT_EQ(order[i - 1] - order[i], 2) << "place " << i;
      int64_t sum = 1;
      LF_ASSERT_OK(all->AllReduce(&sum, 1, ReduceType::kInt64, ReduceOp::kSum, g_stream));
      LF_ASSERT_OK(parity->AllReduce(&sum, 1, ReduceType::kInt64, ReduceOp::kSum, g_stream));
      EXPECT_EQ(sum, int64_t{size} * members);
      LF_EXPECT_OK(world.Barrier(g_stream));
    });
  }
}

TEST_P(CommunicatorContract, AgreedStatusIsThatOfTheLowestFailingRank) {
  for (const int size : Sizes()) {
    OnEveryRank(size, [&](Communicator& world) {
      LF_EXPECT_OK(AgreeOnStatus(world, absl::OkStatus(), g_stream));
      const int lowest = size / 2;
      const bool fails = world.rank() >= lowest;
      const absl::Status mine =
          fails ? absl::ResourceExhaustedError("no memory at " + std::to_string(world.rank()))
                : absl::OkStatus();
      EXPECT_THAT(AgreeOnStatus(world, mine, g_stream),
                  StatusIs(absl::StatusCode::kResourceExhausted,
                           absl::StrCat(size > 1 ? absl::StrCat("rank ", lowest, ": ") : "", "no memory at ",
                                        lowest)));
      LF_EXPECT_OK(world.Barrier(g_stream)) << "the group stays usable";
    });
  }
}

TEST_P(CommunicatorContract, StringsOfAnyLengthTravel) {
  for (const int size : Sizes()) {
    OnEveryRank(size, [&](Communicator& world) {
      for (const size_t length : {size_t{0}, size_t{1}, size_t{100000}}) {
        const std::string text(length, 'x');
        const int root = size - 1;
        LF_ASSERT_OK_AND_ASSIGN(
            const std::string got,
            BroadcastString(world, world.rank() == root ? text : "other", root, g_stream));
        EXPECT_EQ(got, text);
      }
      LF_ASSERT_OK_AND_ASSIGN(
          const auto all, AllGatherStrings(world, std::string(world.rank(), 'a' + world.rank()), g_stream));
      ASSERT_EQ(all.size(), size);
      for (int r = 0; r < size; ++r) EXPECT_EQ(all[r], std::string(r, 'a' + r));
    });
  }
}

TEST_P(CommunicatorContract, LargePiecesArriveWhole) {
  for (const int size : Sizes()) {
    OnEveryRank(size, [&](Communicator& world) {
      const int64_t words = 700001;
      std::vector<uint32_t> mine(words), all(words * size);
      for (int64_t i = 0; i < words; ++i) mine[i] = static_cast<uint32_t>(i * 2654435761u + world.rank());
      const int64_t sent_before = world.bytes_sent();
      LF_ASSERT_OK(world.AllGather(mine.data(), all.data(), std::vector<int64_t>(size, words * 4), g_stream));
      for (int r = 0; r < size; ++r) {
        for (int64_t i = 0; i < words; ++i) {
          ASSERT_EQ(all[r * words + i], static_cast<uint32_t>(i * 2654435761u + r))
              << "rank " << r << " word " << i;
        }
      }
      EXPECT_EQ(world.bytes_sent() - sent_before, words * 4 * (size - 1));
      EXPECT_GE(world.seconds(), 0);
    });
  }
}

LF_INSTANTIATE_RANK_BACKENDS(CommunicatorContract);

}  // namespace
}  // namespace longfill
