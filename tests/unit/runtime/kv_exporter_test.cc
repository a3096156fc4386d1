// K and V from a device to a sink: on a device of the tests whose streams are threads, on the CPU, and on a
// GPU where there is one.

#include "runtime/kv/kv_exporter.h"

#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/kv/kv_discard_sink.h"
#include "tests/testing/status_matchers.h"
#include "tests/unit/runtime/fake_device.h"

namespace longfill {
namespace {

using std::chrono::milliseconds;
using testing::HasSubstr;

constexpr int64_t kLayers = 3, kHeads = 2, kHeadDim = 8, kRows = 300;
constexpr KvExporter::Shape kShape{.num_kv_heads = kHeads, .head_dim = kHeadDim};

// A value that says where it belongs.
uint16_t Element(bool key, int64_t layer, int64_t head, int64_t row, int64_t i) {
  return static_cast<uint16_t>((((key ? 1 : 2) * kLayers + layer) * kHeads + head) * 4800 + row * kHeadDim +
                               i);
}

// Checks what comes, in order, and remembers nothing else.
class CheckingSink final : public KvSink {
 public:
  absl::Status Append(int64_t layer, int64_t row_begin, int64_t row_end, HeadsView<const void> key,
                      HeadsView<const void> value, DType dtype) override {
    EXPECT_EQ(dtype, DType::kBFloat16);
    EXPECT_EQ(layer, layers);
    EXPECT_EQ(row_begin, rows);
    EXPECT_GT(row_end, row_begin);
    EXPECT_FALSE(inside.exchange(true));
    if (on_append) LF_RETURN_IF_ERROR(on_append(appends));
    for (int64_t head = 0; head < kHeads; ++head) {
      for (int64_t row = row_begin; row < row_end; ++row) {
        for (int64_t i = 0; i < kHeadDim; ++i) {
          wrong += At(key, head, row - row_begin, i) != Element(true, layer, head, row, i) ? 1 : 0;
          wrong += At(value, head, row - row_begin, i) != Element(false, layer, head, row, i) ? 1 : 0;
        }
      }
    }
    ++appends;
    rows = row_end;
    if (rows == kRows) {
      ++layers;
      rows = 0;
    }
    inside = false;
    return absl::OkStatus();
  }
  absl::Status Finish(const absl::Status&) override { return absl::OkStatus(); }

  void ExpectEverything() const {
    EXPECT_EQ(layers, kLayers);
    EXPECT_EQ(rows, 0);
    EXPECT_EQ(wrong, 0);
  }

  std::function<absl::Status(int64_t append)> on_append;
  std::atomic<int64_t> appends = 0;
  std::atomic<int64_t> layers = 0;
  int64_t rows = 0;
  int64_t wrong = 0;
  std::atomic<bool> inside = false;

 private:
  static uint16_t At(HeadsView<const void> view, int64_t head, int64_t row, int64_t i) {
    return static_cast<const uint16_t*>(view.data)[head * view.head_stride + row * view.row_stride + i];
  }
};

// Keys and values of one layer, [kHeads, kRows, kHeadDim] each, in memory that every layer writes over.
struct Layer {
  std::vector<uint16_t> key = std::vector<uint16_t>(kHeads * kRows * kHeadDim);
  std::vector<uint16_t> value = key;

  void Fill(int64_t layer, int64_t begin, int64_t end) {
    for (int64_t head = 0; head < kHeads; ++head) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t i = 0; i < kHeadDim; ++i) {
          const auto at = static_cast<size_t>((head * kRows + row) * kHeadDim + i);
          key[at] = Element(true, layer, head, row, i);
          value[at] = Element(false, layer, head, row, i);
        }
      }
    }
  }
};

HeadsView<const void> From(const void* data, int64_t row) {
  return {Advance(data, row * kHeadDim, DType::kBFloat16), kRows * kHeadDim, kHeadDim};
}

class KvExporterTest : public testing::Test {
 protected:
  absl::StatusOr<std::unique_ptr<KvExporter>> Create(const KvExportOptions& options) {
    LF_ASSIGN_OR_RETURN(ring_, KvRing::Allocate(device_, options));
    return KvExporter::Create(device_, ring_, sink_, kShape,
                              {.timeout = options.timeout, .should_stop = should_stop_});
  }

