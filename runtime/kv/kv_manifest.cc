#include "runtime/kv/kv_manifest.h"

#include <array>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"

namespace longfill {
namespace {

using Json = nlohmann::json;

Json RangesToJson(const std::vector<TokenRange>& ranges) {
  Json list = Json::array();
  for (const TokenRange& range : ranges) list.push_back({range.begin, range.end});
  return list;
}

// Reads the keys of one object and remembers the first error, so that FromJson reads as the list of fields
// that it is.
class ObjectReader {
 public:
  ObjectReader(const Json& object, std::string where) : object_(object), where_(std::move(where)) {
    if (!object_.is_object()) Fail("is not an object");
  }

  bool Has(const char* key) const { return object_.is_object() && object_.contains(key); }

  void Read(const char* key, std::string* value) {
    if (const Json* field = Find(key); field != nullptr) {
      if (field->is_string()) {
        *value = field->get<std::string>();
      } else {
        Fail(absl::StrCat(key, " is not a string"));
      }
    }
  }

  void Read(const char* key, int64_t* value) {
    if (const Json* field = Find(key); field != nullptr) *value = ToInteger(*field, key);
  }

  void Read(const char* key, int* value) {
    int64_t wide = 0;
    Read(key, &wide);
    if (wide < 0 || wide > std::numeric_limits<int>::max()) {
      Fail(absl::StrCat(key, " ", wide, " is out of range"));
    } else {
      *value = static_cast<int>(wide);
    }
  }

  void Read(const char* key, std::vector<TokenRange>* ranges) {
    const Json* field = Find(key);
    if (field == nullptr) return;
    for (const Json& pair : ArrayOf(*field, key)) {
      if (!pair.is_array() || pair.size() != 2)
        return Fail(absl::StrCat(key, " holds something else than pairs"));
      ranges->push_back({ToInteger(pair[0], key), ToInteger(pair[1], key)});
    }
  }

  void Read(const char* key, std::vector<std::string>* values) {
    const Json* field = Find(key);
    if (field == nullptr) return;
    for (const Json& value : ArrayOf(*field, key)) {
      if (!value.is_string()) return Fail(absl::StrCat(key, " holds something else than strings"));
      values->push_back(value.get<std::string>());
    }
  }

  void ReadPair(const char* key, int64_t* first, int64_t* second) {
    const Json* field = Find(key);
    if (field == nullptr) return;
    if (!field->is_array() || field->size() != 2) return Fail(absl::StrCat(key, " is not a pair"));
    *first = ToInteger((*field)[0], key);
    *second = ToInteger((*field)[1], key);
  }

  // The elements of an array field, read by `read`.
  template <typename T, typename ReadElement>
  void ReadList(const char* key, std::vector<T>* values, ReadElement read) {
    const Json* field = Find(key);
    if (field == nullptr) return;
    for (const Json& element : ArrayOf(*field, key)) {
      ObjectReader reader(element, absl::StrCat(where_, ".", key, "[", values->size(), "]"));
      T value;
      read(reader, &value);
      if (absl::Status status = reader.Finish(); !status.ok() && status_.ok()) status_ = status;
      values->push_back(std::move(value));
    }
  }

  absl::Status Finish() {
    if (status_.ok()) {
      for (const auto& [key, unused] : object_.items()) {
        if (!seen_.contains(key)) Fail(absl::StrCat("has the unknown key \"", key, "\""));
      }
    }
    return status_;
  }

  void Fail(std::string_view what) {
    if (status_.ok()) status_ = absl::InvalidArgumentError(absl::StrCat(where_, " ", std::string(what)));
  }

 private:
  const Json* Find(const char* key) {
    seen_.insert(key);
    if (!object_.is_object()) return nullptr;
    const auto found = object_.find(key);
    if (found == object_.end()) {
      Fail(absl::StrCat("lacks ", key));
      return nullptr;
    }
    return &*found;
  }

  int64_t ToInteger(const Json& value, const char* key) {
    if (value.is_number_unsigned() &&
        value.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      Fail(absl::StrCat(key, " ", value.dump(), " is out of range"));
      return 0;
    }
    if (!value.is_number_integer()) {
      Fail(absl::StrCat(key, " ", value.dump(), " is not an integer"));
      return 0;
    }
    return value.get<int64_t>();
  }

  const Json& ArrayOf(const Json& field, const char* key) {
    static const Json empty = Json::array();
    if (field.is_array()) return field;
    Fail(absl::StrCat(key, " is not an array"));
    return empty;
  }

