#include "runtime/kv/kv_store.h"

#include <atomic>
#include <chrono>
#include <cstring>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "runtime/kv/crc32c.h"
#include "runtime/kv/kv_page.h"
#include "runtime/kv/transfer_id.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::HasSubstr;

std::chrono::steady_clock::time_point In(milliseconds wait) {
  return std::chrono::steady_clock::now() + wait;
}

// A value that says where it belongs.
float Element(bool key, int64_t layer, int64_t head, int64_t token, int64_t i) {
  return static_cast<float>((key ? 1 : 2) * 1000 + layer * 100 + head * 10 + i) +
         static_cast<float>(token) / 4096.0f;
}

class KvStoreTest : public testing::Test {
 protected:
  KvTransferSpec Spec(const std::string& id, int64_t num_tokens = 300, Mesh mesh = {}, int rank = 0) {
    KvTransferSpec spec;
    spec.request_id = "request";
    spec.transfer_id = id;
    spec.plan = ShardPlan(mesh, num_tokens);
    spec.rank = rank;
    spec.num_layers = 3;
    spec.num_kv_heads = 2;
    spec.head_dim = 4;
    return spec;
  }

  // Appends rows [row_begin, row_end) of a layer.
  absl::Status Append(KvSink& sink, const KvTransferSpec& spec, int64_t layer, int64_t row_begin,
                      int64_t row_end) {
    const PositionMap positions = spec.plan.TokenPositions(spec.rank);
    const int64_t rows = row_end - row_begin;
    std::vector<float> key, value;
    for (int64_t head = 0; head < spec.num_kv_heads; ++head) {
      for (int64_t row = row_begin; row < row_end; ++row) {
        for (int64_t i = 0; i < spec.head_dim; ++i) {
          key.push_back(Element(true, layer, head, positions.Position(row), i));
          value.push_back(Element(false, layer, head, positions.Position(row), i));
        }
      }
    }
    return sink.Append(layer, row_begin, row_end, {key.data(), rows * spec.head_dim, spec.head_dim},
                       {value.data(), rows * spec.head_dim, spec.head_dim}, DType::kFloat32);
  }

  absl::Status AppendAll(KvSink& sink, const KvTransferSpec& spec) {
    for (int64_t layer = 0; layer < spec.num_layers; ++layer) {
      LF_RETURN_IF_ERROR(Append(sink, spec, layer, 0, spec.plan.NumTokens(spec.rank)));
    }
    return sink.Finish(absl::OkStatus());
  }

  TransferState StateOf(const std::string& id) {
    const absl::StatusOr<TransferStatus> status = store_.GetStatus(id);
    return status.ok() ? status->state : TransferState::kOpen;
  }

  void ExpectEmpty() {
    const KvStoreUsage usage = store_.usage();
    EXPECT_EQ(usage.open_transfers, 0);
    EXPECT_EQ(usage.bytes_open, 0);
    EXPECT_EQ(usage.bytes_lingering, 0);
    EXPECT_EQ(memory_.bytes_in_use(), 0);
  }

  std::chrono::steady_clock::time_point now_ = std::chrono::steady_clock::now();
  CpuMemoryResource memory_;
  const std::unique_ptr<KvTier> tier_ = MakeMemoryTier(&memory_);
  KvStore store_{KvStoreOptions{.lease = seconds(30),
                                .tombstone_life = seconds(600),
                                .max_tombstones = 4,
                                .clock = [this] { return now_; }},
                 tier_.get()};
};

TEST(Crc32c, IsTheStandardValueAndChains) {
  EXPECT_EQ(Crc32c("123456789", 9), 0xE3069283u);
  EXPECT_EQ(Crc32c("", 0), 0u);
  EXPECT_EQ(Crc32c("56789", 5, Crc32c("1234", 4)), 0xE3069283u);
}

