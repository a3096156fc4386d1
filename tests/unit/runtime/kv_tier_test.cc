// What every tier of the KV store must do, from the exporter to a reader, and what each does in its own way:
// on the CPU, on a device of the tests whose streams are threads, and on a GPU where there is one.

#include "runtime/kv/kv_tier.h"

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/kv/file_memory.h"
#include "runtime/kv/kv_exporter.h"
#include "runtime/kv/kv_store.h"
#include "tests/testing/status_matchers.h"
#include "tests/unit/models/test_files.h"
#include "tests/unit/runtime/fake_device.h"

namespace longfill {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using std::chrono::steady_clock;
using testing::AllOf;
using testing::HasSubstr;

constexpr int64_t kLayers = 3, kHeads = 2, kHeadDim = 8, kTokens = 300;
constexpr int64_t kRingRows = 70;  // of the reader's ring: a layer does not fit, nor do rows divide it
constexpr int64_t kPieceBytes = 40 * 2 * kHeads * kHeadDim * 2;

// Small integers: exact in every float type.
float Element(bool key, int64_t layer, int64_t head, int64_t token, int64_t i) {
  return static_cast<float>(((layer * kHeads + head) * 31 + token * 7 + i * 3 + (key ? 100 : 0)) % 251);
}

struct Case {
  std::string tier;
  std::string device;  // "cpu", "fake_device" or "cuda"
};

class KvTierTest : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    if (GetParam().device == "fake_device") {
      backend_ = std::make_unique<FakeDevice>();
    } else if (GetParam().device == "cuda") {
      absl::StatusOr<std::unique_ptr<Backend>> created = CreateCudaBackend({});
      if (!created.ok()) GTEST_SKIP() << created.status().message();
      backend_ = *std::move(created);
    } else {
      backend_ = CreateCpuBackend(1);
    }
    LF_ASSERT_OK_AND_ASSIGN(files_, FileMemoryResource::Create(directory_.path()));
    KvPromptShape shape{.num_layers = kLayers,
                        .num_kv_heads = kHeads,
                        .num_rows = kTokens,
                        .head_dim = kHeadDim,
                        .kv_dtype = DType::kBFloat16,
                        .compute_dtype = backend_->kernels().compute_dtype()};
    if (GetParam().tier == "device") {
      const int64_t needed = PlanKvTier({.kind = KvTierKind::kDevice}, shape).device_needed_bytes;
      LF_ASSERT_OK_AND_ASSIGN(tier_, MakeDeviceTier(*backend_, needed));
    } else if (GetParam().tier == "reader") {
      tier_ = MakeReaderTier(&memory_, kRingRows * 2 * kHeads * kHeadDim * 2);
    } else {
      tier_ =
          MakeMemoryTier(GetParam().tier == "file" ? static_cast<MemoryResource*>(files_.get()) : &memory_);
    }
    store_ = std::make_unique<KvStore>(
        KvStoreOptions{.reader_timeout = reader_timeout_, .clock = [this] { return now_.load(); }},
        tier_.get());
    LF_ASSERT_OK_AND_ASSIGN(ring_, KvRing::Allocate(*backend_, {.num_buffers = 2, .buffer_bytes = 5000}));
  }

  bool hands_over() const { return GetParam().tier == "reader"; }

  static KvTransferSpec Spec(const std::string& id, DType dtype = DType::kBFloat16,
                             int64_t num_tokens = kTokens) {
    return {.request_id = "request",
            .transfer_id = id,
            .plan = ShardPlan({1, 1}, num_tokens),
            .num_layers = kLayers,
            .num_kv_heads = kHeads,
            .head_dim = kHeadDim,
            .dtype = dtype};
  }

  // The engine's part: every layer in chunks of 128 rows, over the same memory, then Finish.
  absl::Status Prefill(KvSink& sink, const KvTransferSpec& spec,
                       const std::function<absl::Status()>& should_stop = {}) {
    const absl::Status outcome = Export(sink, spec, should_stop);
    const absl::Status finished = sink.Finish(outcome);
    return outcome.ok() ? finished : outcome;
  }

  absl::Status Export(KvSink& sink, const KvTransferSpec& spec,
                      const std::function<absl::Status()>& should_stop) {
    const int64_t rows = spec.plan.NumTokens(0);
    const DType dtype = backend_->kernels().compute_dtype();
    const int64_t half = kHeads * rows * kHeadDim * DTypeBytes(dtype);
    MemoryResource& memory = GetParam().device == "cuda" ? backend_->memory() : memory_;
    LF_ASSIGN_OR_RETURN(const Buffer key, memory.Allocate(half, "keys"));
    LF_ASSIGN_OR_RETURN(const Buffer value, memory.Allocate(half, "values"));
    LF_ASSIGN_OR_RETURN(
        const auto exporter,
        KvExporter::Create(*backend_, ring_, sink, {.num_kv_heads = kHeads, .head_dim = kHeadDim},
                           {.timeout = seconds(20), .should_stop = should_stop}));
    absl::Status status;
    for (int64_t layer = 0; layer < kLayers && status.ok(); ++layer) {
      status = exporter->BeforeOverwrite();
      for (int64_t begin = 0; begin < rows && status.ok(); begin += 128) {
        const int64_t end = std::min(rows, begin + 128);
        Compute(layer, begin, end, rows, key.data(), value.data());
        const auto from = [&](const Buffer& buffer) {
          return HeadsView<const void>{Advance(buffer.data(), begin * kHeadDim, dtype), rows * kHeadDim,
                                       kHeadDim};
        };
        status = exporter->OnKv(layer, begin, end, from(key), from(value));
      }
    }
    return exporter->Finish(status);
  }

  // Rows of a layer, when the device comes to it.
  void Compute(int64_t layer, int64_t begin, int64_t end, int64_t rows, void* key, void* value) {
    const DType dtype = backend_->kernels().compute_dtype();
    const auto fill = [=] {
      for (int64_t head = 0; head < kHeads; ++head) {
        for (int64_t row = begin; row < end; ++row) {
          for (int64_t i = 0; i < kHeadDim; ++i) {
            const float k = Element(true, layer, head, row, i), v = Element(false, layer, head, row, i);
            const int64_t at = (head * rows + row) * kHeadDim + i;
            NarrowFromFloat(&k, 1, dtype, Advance(key, at, dtype));
            NarrowFromFloat(&v, 1, dtype, Advance(value, at, dtype));
          }
        }
      }
    };
    if (GetParam().device == "fake_device") {
      static_cast<FakeDevice&>(*backend_).stream().Enqueue(fill);
    } else if (GetParam().device == "cuda") {
      CopyRowsIn(layer, begin, end, rows, key, value);
    } else {
      fill();
    }
  }

  // The same on a GPU: [kHeadDim] bfloat16 rows of each head, one behind the other.
  void CopyRowsIn(int64_t layer, int64_t begin, int64_t end, int64_t rows, void* key, void* value) {
    for (const bool is_key : {true, false}) {
      for (int64_t head = 0; head < kHeads; ++head) {
        std::vector<float> wide;
        for (int64_t row = begin; row < end; ++row) {
          for (int64_t i = 0; i < kHeadDim; ++i) wide.push_back(Element(is_key, layer, head, row, i));
        }
        const auto count = static_cast<int64_t>(wide.size());
        std::vector<uint16_t> narrow(wide.size());
        NarrowFromFloat(wide.data(), count, DType::kBFloat16, narrow.data());
        void* const to = Advance(is_key ? key : value, (head * rows + begin) * kHeadDim, DType::kBFloat16);
        EXPECT_THAT(backend_->kernels().CopyIn(to, narrow.data(), 2 * count, backend_->stream()), IsOk());
      }
    }
  }

  // Reads layers [begin, end) and checks every element.
  absl::Status ReadLayers(KvReader& reader, int64_t begin, int64_t end,
                          KvLayout layout = KvLayout::kHeadsTokens, milliseconds pause = milliseconds(0)) {
    const KvTransferSpec& spec = reader.spec();
    for (int64_t layer = begin; layer < end; ++layer) {
      for (const KvPiece& piece : CutIntoPieces(reader.selection(), spec, kPieceBytes)) {
        LF_RETURN_IF_ERROR(ReadPiece(reader, layer, piece, layout));
        std::this_thread::sleep_for(pause);
      }
    }
    return absl::OkStatus();
  }

  absl::Status ReadPiece(KvReader& reader, int64_t layer, const KvPiece& piece, KvLayout layout) {
    LF_RETURN_IF_ERROR(
        reader.WaitForRows(layer, piece.row_begin + piece.num_tokens, steady_clock::now() + seconds(20)));
    std::string key, value;
    LF_RETURN_IF_ERROR(reader.Copy(layer, piece, layout, &key, &value));
    const KvSelection& selection = reader.selection();
    const int64_t num_heads = selection.head_end - selection.head_begin;
    for (int64_t head = 0; head < num_heads; ++head) {
      for (int64_t token = 0; token < piece.num_tokens; ++token) {
        for (int64_t i = 0; i < kHeadDim; ++i) {
          const int64_t row =
              layout == KvLayout::kHeadsTokens ? head * piece.num_tokens + token : token * num_heads + head;
          const auto got = [&](const std::string& bytes) {
            float wide = 0;
            const void* const from = bytes.data();
            WidenToFloat(Advance(from, row * kHeadDim + i, reader.spec().dtype), reader.spec().dtype, 1,
                         &wide);
            return wide;
          };
          const int64_t h = selection.head_begin + head, t = piece.token_begin + token;
          if (got(key) != Element(true, layer, h, t, i) || got(value) != Element(false, layer, h, t, i)) {
            return absl::DataLossError(absl::StrCat("layer ", layer, " head ", h, " token ", t));
          }
        }
      }
    }
    return absl::OkStatus();
  }

  TransferStatus StatusOf(const std::string& id) { return store_->GetStatus(id).value_or(TransferStatus{}); }

  void ExpectEmpty() {
    const KvStoreUsage usage = store_->usage();
    EXPECT_EQ(usage.open_transfers, 0);
    EXPECT_EQ(usage.bytes_open, 0);
    EXPECT_EQ(usage.bytes_lingering, 0);
    EXPECT_EQ(memory_.bytes_in_use(), 0);
    EXPECT_EQ(files_->bytes_in_use(), 0);
  }

  const milliseconds reader_timeout_{300};
  std::atomic<steady_clock::time_point> now_ = steady_clock::now();
  const TempDir directory_;
  std::unique_ptr<Backend> backend_;
  CpuMemoryResource memory_;
  std::unique_ptr<FileMemoryResource> files_;
  std::unique_ptr<KvTier> tier_;
  std::unique_ptr<KvStore> store_;
  KvRing ring_;
};

