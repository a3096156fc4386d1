// KV caches as files: the manifest reads back as written, and the sink's files hold what was appended.

#include <sys/resource.h>

#include <csignal>
#include <cstring>
#include <nlohmann/json.hpp>
#include <random>

#include "absl/strings/str_cat.h"
#include "models/safetensors.h"
#include "runtime/kv/kv_manifest.h"
#include "tests/testing/status_matchers.h"
#include "tests/unit/models/test_files.h"

namespace longfill {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;
using testing::UnorderedElementsAre;

// ---- Manifest

KvManifest FullManifest() {
  const ShardPlan plan({2, 2}, 1337);
  KvManifest manifest;
  manifest.request_id = "request \"1\"";
  manifest.transfer_id = "transfer";
  manifest.instance_epoch = "epoch";
  manifest.architecture = "LlamaForCausalLM";
  manifest.model_fingerprint = "0123";
  manifest.token_hashes = {"ab", "cd"};
  manifest.num_tokens = 1337;
  manifest.num_layers = 2;
  manifest.num_kv_heads = 3;
  manifest.head_dim = 64;
  manifest.dtype = DType::kBFloat16;
  for (int rank = 0; rank < 4; ++rank) {
    manifest.shards.push_back({rank, absl::StrCat("host:", 50000 + rank), plan.TokenRanges(rank)});
  }
  manifest.files = BatchFiles(plan, 2, 3);
  return manifest;
}

TEST(KvManifest, ReadsBackAsWritten) {
  KvManifest chunked = FullManifest();
  chunked.rotary_chunk_tokens = 253952;
  for (const KvManifest& written : {FullManifest(), KvManifest{}, chunked}) {
    LF_ASSERT_OK_AND_ASSIGN(const KvManifest read, KvManifest::FromJson(written.ToJson()));
    EXPECT_EQ(read.request_id, written.request_id);
    EXPECT_EQ(read.transfer_id, written.transfer_id);
    EXPECT_EQ(read.instance_epoch, written.instance_epoch);
    EXPECT_EQ(read.architecture, written.architecture);
    EXPECT_EQ(read.model_fingerprint, written.model_fingerprint);
    EXPECT_EQ(read.token_hashes, written.token_hashes);
    EXPECT_EQ(read.page_tokens, written.page_tokens);
    EXPECT_EQ(read.num_tokens, written.num_tokens);
    EXPECT_EQ(read.num_layers, written.num_layers);
    EXPECT_EQ(read.num_kv_heads, written.num_kv_heads);
    EXPECT_EQ(read.head_dim, written.head_dim);
    EXPECT_EQ(read.rotary_chunk_tokens, written.rotary_chunk_tokens);
    EXPECT_EQ(read.dtype, written.dtype);
    EXPECT_EQ(read.layout, written.layout);
    ASSERT_EQ(read.shards.size(), written.shards.size());
    for (size_t i = 0; i < read.shards.size(); ++i) {
      EXPECT_EQ(read.shards[i].rank, written.shards[i].rank);
      EXPECT_EQ(read.shards[i].endpoint, written.shards[i].endpoint);
      EXPECT_EQ(read.shards[i].token_ranges, written.shards[i].token_ranges);
    }
    ASSERT_EQ(read.files.size(), written.files.size());
    for (size_t i = 0; i < read.files.size(); ++i) {
      EXPECT_EQ(read.files[i].name, written.files[i].name);
      EXPECT_EQ(read.files[i].layer_begin, written.files[i].layer_begin);
      EXPECT_EQ(read.files[i].layer_end, written.files[i].layer_end);
      EXPECT_EQ(read.files[i].head_begin, written.files[i].head_begin);
      EXPECT_EQ(read.files[i].head_end, written.files[i].head_end);
      EXPECT_EQ(read.files[i].rank, written.files[i].rank);
      EXPECT_EQ(read.files[i].token_ranges, written.files[i].token_ranges);
    }
    EXPECT_EQ(read.ToJson(), written.ToJson());
  }
}

TEST(KvManifest, EveryMissingOrUnknownKeyIsNamed) {
  const nlohmann::json whole = nlohmann::json::parse(FullManifest().ToJson());
  for (const auto& [key, value] : whole.items()) {
    nlohmann::json broken = whole;
    broken.erase(key);
    EXPECT_THAT(KvManifest::FromJson(broken.dump()),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("lacks " + key)));
    broken[key] = nullptr;
    EXPECT_THAT(KvManifest::FromJson(broken.dump()),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(key)));
  }
  nlohmann::json broken = whole;
  broken["compression"] = "none";
  EXPECT_THAT(KvManifest::FromJson(broken.dump()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("unknown key \"compression\"")));
  broken = whole;
  broken["files"][1]["offset"] = 3;
  EXPECT_THAT(
      KvManifest::FromJson(broken.dump()),
      StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("files[1]"), HasSubstr("offset"))));
}