TEST(TransferId, Has192BitsAndNeverRepeats) {
  std::set<std::string> ids;
  for (int i = 0; i < 1000; ++i) {
    LF_ASSERT_OK_AND_ASSIGN(const std::string id, NewTransferId());
    EXPECT_EQ(id.size(), 48u);
    EXPECT_TRUE(ids.insert(id).second);
  }
}

TEST(TransferStates, OnlyOpenIsLeftAndOnlyOnce) {
  const TransferState all[] = {TransferState::kOpen, TransferState::kComplete, TransferState::kAborted,
                               TransferState::kFailed, TransferState::kExpired};
  for (TransferState from : all) {
    for (TransferState to : all) {
      EXPECT_EQ(IsLegalTransition(from, to), from == TransferState::kOpen && to != TransferState::kOpen);
    }
  }
}

TEST_F(KvStoreTest, GivesBackWhatWasAppendedInEveryDtypeAndLayout) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const KvLayout layout : {KvLayout::kHeadsTokens, KvLayout::kTokensHeads}) {
      KvTransferSpec spec = Spec(
          std::string(DTypeName(dtype)) + (layout == KvLayout::kHeadsTokens ? "H" : "N"), 700, Mesh{2, 1}, 1);
      spec.dtype = dtype;
      LF_ASSERT_OK_AND_ASSIGN(auto sink, store_.Open(spec));
      LF_ASSERT_OK(AppendAll(*sink, spec));
      LF_ASSERT_OK_AND_ASSIGN(
          auto reader,
          store_.Read(spec.transfer_id,
                      {.layer_begin = 1, .head_begin = 1, .token_begin = 130, .token_end = 600}));
      int64_t num_tokens = 0;
      const int64_t layer = 2, head = 1;
      LF_ASSERT_OK(reader->WaitForRows(layer, spec.plan.NumTokens(1), In(seconds(1))));
      for (const KvPiece& piece : CutIntoPieces(reader->selection(), spec, 1000)) {
        std::string key, bytes;
        LF_ASSERT_OK(reader->Copy(layer, piece, layout, &key, &bytes));
        std::vector<float> got(static_cast<size_t>(piece.num_tokens * spec.head_dim));
        ASSERT_EQ(bytes.size(), got.size() * static_cast<size_t>(DTypeBytes(dtype)));
        WidenToFloat(bytes.data(), dtype, static_cast<int64_t>(got.size()), got.data());
        for (int64_t token = 0; token < piece.num_tokens; ++token) {
          const int64_t position = piece.token_begin + token;
          EXPECT_EQ(spec.plan.RankOfToken(position), 1);
          for (int64_t i = 0; i < spec.head_dim; ++i) {
            const float want = Element(false, layer, head, position, i);
            EXPECT_NEAR(got[static_cast<size_t>(token * spec.head_dim + i)], want, want / 128) << position;
          }
        }
        num_tokens += piece.num_tokens;
      }
      EXPECT_EQ(num_tokens, (256 - 130) + (512 - 384));
      reader.reset();
      LF_ASSERT_OK(store_.End(spec.transfer_id, TransferState::kComplete, absl::OkStatus()));
    }
  }
  ExpectEmpty();
}

TEST_F(KvStoreTest, PiecesCoverTheRanksTokensExactlyOnceOnEveryMesh) {
  for (const int64_t num_tokens : {1, 127, 128, 129, 256, 1031}) {
    for (const Mesh mesh : {Mesh{1, 1}, Mesh{3, 1}, Mesh{2, 2}, Mesh{1, 4}}) {
      std::vector<int> seen(static_cast<size_t>(num_tokens), 0);
      for (int rank = 0; rank < mesh.size(); ++rank) {
        const KvTransferSpec spec = Spec("x", num_tokens, mesh, rank);
        LF_ASSERT_OK_AND_ASSIGN(const KvSelection selection, ResolveSelection({}, spec));
        const PositionMap positions = spec.plan.TokenPositions(rank);
        for (const KvPiece& piece : CutIntoPieces(selection, spec, 50 * 64)) {
          EXPECT_LE(piece.num_tokens, 50);
          for (int64_t i = 0; i < piece.num_tokens; ++i) {
            EXPECT_EQ(positions.Position(piece.row_begin + i), piece.token_begin + i);
            ++seen[static_cast<size_t>(piece.token_begin + i)];
          }
        }
      }
      for (int64_t token = 0; token < num_tokens; ++token)
        EXPECT_EQ(seen[static_cast<size_t>(token)], 1) << token;
    }
  }
}