TEST_P(KvTierTest, ReaderGetsEverythingWhileItIsComputed) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const KvLayout layout : {KvLayout::kHeadsTokens, KvLayout::kTokensHeads}) {
      const KvTransferSpec spec =
          Spec(absl::StrCat(static_cast<int>(dtype), " ", static_cast<int>(layout)), dtype);
      LF_ASSERT_OK_AND_ASSIGN(const auto sink, store_->Open(spec));
      LF_ASSERT_OK_AND_ASSIGN(auto reader, store_->Read(spec.transfer_id));
      std::thread consumer([&] { EXPECT_THAT(ReadLayers(*reader, 0, kLayers, layout), IsOk()); });
      EXPECT_THAT(Prefill(*sink, spec), IsOk());
      consumer.join();
      reader.reset();
      LF_EXPECT_OK(store_->End(spec.transfer_id, TransferState::kComplete, absl::OkStatus()));
      ExpectEmpty();
    }
  }
}

TEST_P(KvTierTest, SlowReaderLosesNothing) {
  const KvTransferSpec spec = Spec("id");
  LF_ASSERT_OK_AND_ASSIGN(const auto sink, store_->Open(spec));
  LF_ASSERT_OK_AND_ASSIGN(const auto reader, store_->Read("id"));
  std::thread consumer([&] {
    EXPECT_THAT(ReadLayers(*reader, 0, kLayers, KvLayout::kHeadsTokens, milliseconds(10)), IsOk());
  });
  EXPECT_THAT(Prefill(*sink, spec), IsOk());
  consumer.join();
  EXPECT_EQ(StatusOf("id").layers_ready, kLayers);
}

