#include "deploy/doctor/exchange_probe.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "absl/strings/str_cat.h"

namespace longfill {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kReducedNumbers = 1000;
constexpr int kLatencyRounds = 51;
constexpr int kLinkRounds = 3;
constexpr int kClockRounds = 9;
constexpr int kAllPairsUpTo = 16;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// What rank `rank` adds at `i`: nothing that two ranks or places have in common, and not exact in binary.
double Summand(int rank, int64_t i) { return 0.1 * (rank + 1) + 0.001 * static_cast<double>(i); }

absl::StatusOr<std::string> CheckIntegers(Communicator& communicator, ReduceOp op) {
  CpuStream stream;
  const int64_t ranks = communicator.size();
  std::vector<int64_t> numbers(kReducedNumbers);
  for (int64_t i = 0; i < kReducedNumbers; ++i) numbers[i] = (communicator.rank() + 1) * (i + 1);
  LF_RETURN_IF_ERROR(communicator.AllReduce(numbers.data(), kReducedNumbers, ReduceType::kInt64, op, stream));
  for (int64_t i = 0; i < kReducedNumbers; ++i) {
    const int64_t expected = (op == ReduceOp::kSum ? ranks * (ranks + 1) / 2 : ranks) * (i + 1);
    if (numbers[i] == expected) continue;
    return absl::StrCat("a ", op == ReduceOp::kSum ? "sum" : "maximum", " of integers is ", numbers[i],
                        " at place ", i, ", expected is ", expected);
  }
  return "";
}

absl::StatusOr<std::string> CheckFloats(Communicator& communicator) {
  CpuStream stream;
  std::vector<double> numbers(kReducedNumbers);
  for (int64_t i = 0; i < kReducedNumbers; ++i) numbers[i] = Summand(communicator.rank(), i);
  LF_RETURN_IF_ERROR(
      communicator.AllReduce(numbers.data(), kReducedNumbers, ReduceType::kFloat64, ReduceOp::kSum, stream));
  for (int64_t i = 0; i < kReducedNumbers; ++i) {
    double expected = Summand(0, i);
    for (int rank = 1; rank < communicator.size(); ++rank) expected += Summand(rank, i);
    if (numbers[i] == expected) continue;
    return absl::StrCat("a sum of floats is ", numbers[i], " at place ", i, ", expected is ", expected);
  }
  return "";
}

// How far behind a rank those are that it sends to.
std::vector<int> Distances(int num_ranks) {
  std::vector<int> distances;
  for (int d = 1; d < num_ranks; d = num_ranks <= kAllPairsUpTo ? d + 1 : 2 * d) distances.push_back(d);
  return distances;
}

uint8_t ByteOf(int from, int to, int64_t i) { return static_cast<uint8_t>(from * 31 + to * 7 + i); }

// What this rank receives from the one `distance` before it.
absl::StatusOr<LinkRate> MeasureOne(Communicator& communicator, int distance, std::vector<uint8_t>& send,
                                    std::vector<uint8_t>& recv) {
  CpuStream stream;
  const int size = communicator.size();
  const int rank = communicator.rank();
  const int to = (rank + distance) % size;
  const int from = (rank - distance + size) % size;
  const auto bytes = static_cast<int64_t>(send.size());
  std::vector<int64_t> send_bytes(size, 0);
  std::vector<int64_t> recv_bytes(size, 0);
  send_bytes[to] = bytes;
  recv_bytes[from] = bytes;
  for (int64_t i = 0; i < bytes; ++i) send[i] = ByteOf(rank, to, i);
  std::fill(recv.begin(), recv.end(), uint8_t{0});
  LinkRate link{.from = from, .to = rank};
  for (int round = 0; round < kLinkRounds; ++round) {
    LF_RETURN_IF_ERROR(communicator.Barrier(stream));
    const Clock::time_point start = Clock::now();
    LF_RETURN_IF_ERROR(communicator.AllToAll(send.data(), send_bytes, recv.data(), recv_bytes, stream));
    link.bytes_per_second =
        std::max(link.bytes_per_second, static_cast<double>(bytes) / std::max(SecondsSince(start), 1e-9));
  }
  for (int64_t i = 0; i < bytes && link.intact; ++i) link.intact = recv[i] == ByteOf(from, rank, i);
  return link;
}

// Every rank's element, by rank.
template <typename T>
absl::StatusOr<std::vector<T>> Gather(Communicator& communicator, const T& mine) {
  CpuStream stream;
  std::vector<T> all(communicator.size());
  LF_RETURN_IF_ERROR(communicator.AllGather(
      &mine, all.data(), std::vector<int64_t>(communicator.size(), int64_t{sizeof(T)}), stream));
  return all;
}

}  // namespace