  // All layers in chunks of 128 rows. The device fills a chunk only when it comes to it, so that a copy that
  // does not wait, or comes after the next layer, is found by the sink.
  absl::Status RunLayers(KvExporter& exporter, milliseconds compute = milliseconds(0)) {
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      LF_RETURN_IF_ERROR(exporter.BeforeOverwrite());
      for (int64_t begin = 0; begin < kRows; begin += 128) {
        const int64_t end = std::min(kRows, begin + 128);
        device_.stream().Enqueue([this, layer, begin, end, compute] {
          std::this_thread::sleep_for(compute);
          layer_.Fill(layer, begin, end);
        });
        LF_RETURN_IF_ERROR(exporter.OnKv(layer, begin, end, From(layer_.key.data(), begin),
                                         From(layer_.value.data(), begin)));
      }
    }
    return absl::OkStatus();
  }

  Layer layer_;  // outlives the work of the device's streams
  FakeDevice device_;
  CheckingSink sink_;
  KvRing ring_;
  std::function<absl::Status()> should_stop_;
};

constexpr int64_t kRowBytes = 2 * kHeads * kHeadDim * 2;  // keys and values of all heads

TEST_F(KvExporterTest, SinkGetsEveryRowOnceInOrderWhateverTheBuffers) {
  for (const int num_buffers : {1, 2, 4}) {
    for (const int64_t rows : {1, 7, 128, 1000}) {
      for (const int64_t copy_us : {0, 20}) {
        SCOPED_TRACE(absl::StrCat(num_buffers, " buffers of ", rows, " rows, ", copy_us, " us a copy"));
        device_.copy_microseconds = rows == 1 ? 0 : copy_us;
        sink_.layers = 0;
        LF_ASSERT_OK_AND_ASSIGN(const auto exporter,
                                Create({.num_buffers = num_buffers, .buffer_bytes = rows * kRowBytes + 5}));
        LF_ASSERT_OK(RunLayers(*exporter, milliseconds(1)));
        LF_ASSERT_OK(exporter->Finish(absl::OkStatus()));
        sink_.ExpectEverything();
        LF_EXPECT_OK(exporter->Finish(absl::OkStatus()));
      }
    }
  }
}

TEST_F(KvExporterTest, SlowSinkHoldsTheNextLayerAndTheTimeIsCounted) {
  sink_.on_append = [](int64_t) {
    std::this_thread::sleep_for(milliseconds(10));
    return absl::OkStatus();
  };
  LF_ASSERT_OK_AND_ASSIGN(const auto exporter, Create({.num_buffers = 2, .buffer_bytes = 50 * kRowBytes}));
  LF_ASSERT_OK(RunLayers(*exporter));
  LF_ASSERT_OK(exporter->Finish(absl::OkStatus()));
  sink_.ExpectEverything();
  // Each layer has 7 pieces or more, of which two fit the ring: the next layer waits for the others twice.
  EXPECT_GE(exporter->exposed_seconds(), 2 * 5 * 0.010);
}

TEST_F(KvExporterTest, SinkThatKeepsUpExposesNothing) {
  LF_ASSERT_OK_AND_ASSIGN(const auto exporter, Create({}));
  LF_ASSERT_OK(RunLayers(*exporter, milliseconds(20)));
  LF_ASSERT_OK(exporter->Finish(absl::OkStatus()));
  sink_.ExpectEverything();
  EXPECT_LT(exporter->exposed_seconds(), 0.100);
}

TEST_F(KvExporterTest, SinkNeverHoldsMoreThanTheRing) {
  std::atomic<bool> released = false;
  sink_.on_append = [&](int64_t) {
    while (!released) std::this_thread::sleep_for(milliseconds(1));
    return absl::OkStatus();
  };
  LF_ASSERT_OK_AND_ASSIGN(const auto exporter, Create({.num_buffers = 3, .buffer_bytes = 10 * kRowBytes}));
  layer_.Fill(0, 0, kRows);
  LF_ASSERT_OK(exporter->OnKv(0, 0, kRows, From(layer_.key.data(), 0), From(layer_.value.data(), 0)));
  std::this_thread::sleep_for(milliseconds(100));
  EXPECT_EQ(device_.copies, 3 * 2 * kHeads);  // buffers, key and value of each head
  released = true;
  LF_EXPECT_OK(exporter->BeforeOverwrite());
  LF_EXPECT_OK(exporter->Finish(absl::OkStatus()));
  EXPECT_EQ(device_.copies, 30 * 2 * kHeads);
}

