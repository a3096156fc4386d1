#include <filesystem>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "models/safetensors.h"
#include "runtime/kv/kv_convert.h"
#include "runtime/kv/kv_manifest.h"

namespace longfill {
namespace {

class KvFileSink final : public KvSink {
 public:
  KvFileSink(std::string directory, const KvTransferSpec& spec)
      : directory_(std::move(directory)), spec_(spec), num_rows_(spec.plan.NumTokens(spec.rank)) {}

  ~KvFileSink() override {
    if (!finished_) RemoveFiles();
  }

  absl::Status Append(int64_t layer, int64_t row_begin, int64_t row_end, HeadsView<const void> key,
                      HeadsView<const void> value, DType dtype) override {
    if (row_begin == row_end) return absl::OkStatus();
    if (writer_ == nullptr) LF_RETURN_IF_ERROR(Open(layer));
    LF_RETURN_IF_ERROR(Write("key", row_begin, row_end, key, dtype));
    LF_RETURN_IF_ERROR(Write("value", row_begin, row_end, value, dtype));
    if (row_end < num_rows_) return absl::OkStatus();
    LF_RETURN_IF_ERROR(writer_->Close());
    paths_.push_back(writer_->path());
    writer_.reset();
    return absl::OkStatus();
  }

  absl::Status Finish(const absl::Status& outcome) override {
    finished_ = true;
    writer_.reset();
    if (!outcome.ok()) RemoveFiles();
    return absl::OkStatus();
  }

 private:
  absl::Status Open(int64_t layer) {
    const std::vector<int64_t> shape = {spec_.num_kv_heads, num_rows_, spec_.head_dim};
    LF_ASSIGN_OR_RETURN(
        writer_, SafetensorsWriter::Create(directory_ + "/" + KvFileName(layer, spec_.rank),
                                           {{"key", spec_.dtype, shape}, {"value", spec_.dtype, shape}},
                                           {{"transfer_id", spec_.transfer_id}}));
    return absl::OkStatus();
  }

  absl::Status Write(const char* name, int64_t row_begin, int64_t row_end, HeadsView<const void> view,
                     DType dtype) {
    const int64_t row_bytes = spec_.head_dim * DTypeBytes(spec_.dtype);
    const int64_t rows = row_end - row_begin;
    const bool as_it_is = dtype == spec_.dtype && view.row_stride == spec_.head_dim;
    if (!as_it_is) converted_.resize(static_cast<size_t>(rows * row_bytes));
    for (int64_t head = 0; head < spec_.num_kv_heads; ++head) {
      std::span<const std::byte> bytes = converted_;
      if (as_it_is) {
        bytes = {static_cast<const std::byte*>(Advance(view.data, head * view.head_stride, dtype)),
                 static_cast<size_t>(rows * row_bytes)};
      } else {
        ConvertHeadRows(view, dtype, head, rows, spec_.head_dim, spec_.dtype, converted_.data());
      }
      LF_RETURN_IF_ERROR(writer_->Write(name, (head * num_rows_ + row_begin) * row_bytes, bytes));
    }
    return absl::OkStatus();
  }

  void RemoveFiles() {
    for (const std::string& path : paths_) {
      std::error_code ignored;  // the reason that is already on its way says more
      std::filesystem::remove(path, ignored);
    }
  }

  const std::string directory_;
  const KvTransferSpec spec_;
  const int64_t num_rows_;
  std::unique_ptr<SafetensorsWriter> writer_;  // of the layer that is being written
  std::vector<std::string> paths_;             // of the layers that are whole
  std::vector<std::byte> converted_;
  bool finished_ = false;
};

}  // namespace

KvSinkFactory MakeKvFileSinkFactory(std::string directory) {
  return [directory =
              std::move(directory)](const KvTransferSpec& spec) -> absl::StatusOr<std::unique_ptr<KvSink>> {
    return std::make_unique<KvFileSink>(directory, spec);
  };
}

}  // namespace longfill