TEST(KvManifest, WrongValuesAreRefused) {
  const nlohmann::json whole = nlohmann::json::parse(FullManifest().ToJson());
  const auto expect = [&](const char* pointer, const nlohmann::json& value, const char* text) {
    nlohmann::json broken = whole;
    broken[nlohmann::json::json_pointer(pointer)] = value;
    EXPECT_THAT(KvManifest::FromJson(broken.dump()),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(text)))
        << pointer;
  };
  expect("/version", 2, "version 2");
  expect("/num_tokens", "1337", "num_tokens");
  expect("/num_tokens", 1.5, "num_tokens");
  expect("/num_tokens", 18446744073709551615u, "out of range");
  expect("/num_tokens", 1000, "beyond 1000 tokens");
  expect("/dtype", "float31", "float31");
  expect("/request_id", 7, "request_id is not a string");
  expect("/token_hashes", "ab", "token_hashes is not an array");
  expect("/token_hashes/1", 7, "token_hashes");
  expect("/shards", nlohmann::json::object(), "shards is not an array");
  expect("/shards/0", 7, "shards[0] is not an object");
  expect("/shards/0/rank", -1, "rank -1 is out of range");
  expect("/shards/0/rank", int64_t{1} << 31, "out of range");
  expect("/shards/0/token_ranges/0", {5}, "pairs");
  expect("/shards/0/token_ranges/0", {5, 5}, "token range [5, 5)");
  expect("/shards/0/token_ranges/0", {-1, 5}, "token range [-1, 5)");
  expect("/shards/1/token_ranges/1", {0, 5}, "out of order");
  expect("/files/0/layers", {0, 1, 2}, "layers is not a pair");
  expect("/files/0/kv_heads", {0, "1"}, "kv_heads");
  expect("/files/2/token_ranges/0", {7, 3}, "token range [7, 3)");
}

TEST(KvManifest, TextThatIsNotAManifestIsRefused) {
  for (const char* text : {"", "[", "[]", "7", "null", "{}", "\xff", "{\"version\": 1"}) {
    EXPECT_THAT(KvManifest::FromJson(text),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("KV manifest")))
        << text;
  }
}

TEST(KvManifest, BatchFilesOwnEveryLayerAndTokenOnce) {
  for (const Mesh& mesh : {Mesh{1, 1}, Mesh{3, 2}, Mesh{8, 1}}) {
    for (const int64_t num_tokens : {1, 200, 1337}) {
      std::vector<int> owners(3 * num_tokens);
      for (const KvFile& file : BatchFiles({mesh, num_tokens}, 3, 2)) {
        EXPECT_EQ(file.name, KvFileName(file.layer_begin, file.rank));
        EXPECT_EQ(file.layer_end, file.layer_begin + 1);
        EXPECT_EQ(file.head_begin, 0);
        EXPECT_EQ(file.head_end, 2);
        for (const TokenRange& range : file.token_ranges) {
          for (int64_t t = range.begin; t < range.end; ++t) ++owners[file.layer_begin * num_tokens + t];
        }
      }
      EXPECT_THAT(owners, testing::Each(1));
    }
  }
  EXPECT_EQ(KvFileName(7, 12), "kv-layer-007-rank-012.safetensors");
}