TEST_P(KvTierTest, NobodyReads) {
  const KvTransferSpec spec = Spec("id");
  LF_ASSERT_OK_AND_ASSIGN(const auto sink, store_->Open(spec));
  const auto start = steady_clock::now();
  const absl::Status outcome = Prefill(*sink, spec);
  if (hands_over()) {
    EXPECT_THAT(outcome, StatusIs(absl::StatusCode::kDeadlineExceeded,
                                  AllOf(HasSubstr("layer 0 waited 300 ms"), HasSubstr("row 70"),
                                        HasSubstr("nobody reads"))));
    EXPECT_GE(steady_clock::now() - start, reader_timeout_);
    EXPECT_EQ(StatusOf("id").state, TransferState::kFailed);
    EXPECT_THAT(store_->Read("id"), StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("layer 0")));
  } else {
    LF_EXPECT_OK(outcome);
    now_ = now_.load() + seconds(31);
    EXPECT_EQ(store_->ExpireLeases(), 1);
  }
  ExpectEmpty();
}

TEST_P(KvTierTest, ReaderThatStopsTaking) {
  const KvTransferSpec spec = Spec("id");
  LF_ASSERT_OK_AND_ASSIGN(const auto sink, store_->Open(spec));
  LF_ASSERT_OK_AND_ASSIGN(auto reader, store_->Read("id"));
  std::thread consumer([&] { EXPECT_THAT(ReadLayers(*reader, 0, 1), IsOk()); });
  const absl::Status outcome = Prefill(*sink, spec);
  consumer.join();
  if (hands_over()) {
    EXPECT_THAT(outcome, StatusIs(absl::StatusCode::kDeadlineExceeded,
                                  AllOf(HasSubstr("layer 1 waited 300 ms"), HasSubstr("too slow"))));
  } else {
    LF_EXPECT_OK(outcome);
    LF_EXPECT_OK(ReadLayers(*reader, 1, kLayers));
    LF_EXPECT_OK(store_->End("id", TransferState::kComplete, absl::OkStatus()));
  }
  reader.reset();
  ExpectEmpty();
}

