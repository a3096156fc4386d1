#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "models/safetensors.h"
#include "runtime/client/prefill_client.h"

namespace longfill {
namespace {

// Writes the pages of each rank into one file per layer. A file appears under its name when it is whole.
class KvFileWriter final : public KvConsumer {
 public:
  explicit KvFileWriter(std::string directory) : directory_(std::move(directory)) {}

  absl::Status OnManifest(const KvManifest& manifest) override {
    manifest_ = manifest;
    for (const KvShard& shard : manifest.shards) {
      RankFile& file = ranks_[shard.rank];
      for (const TokenRange& range : shard.token_ranges) file.num_rows += range.end - range.begin;
    }
    return absl::OkStatus();
  }

  absl::Status OnPage(const KvPageView& page) override {
    RankFile& file = ranks_.at(page.rank);  // the map itself does not change any more
    if (page.row_begin == 0) LF_RETURN_IF_ERROR(Open(page, &file));
    LF_RETURN_IF_ERROR(Write("key", page, page.key, &file));
    LF_RETURN_IF_ERROR(Write("value", page, page.value, &file));
    if (page.row_begin + page.num_tokens < file.num_rows) return absl::OkStatus();
    LF_RETURN_IF_ERROR(file.writer->Close());
    file.paths.push_back(file.writer->path());
    file.writer.reset();
    return absl::OkStatus();
  }

  // The manifest of the files, as the batch job writes it.
  KvManifest FileManifest() const {
    KvManifest manifest = manifest_;
    for (KvShard& shard : manifest.shards) shard.endpoint.clear();
    for (int64_t layer = 0; layer < manifest.num_layers; ++layer) {
      for (const KvShard& shard : manifest.shards) {
        if (shard.token_ranges.empty()) continue;
        manifest.files.push_back({.name = KvFileName(layer, shard.rank),
                                  .layer_begin = layer,
                                  .layer_end = layer + 1,
                                  .head_begin = 0,
                                  .head_end = manifest.num_kv_heads,
                                  .rank = shard.rank,
                                  .token_ranges = shard.token_ranges});
      }
    }
    return manifest;
  }

  void RemoveFiles() {
    for (auto& [rank, file] : ranks_) {
      file.writer.reset();
      for (const std::string& path : file.paths) {
        std::error_code ignored;  // the reason that is already on its way says more
        std::filesystem::remove(path, ignored);
      }
    }
  }

 private:
  struct RankFile {
    int64_t num_rows = 0;
    std::unique_ptr<SafetensorsWriter> writer;
    std::vector<std::string> paths;
  };

  absl::Status Open(const KvPageView& page, RankFile* file) {
    const std::vector<int64_t> shape = {manifest_.num_kv_heads, file->num_rows, manifest_.head_dim};
    LF_ASSIGN_OR_RETURN(
        file->writer,
        SafetensorsWriter::Create(directory_ + "/" + KvFileName(page.layer, page.rank),
                                  {{"key", manifest_.dtype, shape}, {"value", manifest_.dtype, shape}},
                                  {{"transfer_id", manifest_.transfer_id}}));
    return absl::OkStatus();
  }

  absl::Status Write(const char* name, const KvPageView& page, std::span<const std::byte> bytes,
                     RankFile* file) {
    const int64_t row_bytes = manifest_.head_dim * DTypeBytes(manifest_.dtype);
    const size_t run = static_cast<size_t>(page.num_tokens * row_bytes);
    for (int64_t head = 0; head < page.num_heads; ++head) {
      const int64_t row = (page.head_begin + head) * file->num_rows + page.row_begin;
      LF_RETURN_IF_ERROR(
          file->writer->Write(name, row * row_bytes, bytes.subspan(static_cast<size_t>(head) * run, run)));
    }
    return absl::OkStatus();
  }

  const std::string directory_;
  KvManifest manifest_;
  std::map<int, RankFile> ranks_;
};

absl::Status WriteLogits(const std::string& path, const Prefilled& prefilled) {
  const int64_t rows = static_cast<int64_t>(prefilled.positions.size());
  LF_ASSIGN_OR_RETURN(const auto writer,
                      SafetensorsWriter::Create(path,
                                                {{"positions", DType::kInt64, {rows}},
                                                 {"logits", DType::kFloat32, {rows, prefilled.vocab_size}}},
                                                {}));
  LF_RETURN_IF_ERROR(writer->Append("positions", std::as_bytes(std::span(prefilled.positions))));
  LF_RETURN_IF_ERROR(writer->Append("logits", std::as_bytes(std::span(prefilled.logits))));
  return writer->Close();
}

absl::Status WriteText(const std::string& path, const std::string& text) {
  const std::string partial = path + ".partial";
  {
    std::ofstream file(partial, std::ios::binary | std::ios::trunc);
    file << text;
    file.close();
    if (!file) return absl::ResourceExhaustedError(absl::StrCat("cannot write ", partial));
  }
  if (std::rename(partial.c_str(), path.c_str()) != 0) {
    return absl::InternalError(absl::StrCat("cannot rename ", partial));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Prefilled> DownloadToDirectory(PrefillClient& client, std::span<const int32_t> ids,
                                              const SubmitOptions& options, const std::string& directory,
                                              const PrefillEvents& events, Cancellation* cancellation,
                                              PrefillRefusal* refusal) {
  KvFileWriter files(directory);
  const std::string logits_path = directory + "/logits.safetensors";
  absl::StatusOr<Prefilled> result = client.Prefill(ids, options, &files, events, cancellation, refusal);
  absl::Status status = result.status();
  if (status.ok()) status = WriteLogits(logits_path, *result);
  if (status.ok()) status = WriteText(directory + "/manifest.json", files.FileManifest().ToJson());
  if (status.ok()) return result;
  files.RemoveFiles();
  std::error_code ignored;
  if (result.ok()) std::filesystem::remove(logits_path, ignored);
  return status;
}

}  // namespace longfill