// ---- File sink

constexpr int64_t kLayers = 2, kHeads = 3, kHeadDim = 5;

KvTransferSpec Spec(DType dtype, const ShardPlan& plan, int rank) {
  return {.request_id = "r",
          .transfer_id = "transfer 1",
          .plan = plan,
          .rank = rank,
          .num_layers = kLayers,
          .num_kv_heads = kHeads,
          .head_dim = kHeadDim,
          .dtype = dtype};
}

// K and V of one rank. Rows are wider than a head, as views of larger buffers are.
struct Kv {
  explicit Kv(int64_t num_rows_in) : num_rows(num_rows_in) {
    std::mt19937 random(3);
    std::normal_distribution<float> normal(0.0f, 3.0f);
    values.resize(kLayers * 2 * kHeads * num_rows * kRowStride);
    for (float& value : values) value = normal(random);
  }
  static constexpr int64_t kRowStride = kHeadDim + 2;
  // From row `begin` on; kind 0: key, 1: value.
  HeadsView<const float> View(int64_t layer, int64_t kind, int64_t begin) const {
    return {values.data() + ((layer * 2 + kind) * kHeads * num_rows + begin) * kRowStride,
            num_rows * kRowStride, kRowStride};
  }
  std::string Bytes(int64_t layer, int64_t kind, DType dtype) const {
    std::string bytes(kHeads * num_rows * kHeadDim * DTypeBytes(dtype), '\0');
    const HeadsView<const float> view = View(layer, kind, 0);
    char* next = bytes.data();
    for (int64_t head = 0; head < kHeads; ++head) {
      for (int64_t row = 0; row < num_rows; ++row) {
        NarrowFromFloat(view.data + head * view.head_stride + row * view.row_stride, kHeadDim, dtype, next);
        next += kHeadDim * DTypeBytes(dtype);
      }
    }
    return bytes;
  }
  int64_t num_rows;
  std::vector<float> values;
};

absl::Status AppendLayer(KvSink& sink, const Kv& kv, int64_t layer, const std::vector<int64_t>& cuts) {
  int64_t begin = 0;
  for (const int64_t end : cuts) {
    LF_RETURN_IF_ERROR(
        sink.Append(layer, begin, end, kv.View(layer, 0, begin), kv.View(layer, 1, begin), DType::kFloat32));
    begin = end;
  }
  return absl::OkStatus();
}

std::string BytesOf(const SafetensorsFile& file, const char* name) {
  const SafetensorsTensor* tensor = file.Find(name);
  if (tensor == nullptr) return "no such tensor";
  return {reinterpret_cast<const char*>(tensor->bytes.data()), tensor->bytes.size()};
}

TEST(KvFileSink, FilesHoldWhatWasAppendedInAnyPieces) {
  const ShardPlan plan({3, 1}, 700);
  const int rank = 1;  // blocks 1 and 4
  const Kv kv(plan.NumTokens(rank));
  ASSERT_EQ(kv.num_rows, 256);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const TempDir directory;
    LF_ASSERT_OK_AND_ASSIGN(const auto sink,
                            MakeKvFileSinkFactory(directory.path())(Spec(dtype, plan, rank)));
    LF_ASSERT_OK(AppendLayer(*sink, kv, 0, {256}));
    EXPECT_THAT(directory.List(), UnorderedElementsAre(KvFileName(0, 1)));  // whole before the next layer
    LF_ASSERT_OK(AppendLayer(*sink, kv, 1, {1, 1, 130, 131, 255, 256}));
    LF_ASSERT_OK(sink->Finish(absl::OkStatus()));
    EXPECT_THAT(directory.List(), UnorderedElementsAre(KvFileName(0, 1), KvFileName(1, 1)));
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      LF_ASSERT_OK_AND_ASSIGN(const auto file,
                              SafetensorsFile::Open(directory.File(KvFileName(layer, rank))));
      EXPECT_EQ(file->metadata().at("transfer_id"), "transfer 1");
      ASSERT_THAT(file->tensors(), SizeIs(2));
      for (const SafetensorsTensor& tensor : file->tensors()) {
        EXPECT_EQ(tensor.dtype, dtype);
        EXPECT_EQ(tensor.shape, (std::vector<int64_t>{kHeads, 256, kHeadDim}));
      }
      EXPECT_TRUE(BytesOf(*file, "key") == kv.Bytes(layer, 0, dtype)) << "layer " << layer;
      EXPECT_TRUE(BytesOf(*file, "value") == kv.Bytes(layer, 1, dtype)) << "layer " << layer;
    }
  }
}