TEST_P(KvTierTest, ReaderThatGoesInTheMiddleOfALayer) {
  const KvTransferSpec spec = Spec("id");
  LF_ASSERT_OK_AND_ASSIGN(const auto sink, store_->Open(spec));
  std::thread consumer([&] {
    auto reader = store_->Read("id");
    ASSERT_THAT(reader, IsOk());
    const auto pieces = CutIntoPieces((*reader)->selection(), spec, kPieceBytes);
    EXPECT_THAT(ReadPiece(**reader, 0, pieces[0], KvLayout::kHeadsTokens), IsOk());
    reader->reset();
  });
  const absl::Status outcome = Prefill(*sink, spec);
  consumer.join();
  if (hands_over()) {
    EXPECT_THAT(outcome, StatusIs(absl::StatusCode::kAborted, HasSubstr("left at row 40 of 300 of layer 0")));
    EXPECT_EQ(StatusOf("id").state, TransferState::kFailed);
  } else {
    LF_EXPECT_OK(outcome);
    LF_ASSERT_OK_AND_ASSIGN(const auto again, store_->Read("id"));
    LF_EXPECT_OK(ReadLayers(*again, 0, kLayers));
    LF_EXPECT_OK(store_->End("id", TransferState::kComplete, absl::OkStatus()));
  }
  ExpectEmpty();
}