TEST_F(KvExporterTest, ErrorOfTheSinkEndsItAtTheNextCall) {
  for (const int64_t failing : {0, 3, 8}) {
    sink_.appends = 0;
    sink_.layers = 0;
    sink_.rows = 0;
    sink_.inside = false;
    sink_.on_append = [&](int64_t append) {
      if (append == failing) return absl::ResourceExhaustedError("the disk is full");
      return absl::OkStatus();
    };
    LF_ASSERT_OK_AND_ASSIGN(const auto exporter, Create({.num_buffers = 2, .buffer_bytes = 100 * kRowBytes}));
    const absl::Status ran = RunLayers(*exporter);
    const absl::Status status = exporter->Finish(ran);
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("disk is full")));
    if (!ran.ok()) {
      EXPECT_EQ(ran, status);
    }
    EXPECT_EQ(sink_.appends, failing);  // none after it
    EXPECT_EQ(exporter->OnKv(0, 0, 1, From(layer_.key.data(), 0), From(layer_.value.data(), 0)), status);
  }
}

TEST_F(KvExporterTest, CopyThatFailsIsTheErrorOfTheRequest) {
  for (const int64_t failing : {0, 1, 5, 11}) {
    sink_.layers = 0;
    sink_.rows = 0;
    device_.copies = 0;
    device_.failing_copy = failing;
    device_.copy_microseconds = 500;
    LF_ASSERT_OK_AND_ASSIGN(const auto exporter, Create({.num_buffers = 2, .buffer_bytes = 100 * kRowBytes}));
    const absl::Status ran = RunLayers(*exporter);
    EXPECT_THAT(exporter->Finish(ran),
                StatusIs(absl::StatusCode::kInternal, HasSubstr("cannot be enqueued")));
    EXPECT_EQ(sink_.wrong, 0);
  }
}

TEST_F(KvExporterTest, DeviceThatHangsIsWaitedForOnceAndItsBuffersAreUsedNoMore) {
  device_.copy_microseconds = 5000;
  device_.hangs = true;
  LF_ASSERT_OK_AND_ASSIGN(const auto exporter, Create({.num_buffers = 3, .buffer_bytes = 10 * kRowBytes}));
  layer_.Fill(0, 0, kRows);
  LF_ASSERT_OK(exporter->OnKv(0, 0, kRows, From(layer_.key.data(), 0), From(layer_.value.data(), 0)));
  EXPECT_THAT(exporter->Finish(absl::OkStatus()),
              StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("device hangs")));
  EXPECT_EQ(device_.waits_while_hung, 1);
  EXPECT_EQ(device_.copies, 3 * 2 * kHeads);
  EXPECT_EQ(sink_.appends, 0);
}

TEST_F(KvExporterTest, CancellationDropsWhatWaitsAndWaitsForWhatIsOnItsWay) {
  std::atomic<bool> released = false;
  sink_.on_append = [&](int64_t) {
    while (!released) std::this_thread::sleep_for(milliseconds(1));
    return absl::OkStatus();
  };
  device_.copy_microseconds = 2000;
  LF_ASSERT_OK_AND_ASSIGN(const auto exporter, Create({.num_buffers = 3, .buffer_bytes = 10 * kRowBytes}));
  {
    Layer dying;
    dying.Fill(0, 0, kRows);
    LF_ASSERT_OK(exporter->OnKv(0, 0, kRows, From(dying.key.data(), 0), From(dying.value.data(), 0)));
    while (sink_.inside == false) std::this_thread::sleep_for(milliseconds(1));
    std::thread release([&] {
      std::this_thread::sleep_for(milliseconds(30));
      released = true;
    });
    EXPECT_THAT(exporter->Finish(absl::CancelledError("the client is gone")),
                StatusIs(absl::StatusCode::kCancelled, HasSubstr("client is gone")));
    release.join();
    const int64_t copies = device_.copies;
    std::memset(dying.key.data(), 0xFF, dying.key.size() * sizeof(uint16_t));  // nobody reads it any more
    std::this_thread::sleep_for(milliseconds(20));
    EXPECT_EQ(device_.copies, copies);
  }
  EXPECT_EQ(sink_.appends, 1);  // the one that was under way
  EXPECT_EQ(sink_.wrong, 0);
}