TEST_F(KvStoreTest, RefusesSelectionsOutsideOfTheTransfer) {
  const KvTransferSpec spec = Spec("x");
  EXPECT_THAT(ResolveSelection({.layer_end = 4}, spec),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("layer range [0, 4)")));
  EXPECT_THAT(ResolveSelection({.head_begin = 2}, spec),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("head")));
  EXPECT_THAT(ResolveSelection({.token_begin = -1}, spec),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("token")));
}

TEST_F(KvStoreTest, ReaderWaitsForALayerUntilItIsThere) {
  const KvTransferSpec spec = Spec("id");
  LF_ASSERT_OK_AND_ASSIGN(auto sink, store_.Open(spec));
  LF_ASSERT_OK_AND_ASSIGN(auto reader, store_.Read("id"));
  LF_ASSERT_OK(Append(*sink, spec, 0, 0, 100));
  LF_EXPECT_OK(reader->WaitForRows(0, 100, In(milliseconds(0))));
  EXPECT_THAT(reader->WaitForRows(0, 101, In(milliseconds(5))),
              StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("layer 0")));
  std::atomic<bool> appended = false;
  std::thread producer([&] {
    std::this_thread::sleep_for(milliseconds(20));
    EXPECT_THAT(Append(*sink, spec, 0, 100, 300), IsOk());
    appended = true;
    EXPECT_THAT(Append(*sink, spec, 1, 0, 300), IsOk());
  });
  LF_EXPECT_OK(reader->WaitForRows(1, 300, In(seconds(10))));
  EXPECT_TRUE(appended);
  producer.join();
  reader.reset();
  LF_EXPECT_OK(sink->Finish(absl::CancelledError("stop")));
  EXPECT_EQ(StateOf("id"), TransferState::kAborted);
  ExpectEmpty();
}

TEST_F(KvStoreTest, AbortWakesReadersAndFreesMemory) {
  const KvTransferSpec spec = Spec("id");
  LF_ASSERT_OK_AND_ASSIGN(auto sink, store_.Open(spec));
  LF_ASSERT_OK(Append(*sink, spec, 0, 0, 300));
  LF_ASSERT_OK_AND_ASSIGN(auto reader, store_.Read("id"));
  std::thread waiter([&] {
    EXPECT_THAT(reader->WaitForRows(1, 300, In(seconds(10))),
                StatusIs(absl::StatusCode::kAborted, HasSubstr("enough")));
  });
  std::this_thread::sleep_for(milliseconds(10));
  LF_ASSERT_OK_AND_ASSIGN(const TransferStatus ended,
                          store_.End("id", TransferState::kAborted, absl::AbortedError("enough")));
  waiter.join();
  EXPECT_EQ(ended.state, TransferState::kAborted);
  EXPECT_EQ(ended.bytes_held, 0);
  std::string key, value;
  EXPECT_THAT(reader->Copy(0, {.num_tokens = 300}, KvLayout::kHeadsTokens, &key, &value),
              StatusIs(absl::StatusCode::kAborted, HasSubstr("enough")));
  LF_EXPECT_OK(Append(*sink, spec, 1, 0, 300));  // no error of the prefill: what comes is dropped
  LF_EXPECT_OK(sink->Finish(absl::OkStatus()));
  reader.reset();
  ExpectEmpty();
}