TEST(KvFileSink, RankWithoutTokensWritesNothing) {
  const TempDir directory;
  const ShardPlan plan({3, 1}, 100);
  LF_ASSERT_OK_AND_ASSIGN(const auto sink,
                          MakeKvFileSinkFactory(directory.path())(Spec(DType::kFloat32, plan, 2)));
  for (int64_t layer = 0; layer < kLayers; ++layer)
    LF_ASSERT_OK(sink->Append(layer, 0, 0, {}, {}, DType::kFloat32));
  LF_EXPECT_OK(sink->Finish(absl::OkStatus()));
  EXPECT_THAT(directory.List(), IsEmpty());
}

TEST(KvFileSink, LeavesNothingAfterAnErrorOrWhenDropped) {
  const ShardPlan plan({1, 1}, 100);
  const Kv kv(100);
  for (const bool finishes : {true, false}) {
    for (const int64_t rows : {0, 40, 100}) {  // of layer 1
      const TempDir directory;
      {
        LF_ASSERT_OK_AND_ASSIGN(const auto sink,
                                MakeKvFileSinkFactory(directory.path())(Spec(DType::kFloat32, plan, 0)));
        LF_ASSERT_OK(AppendLayer(*sink, kv, 0, {100}));
        LF_ASSERT_OK(AppendLayer(*sink, kv, 1, {rows}));
        EXPECT_FALSE(directory.List().empty());
        if (finishes) {
          LF_EXPECT_OK(sink->Finish(absl::CancelledError("gone")));
        }
      }
      EXPECT_THAT(directory.List(), IsEmpty()) << rows << " rows";
    }
  }
}

TEST(KvFileSink, DirectoryThatIsNotThereIsAnErrorNamingIt) {
  const TempDir directory;
  const Kv kv(100);
  const std::string missing = directory.File("missing");
  LF_ASSERT_OK_AND_ASSIGN(const auto sink,
                          MakeKvFileSinkFactory(missing)(Spec(DType::kFloat32, ShardPlan({1, 1}, 100), 0)));
  EXPECT_THAT(AppendLayer(*sink, kv, 0, {100}).message(), HasSubstr(missing));
  LF_EXPECT_OK(sink->Finish(absl::NotFoundError("that")));
}

// No file of this process may grow beyond `bytes`: what a full disk looks like to one that is not root.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) : handler_(std::signal(SIGXFSZ, SIG_IGN)) {
    getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit limit{bytes, before_.rlim_max};
    EXPECT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
  }
  ~FileSizeLimit() {
    setrlimit(RLIMIT_FSIZE, &before_);
    std::signal(SIGXFSZ, handler_);
  }

 private:
  rlimit before_{};
  void (*handler_)(int);
};

TEST(KvFileSink, FullDiskIsReportedAndLeavesNothing) {
  const TempDir directory;
  const Kv kv(1000);
  LF_ASSERT_OK_AND_ASSIGN(const auto sink, MakeKvFileSinkFactory(directory.path())(
                                               Spec(DType::kFloat32, ShardPlan({1, 1}, 1000), 0)));
  LF_ASSERT_OK(AppendLayer(*sink, kv, 0, {1000}));
  absl::Status full;
  {
    const FileSizeLimit limit(10000);
    full = AppendLayer(*sink, kv, 1, {300, 1000});
  }
  EXPECT_THAT(full, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr(KvFileName(1, 0))));
  LF_EXPECT_OK(sink->Finish(full));
  EXPECT_THAT(directory.List(), IsEmpty());
}

}  // namespace
}  // namespace longfill