  const Json& object_;
  const std::string where_;
  std::set<std::string> seen_;
  absl::Status status_;
};

absl::Status CheckRanges(const std::vector<TokenRange>& ranges, int64_t num_tokens, std::string_view where) {
  int64_t previous_end = 0;
  for (const TokenRange& range : ranges) {
    if (range.begin < previous_end || range.end <= range.begin || range.end > num_tokens) {
      return absl::InvalidArgumentError(
          absl::StrCat(std::string(where), " has the token range [", range.begin, ", ", range.end,
                       "), which is empty, out of order or beyond ", num_tokens, " tokens"));
    }
    previous_end = range.end;
  }
  return absl::OkStatus();
}

}  // namespace

std::string KvManifest::ToJson() const {
  Json shard_list = Json::array();
  for (const KvShard& shard : shards) {
    shard_list.push_back({{"rank", shard.rank},
                          {"endpoint", shard.endpoint},
                          {"token_ranges", RangesToJson(shard.token_ranges)}});
  }
  Json file_list = Json::array();
  for (const KvFile& file : files) {
    file_list.push_back({{"name", file.name},
                         {"layers", {file.layer_begin, file.layer_end}},
                         {"kv_heads", {file.head_begin, file.head_end}},
                         {"rank", file.rank},
                         {"token_ranges", RangesToJson(file.token_ranges)}});
  }
  Json manifest = {{"version", kVersion},
                   {"request_id", request_id},
                   {"transfer_id", transfer_id},
                   {"instance_epoch", instance_epoch},
                   {"architecture", architecture},
                   {"model_fingerprint", model_fingerprint},
                   {"token_hashes", token_hashes},
                   {"page_tokens", page_tokens},
                   {"num_tokens", num_tokens},
                   {"num_layers", num_layers},
                   {"num_kv_heads", num_kv_heads},
                   {"head_dim", head_dim},
                   {"dtype", std::string(DTypeName(dtype))},
                   {"layout", layout},
                   {"shards", shard_list},
                   {"files", file_list}};
  if (rotary_chunk_tokens > 0) manifest["rotary_chunk_tokens"] = rotary_chunk_tokens;
  return manifest.dump(1);
}

absl::StatusOr<KvManifest> KvManifest::FromJson(std::string_view json) {
  const Json root = Json::parse(json, nullptr, /*allow_exceptions=*/false);
  if (root.is_discarded()) return absl::InvalidArgumentError("KV manifest is not JSON");
  KvManifest manifest;
  ObjectReader reader(root, "KV manifest");
  int64_t version = 0;
  std::string dtype;
  reader.Read("version", &version);
  reader.Read("request_id", &manifest.request_id);
  reader.Read("transfer_id", &manifest.transfer_id);
  reader.Read("instance_epoch", &manifest.instance_epoch);
  reader.Read("architecture", &manifest.architecture);
  reader.Read("model_fingerprint", &manifest.model_fingerprint);
  reader.Read("token_hashes", &manifest.token_hashes);
  reader.Read("page_tokens", &manifest.page_tokens);
  reader.Read("num_tokens", &manifest.num_tokens);
  reader.Read("num_layers", &manifest.num_layers);
  reader.Read("num_kv_heads", &manifest.num_kv_heads);
  reader.Read("head_dim", &manifest.head_dim);
  if (reader.Has("rotary_chunk_tokens")) reader.Read("rotary_chunk_tokens", &manifest.rotary_chunk_tokens);
  reader.Read("dtype", &dtype);
  reader.Read("layout", &manifest.layout);
  reader.ReadList("shards", &manifest.shards, [](ObjectReader& shard_reader, KvShard* shard) {
    shard_reader.Read("rank", &shard->rank);
    shard_reader.Read("endpoint", &shard->endpoint);
    shard_reader.Read("token_ranges", &shard->token_ranges);
  });
  reader.ReadList("files", &manifest.files, [](ObjectReader& file_reader, KvFile* file) {
    file_reader.Read("name", &file->name);
    file_reader.Read("rank", &file->rank);
    file_reader.Read("token_ranges", &file->token_ranges);
    file_reader.ReadPair("layers", &file->layer_begin, &file->layer_end);
    file_reader.ReadPair("kv_heads", &file->head_begin, &file->head_end);
  });
  LF_RETURN_IF_ERROR(reader.Finish());
  if (version != kVersion) {
    return absl::InvalidArgumentError(
        absl::StrCat("KV manifest has version ", version, ", this program reads version ", kVersion));
  }
  LF_ASSIGN_OR_RETURN(manifest.dtype, ParseDType(dtype));
  if (manifest.rotary_chunk_tokens < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("KV manifest: rotary_chunk_tokens ", manifest.rotary_chunk_tokens, " is negative"));
  }
  for (const KvShard& shard : manifest.shards) {
    LF_RETURN_IF_ERROR(CheckRanges(shard.token_ranges, manifest.num_tokens,
                                   absl::StrCat("KV manifest: shard ", shard.rank)));
  }
  for (const KvFile& file : manifest.files) {
    LF_RETURN_IF_ERROR(
        CheckRanges(file.token_ranges, manifest.num_tokens, absl::StrCat("KV manifest: ", file.name)));
  }
  return manifest;
}

std::string KvFileName(int64_t layer, int rank) {
  std::array<char, 64> name;
  std::snprintf(name.data(), name.size(), "kv-layer-%03lld-rank-%03d.safetensors",
                static_cast<long long>(layer), rank);
  return name.data();
}

std::vector<KvFile> BatchFiles(const ShardPlan& plan, int64_t num_layers, int64_t num_kv_heads) {
  std::vector<KvFile> files;
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    for (int rank = 0; rank < plan.mesh().size(); ++rank) {
      if (plan.NumTokens(rank) == 0) continue;
      files.push_back({.name = KvFileName(layer, rank),
                       .layer_begin = layer,
                       .layer_end = layer + 1,
                       .head_begin = 0,
                       .head_end = num_kv_heads,
                       .rank = rank,
                       .token_ranges = plan.TokenRanges(rank)});
    }
  }
  return files;
}

}  // namespace longfill