TEST_F(KvExporterTest, DroppedExporterIsLikeACancelledOne) {
  device_.copy_microseconds = 2000;
  {
    LF_ASSERT_OK_AND_ASSIGN(const auto exporter, Create({.num_buffers = 2, .buffer_bytes = 20 * kRowBytes}));
    layer_.Fill(0, 0, kRows);
    LF_ASSERT_OK(exporter->OnKv(0, 0, kRows, From(layer_.key.data(), 0), From(layer_.value.data(), 0)));
  }
  EXPECT_EQ(sink_.layers, 0);
  EXPECT_EQ(sink_.wrong, 0);
}

TEST_F(KvExporterTest, SinkThatTakesNothingIsADeadline) {
  std::atomic<bool> released = false;
  sink_.on_append = [&](int64_t) {
    while (!released) std::this_thread::sleep_for(milliseconds(1));
    return absl::OkStatus();
  };
  LF_ASSERT_OK_AND_ASSIGN(
      const auto exporter,
      Create({.num_buffers = 2, .buffer_bytes = 10 * kRowBytes, .timeout = milliseconds(50)}));
  layer_.Fill(0, 0, kRows);
  LF_ASSERT_OK(exporter->OnKv(0, 0, kRows, From(layer_.key.data(), 0), From(layer_.value.data(), 0)));
  const absl::Status late = exporter->BeforeOverwrite();
  EXPECT_THAT(late, StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("for 50 ms")));
  released = true;
  EXPECT_EQ(exporter->Finish(late), late);
}

TEST_F(KvExporterTest, StopEndsTheWaitForASlowSink) {
  std::atomic<bool> released = false;
  sink_.on_append = [&](int64_t) {
    while (!released) std::this_thread::sleep_for(milliseconds(1));
    return absl::OkStatus();
  };
  std::atomic<bool> stop = false;
  should_stop_ = [&] { return stop ? absl::CancelledError("the client is gone") : absl::OkStatus(); };
  LF_ASSERT_OK_AND_ASSIGN(const auto exporter, Create({.num_buffers = 2, .buffer_bytes = 10 * kRowBytes}));
  layer_.Fill(0, 0, kRows);
  LF_ASSERT_OK(exporter->OnKv(0, 0, kRows, From(layer_.key.data(), 0), From(layer_.value.data(), 0)));
  std::thread stopping([&] {
    std::this_thread::sleep_for(milliseconds(50));
    stop = true;
  });
  const absl::Status stopped = exporter->BeforeOverwrite();
  EXPECT_THAT(stopped, StatusIs(absl::StatusCode::kCancelled, HasSubstr("client is gone")));
  stopping.join();
  released = true;
  EXPECT_EQ(exporter->Finish(stopped), stopped);
}

TEST_F(KvExporterTest, BufferBelowOneRowIsRefused) {
  EXPECT_THAT(Create({.num_buffers = 2, .buffer_bytes = kRowBytes - 1}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(absl::StrCat("takes ", kRowBytes))));
  EXPECT_THAT(Create({.num_buffers = 0}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("0 buffers")));
  LF_ASSERT_OK_AND_ASSIGN(const auto exporter, Create({}));
  EXPECT_THAT(exporter->OnKv(0, 0, 1, {nullptr, 100, kHeadDim + 1}, {nullptr, 100, kHeadDim}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("9 and 8 elements apart")));
}

TEST_F(KvExporterTest, RingIsWhatThePlanSays) {
  const KvExportOptions options{.num_buffers = 3, .buffer_bytes = 1000};
  LF_ASSERT_OK_AND_ASSIGN(const KvRing ring, KvRing::Allocate(device_, options));
  EXPECT_EQ(device_.host_memory().bytes_in_use(), KvRing::PlanBytes(DeviceKind::kCuda, options));
  EXPECT_EQ(device_.memory().bytes_in_use(), 0);
}

// ---- Without a device of its own

