#include "deploy/doctor/gpu_probe.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace longfill {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kRounds = 4;  // the first one warms up

double SecondsSince(Clock::time_point start) {
  return std::max(std::chrono::duration<double>(Clock::now() - start).count(), 1e-9);
}

uint8_t ByteOf(int rank, int64_t i) { return static_cast<uint8_t>(rank * 37 + i * 11 + (i >> 8)); }

void Fill(Buffer& buffer, int rank) {
  for (int64_t i = 0; i < buffer.size_bytes(); ++i) buffer.as<uint8_t>()[i] = ByteOf(rank, i);
}

absl::StatusOr<int64_t> SumOfRanks(Communicator& communicator, Backend& backend) {
  LF_ASSIGN_OR_RETURN(const Buffer number, backend.memory().Allocate(sizeof(int64_t), "a reduced number"));
  int64_t value = communicator.rank() + 1;
  LF_RETURN_IF_ERROR(backend.kernels().CopyIn(number.data(), &value, sizeof(value), backend.stream()));
  LF_RETURN_IF_ERROR(
      communicator.AllReduce(number.data(), 1, ReduceType::kInt64, ReduceOp::kSum, backend.stream()));
  LF_RETURN_IF_ERROR(backend.kernels().CopyOut(&value, number.data(), sizeof(value), backend.stream()));
  LF_RETURN_IF_ERROR(backend.stream().Sync());
  return value;
}

}  // namespace

absl::StatusOr<HostCopyRates> MeasureHostCopy(Backend& backend, int64_t bytes) {
  LF_ASSIGN_OR_RETURN(Buffer there, backend.host_memory().Allocate(bytes, "a host copy"));
  LF_ASSIGN_OR_RETURN(Buffer back, backend.host_memory().Allocate(bytes, "a host copy"));
  LF_ASSIGN_OR_RETURN(const Buffer device, backend.memory().Allocate(bytes, "a host copy"));
  Fill(there, 0);
  std::memset(back.data(), 0, static_cast<size_t>(bytes));
  Stream& stream = backend.stream();
  HostCopyRates rates;
  for (int round = 0; round < kRounds; ++round) {
    LF_RETURN_IF_ERROR(stream.Sync());
    Clock::time_point start = Clock::now();
    LF_RETURN_IF_ERROR(backend.kernels().CopyIn(device.data(), there.data(), bytes, stream));
    LF_RETURN_IF_ERROR(stream.Sync());
    if (round > 0)
      rates.to_device = std::max(rates.to_device, static_cast<double>(bytes) / SecondsSince(start));
    start = Clock::now();
    LF_RETURN_IF_ERROR(backend.kernels().CopyOut(back.data(), device.data(), bytes, stream));
    LF_RETURN_IF_ERROR(stream.Sync());
    if (round > 0) rates.to_host = std::max(rates.to_host, static_cast<double>(bytes) / SecondsSince(start));
  }
  rates.intact = std::memcmp(there.data(), back.data(), static_cast<size_t>(bytes)) == 0;
  return rates;
}

absl::StatusOr<std::vector<PeerRate>> MeasurePeers(const std::vector<CudaDeviceFacts>& devices,
                                                   int64_t bytes) {
  std::vector<PeerRate> peers;
  for (int from = 0; from < static_cast<int>(devices.size()); ++from) {
    for (int to = 0; to < static_cast<int>(devices.size()); ++to) {
      if (from == to) continue;
      LF_ASSIGN_OR_RETURN(const double rate, MeasurePeerCopy(from, to, bytes));
      peers.push_back({from, to, devices[from].reaches[to], rate});
    }
  }
  return peers;
}

absl::StatusOr<DeviceExchange> MeasureDeviceExchange(Communicator& communicator, Backend& backend,
                                                     int64_t bytes) {
  const int size = communicator.size();
  CpuStream host_stream;
  DeviceExchange result;
  LF_ASSIGN_OR_RETURN(const int64_t sum, SumOfRanks(communicator, backend));
  if (const int64_t expected = int64_t{size} * (size + 1) / 2; sum != expected) {
    result.wrong = absl::StrCat("a sum of integers is ", sum, ", expected is ", expected);
  }
  LF_ASSIGN_OR_RETURN(Buffer host, backend.host_memory().Allocate(bytes * size, "an exchange"));
  LF_ASSIGN_OR_RETURN(const Buffer mine, backend.memory().Allocate(bytes, "an exchange"));
  LF_ASSIGN_OR_RETURN(const Buffer all, backend.memory().Allocate(bytes * size, "an exchange"));
  for (int64_t i = 0; i < bytes; ++i) host.as<uint8_t>()[i] = ByteOf(communicator.rank(), i);
  LF_RETURN_IF_ERROR(backend.kernels().CopyIn(mine.data(), host.data(), bytes, backend.stream()));
  const std::vector<int64_t> counts(size, bytes);
  double rate = 0;
  for (int round = 0; round < kRounds; ++round) {
    LF_RETURN_IF_ERROR(backend.stream().Sync());
    LF_RETURN_IF_ERROR(communicator.Barrier(host_stream));
    const Clock::time_point start = Clock::now();
    LF_RETURN_IF_ERROR(communicator.AllGather(mine.data(), all.data(), counts, backend.stream()));
    LF_RETURN_IF_ERROR(backend.stream().Sync());
    rate = std::max(rate, static_cast<double>(bytes * (size - 1)) / SecondsSince(start));
  }
  LF_RETURN_IF_ERROR(backend.kernels().CopyOut(host.data(), all.data(), bytes * size, backend.stream()));
  LF_RETURN_IF_ERROR(backend.stream().Sync());
  for (int64_t i = 0; i < bytes * size && result.wrong.empty(); ++i) {
    const auto from = static_cast<int>(i / bytes);
    if (host.as<uint8_t>()[i] != ByteOf(from, i % bytes)) {
      result.wrong = absl::StrCat("bytes of rank ", from, " came changed");
    }
  }
  LF_RETURN_IF_ERROR(communicator.AllReduce(&rate, 1, ReduceType::kFloat64, ReduceOp::kMin, host_stream));
  result.bytes_per_second = rate;
  return result;
}

}  // namespace longfill