absl::StatusOr<std::string> CheckReductions(Communicator& communicator) {
  // All are run by all ranks, whatever one of them finds.
  LF_ASSIGN_OR_RETURN(const std::string sums, CheckIntegers(communicator, ReduceOp::kSum));
  LF_ASSIGN_OR_RETURN(const std::string maxima, CheckIntegers(communicator, ReduceOp::kMax));
  LF_ASSIGN_OR_RETURN(const std::string floats, CheckFloats(communicator));
  return !sums.empty() ? sums : !maxima.empty() ? maxima : floats;
}

absl::StatusOr<double> MeasureLatency(Communicator& communicator) {
  CpuStream stream;
  LF_RETURN_IF_ERROR(communicator.Barrier(stream));
  std::vector<double> seconds;
  for (int round = 0; round < kLatencyRounds; ++round) {
    int64_t number = 1;
    const Clock::time_point start = Clock::now();
    LF_RETURN_IF_ERROR(communicator.AllReduce(&number, 1, ReduceType::kInt64, ReduceOp::kSum, stream));
    seconds.push_back(SecondsSince(start));
  }
  std::nth_element(seconds.begin(), seconds.begin() + kLatencyRounds / 2, seconds.end());
  double slowest = seconds[kLatencyRounds / 2];
  LF_RETURN_IF_ERROR(communicator.AllReduce(&slowest, 1, ReduceType::kFloat64, ReduceOp::kMax, stream));
  return slowest;
}

absl::StatusOr<std::vector<LinkRate>> MeasureLinks(Communicator& communicator, int64_t bytes) {
  std::vector<uint8_t> send(static_cast<size_t>(bytes));
  std::vector<uint8_t> recv(static_cast<size_t>(bytes));
  std::vector<LinkRate> links;
  for (const int distance : Distances(communicator.size())) {
    LF_ASSIGN_OR_RETURN(const LinkRate mine, MeasureOne(communicator, distance, send, recv));
    LF_ASSIGN_OR_RETURN(const std::vector<LinkRate> all, Gather(communicator, mine));
    links.insert(links.end(), all.begin(), all.end());
  }
  return links;
}

// Rank 0 asks all at once; each reads its clock when it is asked, so its reading lies between rank 0's two.
// The round with the shortest way there and back counts, as in NTP (RFC 5905, section 8).
absl::StatusOr<std::vector<ClockOffset>> MeasureClocks(Communicator& communicator,
                                                       const std::function<double()>& wall_seconds) {
  CpuStream stream;
  std::vector<ClockOffset> best(communicator.size());
  double shortest = HUGE_VAL;
  for (int round = 0; round < kClockRounds; ++round) {
    LF_RETURN_IF_ERROR(communicator.Barrier(stream));
    const Clock::time_point start = Clock::now();
    const double asked = wall_seconds();
    uint8_t question = 0;
    LF_RETURN_IF_ERROR(communicator.Broadcast(&question, 1, 0, stream));
    LF_ASSIGN_OR_RETURN(const std::vector<double> readings, Gather(communicator, wall_seconds()));
    const double trip = SecondsSince(start);
    if (trip >= shortest) continue;
    shortest = trip;
    for (int rank = 0; rank < communicator.size(); ++rank) {
      best[rank] = rank == 0 ? ClockOffset{} : ClockOffset{readings[rank] - (asked + trip / 2), trip / 2};
    }
  }
  // Rank 0's, which knows both ends.
  LF_RETURN_IF_ERROR(communicator.Broadcast(
      best.data(), static_cast<int64_t>(best.size() * sizeof(ClockOffset)), 0, stream));
  return best;
}

double WallSeconds() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

}  // namespace longfill