TEST_P(KvTierTest, ReadersOneAfterTheOther) {
  const KvTransferSpec spec = Spec("id");
  LF_ASSERT_OK_AND_ASSIGN(const auto sink, store_->Open(spec));
  std::thread consumer([&] {
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      const auto reader = store_->Read("id", {.layer_begin = layer, .layer_end = layer + 1});
      ASSERT_THAT(reader, IsOk());
      EXPECT_THAT(ReadLayers(**reader, layer, layer + 1), IsOk());
    }
  });
  EXPECT_THAT(Prefill(*sink, spec), IsOk());
  consumer.join();
  if (hands_over()) {
    EXPECT_THAT(
        store_->Read("id", {.layer_begin = 1}),
        StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("layer 1 is asked for, layer 3 is next")));
  } else {
    LF_EXPECT_OK(store_->Read("id", {.layer_begin = 1}).status());
  }
}

TEST_P(KvTierTest, ReadersAtTheSameTimeAndPartsOfAPage) {
  const KvTransferSpec spec = Spec("id");
  LF_ASSERT_OK_AND_ASSIGN(const auto sink, store_->Open(spec));
  LF_ASSERT_OK_AND_ASSIGN(auto first, store_->Read("id"));
  const KvSelection part{.head_begin = 1, .token_begin = 130, .token_end = 290};
  if (hands_over()) {
    EXPECT_THAT(store_->Read("id"),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("another reader")));
    EXPECT_THAT(store_->Read("id", part), StatusIs(absl::StatusCode::kInvalidArgument,
                                                   HasSubstr("heads [1, 2) and tokens [130, 290)")));
    first.reset();  // nothing was taken: somebody else may
    LF_EXPECT_OK(store_->Read("id").status());
    return;
  }
  std::vector<std::thread> consumers;
  for (int i = 0; i < 6; ++i) {
    consumers.emplace_back([&, i] {
      const auto reader = store_->Read("id", i % 2 == 0 ? KvSelection{} : part);
      ASSERT_THAT(reader, IsOk());
      const KvLayout layout = i % 3 == 0 ? KvLayout::kTokensHeads : KvLayout::kHeadsTokens;
      EXPECT_THAT(ReadLayers(**reader, 0, kLayers, layout), IsOk());
    });
  }
  EXPECT_THAT(Prefill(*sink, spec), IsOk());
  for (std::thread& consumer : consumers) consumer.join();
}

TEST_P(KvTierTest, ConsumerThatEndsTheTransferDoesNotEndThePrompt) {
  const KvTransferSpec spec = Spec("id");
  LF_ASSERT_OK_AND_ASSIGN(const auto sink, store_->Open(spec));
  std::thread consumer([&] {
    std::this_thread::sleep_for(milliseconds(30));
    EXPECT_THAT(store_->End("id", TransferState::kAborted, absl::AbortedError("enough")), IsOk());
  });
  EXPECT_THAT(Prefill(*sink, spec), IsOk());
  consumer.join();
  EXPECT_EQ(StatusOf("id").state, TransferState::kAborted);
  ExpectEmpty();
}

TEST_P(KvTierTest, CancelledPromptDoesNotWaitForItsReader) {
  const KvTransferSpec spec = Spec("id");
  LF_ASSERT_OK_AND_ASSIGN(const auto sink, store_->Open(spec));
  LF_ASSERT_OK_AND_ASSIGN(auto reader, store_->Read("id"));
  const auto start = steady_clock::now();
  const absl::Status outcome = Prefill(*sink, spec, [&] {
    return steady_clock::now() - start > milliseconds(50) ? absl::CancelledError("the client is gone")
                                                          : absl::OkStatus();
  });
  if (hands_over()) {
    EXPECT_THAT(outcome, StatusIs(absl::StatusCode::kCancelled, HasSubstr("client is gone")));
    EXPECT_LT(steady_clock::now() - start, reader_timeout_);
    EXPECT_EQ(StatusOf("id").state, TransferState::kAborted);
    EXPECT_THAT(ReadLayers(*reader, 0, 1), StatusIs(absl::StatusCode::kAborted, HasSubstr("client is gone")));
  } else {
    LF_EXPECT_OK(store_->End("id", TransferState::kComplete, absl::OkStatus()));
  }
  reader.reset();
  ExpectEmpty();
}