TEST_F(KvStoreTest, EndIsIdempotentAndTheFirstStateStays) {
  const KvTransferSpec spec = Spec("id");
  LF_ASSERT_OK_AND_ASSIGN(auto sink, store_.Open(spec));
  LF_ASSERT_OK(AppendAll(*sink, spec));
  for (const TransferState outcome :
       {TransferState::kComplete, TransferState::kAborted, TransferState::kComplete}) {
    LF_ASSERT_OK_AND_ASSIGN(const TransferStatus status, store_.End("id", outcome, absl::OkStatus()));
    EXPECT_EQ(status.state, TransferState::kComplete);
  }
  EXPECT_THAT(store_.Read("id"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("complete")));
  EXPECT_THAT(store_.End("id", TransferState::kExpired, absl::OkStatus()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("expired")));
  EXPECT_THAT(store_.End("other", TransferState::kAborted, absl::OkStatus()),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("no such transfer")));
  EXPECT_THAT(store_.Open(spec), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("used before")));
  ExpectEmpty();
}

TEST_F(KvStoreTest, LeaseRunsOnlyWithoutPrefillAndReaders) {
  const KvTransferSpec spec = Spec("id");
  LF_ASSERT_OK_AND_ASSIGN(auto sink, store_.Open(spec));
  now_ += seconds(1000);
  EXPECT_EQ(store_.ExpireLeases(), 0);  // the prefill runs
  LF_ASSERT_OK(AppendAll(*sink, spec));
  now_ += seconds(29);
  EXPECT_EQ(store_.ExpireLeases(), 0);
  LF_ASSERT_OK(store_.RenewLease("id"));
  now_ += seconds(29);
  EXPECT_EQ(store_.ExpireLeases(), 0);
  {
    LF_ASSERT_OK_AND_ASSIGN(auto reader, store_.Read("id"));
    now_ += seconds(1000);
    EXPECT_EQ(store_.ExpireLeases(), 0);  // someone reads
    LF_ASSERT_OK_AND_ASSIGN(const TransferStatus status, store_.GetStatus("id"));
    EXPECT_EQ(status.lease_remaining, milliseconds(-1));
    EXPECT_EQ(status.active_readers, 1);
  }
  now_ += seconds(29);
  LF_ASSERT_OK_AND_ASSIGN(const TransferStatus status, store_.GetStatus("id"));  // asking is no sign of life
  EXPECT_EQ(status.lease_remaining, seconds(1));
  EXPECT_EQ(store_.ExpireLeases(), 0);
  now_ += seconds(1);
  EXPECT_EQ(store_.ExpireLeases(), 1);
  EXPECT_EQ(StateOf("id"), TransferState::kExpired);
  EXPECT_THAT(store_.Read("id"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("no sign of life for 30000 ms")));
  LF_ASSERT_OK_AND_ASSIGN(const TransferStatus renewed, store_.RenewLease("id"));
  EXPECT_EQ(renewed.state, TransferState::kExpired);
  ExpectEmpty();
}

TEST_F(KvStoreTest, TombstonesAreBoundedInNumberAndTime) {
  for (int i = 0; i < 6; ++i) {
    const KvTransferSpec spec = Spec("id" + std::to_string(i), 5);
    LF_ASSERT_OK_AND_ASSIGN(auto sink, store_.Open(spec));
    LF_ASSERT_OK(AppendAll(*sink, spec));
    LF_ASSERT_OK(store_.End(spec.transfer_id, TransferState::kComplete, absl::OkStatus()));
  }
  EXPECT_EQ(store_.usage().tombstones, 4);
  EXPECT_THAT(store_.GetStatus("id1"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("no such transfer")));
  LF_EXPECT_OK(store_.GetStatus("id2"));
  now_ += seconds(600);
  store_.ExpireLeases();
  EXPECT_EQ(store_.usage().tombstones, 0);
  ExpectEmpty();
}