// Remembers the views that it was given.
class ViewSink final : public KvSink {
 public:
  absl::Status Append(int64_t layer, int64_t row_begin, int64_t row_end, HeadsView<const void> key_in,
                      HeadsView<const void> value_in, DType dtype) override {
    EXPECT_EQ(layer, 7);
    EXPECT_EQ(row_begin, 1);
    EXPECT_EQ(row_end, 3);
    EXPECT_EQ(dtype, DType::kFloat32);
    key = key_in;
    value = value_in;
    thread = std::this_thread::get_id();
    return answer;
  }
  absl::Status Finish(const absl::Status&) override { return absl::OkStatus(); }
  HeadsView<const void> key, value;
  std::thread::id thread;
  absl::Status answer;
};

TEST(KvExporterOnCpu, GivesTheSinkTheSameMemoryInTheSameThread) {
  const auto backend = CreateCpuBackend(1);
  LF_ASSERT_OK_AND_ASSIGN(KvRing ring, KvRing::Allocate(*backend, {}));
  EXPECT_EQ(backend->host_memory().bytes_in_use(), 0);
  EXPECT_EQ(KvRing::PlanBytes(DeviceKind::kCpu, {}), 0);
  ViewSink sink;
  LF_ASSERT_OK_AND_ASSIGN(const auto exporter, KvExporter::Create(*backend, ring, sink, kShape, {}));
  const float values[64] = {};
  const HeadsView<const void> key = {values, 32, 16};
  const HeadsView<const void> value = {values + 1, 32, 17};
  LF_EXPECT_OK(exporter->OnKv(7, 1, 3, key, value));
  EXPECT_EQ(sink.key.data, key.data);
  EXPECT_EQ(sink.value.data, value.data);
  EXPECT_EQ(sink.value.row_stride, 17);
  EXPECT_EQ(sink.thread, std::this_thread::get_id());
  LF_EXPECT_OK(exporter->BeforeOverwrite());
  EXPECT_EQ(exporter->exposed_seconds(), 0);
  sink.answer = absl::DataLossError("broken");
  EXPECT_EQ(exporter->OnKv(7, 1, 3, key, value), sink.answer);
  EXPECT_EQ(exporter->BeforeOverwrite(), sink.answer);
  EXPECT_EQ(exporter->Finish(absl::OkStatus()), sink.answer);
}

// ---- On a GPU

TEST(KvExporterOnCuda, SinkGetsWhatIsOnTheDevice) {
  const auto created = CreateCudaBackend({});
  if (!created.ok()) GTEST_SKIP() << created.status().message();
  Backend& backend = **created;
  LF_ASSERT_OK_AND_ASSIGN(KvRing ring,
                          KvRing::Allocate(backend, {.num_buffers = 3, .buffer_bytes = 37 * kRowBytes}));
  constexpr int64_t kBytes = kHeads * kRows * kHeadDim * 2;
  LF_ASSERT_OK_AND_ASSIGN(const Buffer key, backend.memory().Allocate(kBytes, "keys"));
  LF_ASSERT_OK_AND_ASSIGN(const Buffer value, backend.memory().Allocate(kBytes, "values"));
  CheckingSink sink;
  LF_ASSERT_OK_AND_ASSIGN(const auto exporter, KvExporter::Create(backend, ring, sink, kShape, {}));
  for (int64_t layer = 0; layer < kLayers; ++layer) {
    Layer host;
    host.Fill(layer, 0, kRows);
    LF_ASSERT_OK(exporter->BeforeOverwrite());
    LF_ASSERT_OK(backend.kernels().CopyIn(key.data(), host.key.data(), kBytes, backend.stream()));
    LF_ASSERT_OK(backend.kernels().CopyIn(value.data(), host.value.data(), kBytes, backend.stream()));
    for (int64_t begin = 0; begin < kRows; begin += 128) {
      LF_ASSERT_OK(exporter->OnKv(layer, begin, std::min(kRows, begin + 128), From(key.data(), begin),
                                  From(value.data(), begin)));
    }
  }
  LF_ASSERT_OK(exporter->Finish(absl::OkStatus()));
  sink.ExpectEverything();
  EXPECT_GE(exporter->exposed_seconds(), 0);
}

}  // namespace
}  // namespace longfill