TEST_P(KvTierTest, EndOfTheServerWakesAPromptThatWaits) {
  const KvTransferSpec spec = Spec("id");
  LF_ASSERT_OK_AND_ASSIGN(const auto sink, store_->Open(spec));
  std::thread server([&] {
    std::this_thread::sleep_for(milliseconds(50));
    store_->FailAll(absl::UnavailableError("the server has ended"));
  });
  const absl::Status outcome = Prefill(*sink, spec);
  server.join();
  if (hands_over()) {
    EXPECT_THAT(outcome, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("server has ended")));
  }
  ExpectEmpty();
}

TEST_P(KvTierTest, WhatIsLeftWhenThePromptEndsStaysUnderTheLease) {
  const int64_t few = 20;  // of all layers fit the ring
  const KvTransferSpec spec = Spec("id", DType::kBFloat16, few);
  LF_ASSERT_OK_AND_ASSIGN(const auto sink, store_->Open(spec));
  LF_ASSERT_OK(Prefill(*sink, spec));
  now_ = now_.load() + seconds(29);
  EXPECT_EQ(store_->ExpireLeases(), 0);
  {
    LF_ASSERT_OK_AND_ASSIGN(const auto reader, store_->Read("id"));
    LF_EXPECT_OK(ReadLayers(*reader, 0, 2));
  }
  now_ = now_.load() + seconds(30);
  EXPECT_EQ(store_->ExpireLeases(), 1);
  EXPECT_EQ(StatusOf("id").state, TransferState::kExpired);
  ExpectEmpty();
}

TEST_P(KvTierTest, HoldsWhatThePlanSays) {
  const KvTransferSpec spec = Spec("id");
  KvTierOptions options{.kind = KvTierKind::kHost};
  if (GetParam().tier == "device") options.kind = KvTierKind::kDevice;
  if (hands_over()) options = {.kind = KvTierKind::kReader, .bytes = kRingRows * 2 * kHeads * kHeadDim * 2};
  const KvTierPlan plan = PlanKvTier(options, {.num_layers = kLayers,
                                               .num_kv_heads = kHeads,
                                               .num_rows = kTokens,
                                               .head_dim = kHeadDim,
                                               .kv_dtype = DType::kBFloat16,
                                               .compute_dtype = backend_->kernels().compute_dtype(),
                                               .device = backend_->kernels().device()});
  LF_ASSERT_OK_AND_ASSIGN(auto sink, store_->Open(spec));
  if (GetParam().tier == "device") {
    EXPECT_EQ(backend_->memory().bytes_in_use(), plan.device_needed_bytes);  // the budget of this test
    if (GetParam().device != "cpu") {
      EXPECT_EQ(backend_->host_memory().bytes_in_use() - 2 * 5000, plan.host_bytes);
    }
    EXPECT_THAT(store_->Open(Spec("another")),
                StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("KV on")));
  } else {
    EXPECT_EQ(memory_.bytes_in_use() + files_->bytes_in_use(), plan.host_bytes);
    EXPECT_EQ(StatusOf("id").bytes_held, plan.host_bytes);
  }
  LF_EXPECT_OK(sink->Finish(absl::CancelledError("stop")));
  ExpectEmpty();
  LF_EXPECT_OK(store_->Open(Spec("one more")).status());
}

std::string NameOf(const testing::TestParamInfo<Case>& info) {
  return absl::StrCat(info.param.tier, "_", info.param.device);
}
INSTANTIATE_TEST_SUITE_P(Tiers, KvTierTest,
                         testing::Values(Case{"memory", "cpu"}, Case{"file", "cpu"}, Case{"device", "cpu"},
                                         Case{"reader", "cpu"}, Case{"memory", "fake_device"},
                                         Case{"device", "fake_device"}, Case{"reader", "fake_device"},
                                         Case{"memory", "cuda"}, Case{"device", "cuda"},
                                         Case{"reader", "cuda"}),
                         NameOf);

}  // namespace
}  // namespace longfill