TEST_F(KvStoreTest, OutcomeOfThePrefillDecidesTheState) {
  const struct {
    absl::Status outcome;
    TransferState state;
    absl::StatusCode read;
  } cases[] = {
      {absl::CancelledError("client gone"), TransferState::kAborted, absl::StatusCode::kAborted},
      {absl::DeadlineExceededError("late"), TransferState::kAborted, absl::StatusCode::kAborted},
      {absl::InternalError("bug"), TransferState::kFailed, absl::StatusCode::kInternal},
      {absl::UnavailableError("rank 1 lost"), TransferState::kFailed, absl::StatusCode::kUnavailable},
  };
  for (const auto& c : cases) {
    const KvTransferSpec spec = Spec("id" + c.outcome.ToString());
    LF_ASSERT_OK_AND_ASSIGN(auto sink, store_.Open(spec));
    LF_EXPECT_OK(sink->Finish(c.outcome));
    EXPECT_EQ(StateOf(spec.transfer_id), c.state);
    EXPECT_THAT(store_.Read(spec.transfer_id), StatusIs(c.read, HasSubstr(std::string(c.outcome.message()))));
  }
  const KvTransferSpec spec = Spec("short");
  LF_ASSERT_OK_AND_ASSIGN(auto sink, store_.Open(spec));
  LF_ASSERT_OK(Append(*sink, spec, 0, 0, 300));
  EXPECT_THAT(sink->Finish(absl::OkStatus()),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("1 of 3 layers")));
  EXPECT_EQ(StateOf("short"), TransferState::kFailed);
  const KvTransferSpec left = Spec("left");
  { LF_ASSERT_OK_AND_ASSIGN(auto dropped, store_.Open(left)); }
  EXPECT_EQ(StateOf("left"), TransferState::kFailed);
  ExpectEmpty();
}

TEST_F(KvStoreTest, RefusesGapsAndMisshapenSpecs) {
  KvTransferSpec spec = Spec("id");
  LF_ASSERT_OK_AND_ASSIGN(auto sink, store_.Open(spec));
  EXPECT_THAT(Append(*sink, spec, 1, 0, 300), StatusIs(absl::StatusCode::kInternal, HasSubstr("layer 1")));
  EXPECT_THAT(Append(*sink, spec, 0, 5, 300),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("row 0 of layer 0")));
  EXPECT_THAT(sink->Append(0, 0, 301, {}, {}, DType::kFloat32),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("300 rows")));
  LF_EXPECT_OK(sink->Finish(absl::CancelledError("")));
  spec.transfer_id = "other";
  spec.head_dim = 0;
  EXPECT_THAT(store_.Open(spec), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("head_dim 0")));
  spec = Spec("third");
  spec.dtype = DType::kInt32;
  EXPECT_THAT(store_.Open(spec), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("int32")));
}

TEST_F(KvStoreTest, RankWithoutTokensIsReadyAtOnce) {
  const KvTransferSpec spec = Spec("id", 100, Mesh{4, 1}, 3);
  LF_ASSERT_OK_AND_ASSIGN(auto sink, store_.Open(spec));
  LF_ASSERT_OK_AND_ASSIGN(auto reader, store_.Read("id"));
  LF_EXPECT_OK(reader->WaitForRows(2, 0, In(milliseconds(0))));
  LF_EXPECT_OK(sink->Append(0, 0, 0, {}, {}, DType::kFloat32));
  LF_EXPECT_OK(sink->Finish(absl::OkStatus()));
  LF_ASSERT_OK_AND_ASSIGN(const KvSelection selection, ResolveSelection({}, spec));
  EXPECT_TRUE(CutIntoPieces(selection, spec, 1000).empty());
}

TEST_F(KvStoreTest, FailAllEndsEverythingAndRefusesNewTransfers) {
  const KvTransferSpec spec = Spec("id");
  LF_ASSERT_OK_AND_ASSIGN(auto sink, store_.Open(spec));
  LF_ASSERT_OK(Append(*sink, spec, 0, 0, 300));
  store_.FailAll(absl::UnavailableError("rank 2 was lost"));
  EXPECT_THAT(store_.Read("id"), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("rank 2")));
  EXPECT_THAT(Append(*sink, spec, 1, 0, 300), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("rank 2")));
  LF_EXPECT_OK(sink->Finish(absl::UnavailableError("rank 2 was lost")));
  EXPECT_THAT(store_.Open(Spec("next")), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("rank 2")));
  ExpectEmpty();
}

TEST_F(KvStoreTest, MemoryThatIsNotThereIsRefusedBeforeWorkAndLeavesNothing) {
  CpuMemoryResource small(10000);
  const std::unique_ptr<KvTier> tier = MakeMemoryTier(&small);
  KvStore store(KvStoreOptions{}, tier.get());
  EXPECT_THAT(store.Open(Spec("id")), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("KV store")));
  EXPECT_EQ(small.bytes_in_use(), 0);
  EXPECT_EQ(store.usage().open_transfers, 0);
  EXPECT_EQ(store.usage().bytes_lingering, 0);
}

TEST_F(KvStoreTest, WaitsUntilNoneIsOpen) {
  EXPECT_TRUE(store_.WaitUntilNoneOpen(In(milliseconds(0))));
  const KvTransferSpec spec = Spec("id");
  LF_ASSERT_OK_AND_ASSIGN(auto sink, store_.Open(spec));
  EXPECT_FALSE(store_.WaitUntilNoneOpen(In(milliseconds(5))));
  std::thread other([&] {
    std::this_thread::sleep_for(milliseconds(10));
    EXPECT_THAT(store_.End("id", TransferState::kComplete, absl::OkStatus()), IsOk());
  });
  EXPECT_TRUE(store_.WaitUntilNoneOpen(In(seconds(10))));
  other.join();
}

// Many readers and an abort at a random moment: nobody reads a row that is not there, nothing stays behind.
TEST_F(KvStoreTest, ConcurrentReadersSeeOnlyWholeRowsAndLeaveNothing) {
  for (int round = 0; round < 20; ++round) {
    const std::string id = "round" + std::to_string(round);
    const KvTransferSpec spec = Spec(id, 1000);
    LF_ASSERT_OK_AND_ASSIGN(auto sink, store_.Open(spec));
    std::vector<std::thread> readers;
    readers.reserve(3);
    for (int r = 0; r < 3; ++r) {
      readers.emplace_back([&] {
        auto reader = store_.Read(id);
        if (!reader.ok()) return;
        for (int64_t layer = 0; layer < spec.num_layers; ++layer) {
          for (int64_t row = 50; row <= 1000; row += 190) {
            if (!(*reader)->WaitForRows(layer, row, In(seconds(10))).ok()) return;
            std::string key, value;
            const KvPiece last{.row_begin = row - 1, .token_begin = row - 1, .num_tokens = 1};
            if (!(*reader)->Copy(layer, last, KvLayout::kHeadsTokens, &key, &value).ok()) return;
            float got;
            std::memcpy(&got, key.data(), sizeof(got));
            EXPECT_EQ(got, Element(true, layer, 0, row - 1, 0));
          }
        }
      });
    }
    std::thread ender([&] {
      std::this_thread::sleep_for(std::chrono::microseconds(round * 100));
      EXPECT_THAT(store_.End(id, TransferState::kAborted, absl::AbortedError("test")), IsOk());
    });
    for (int64_t layer = 0; layer < spec.num_layers; ++layer) {
      for (int64_t row = 0; row < 1000; row += 100)
        EXPECT_THAT(Append(*sink, spec, layer, row, row + 100), IsOk());
    }
    EXPECT_THAT(sink->Finish(absl::OkStatus()), IsOk());
    for (std::thread& reader : readers) reader.join();
    ender.join();
  }
  ExpectEmpty();
}

}  // namespace
}  // namespace longfill
