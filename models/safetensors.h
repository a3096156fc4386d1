#ifndef LONGFILL_MODELS_SAFETENSORS_H_
#define LONGFILL_MODELS_SAFETENSORS_H_

// The safetensors format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape,
// data_offsets}}, then the tensors' bytes. https://github.com/huggingface/safetensors#format

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/base/status.h"

namespace longfill {

inline constexpr int64_t kMaxSafetensorsHeaderBytes = 100'000'000;

struct SafetensorsTensor {
  std::string name;
  std::string stored_dtype;    // as the header spells it: "BF16", "F8_E4M3", ...
  std::optional<DType> dtype;  // empty: a dtype of the format that longfill does not compute with
  std::vector<int64_t> shape;
  int64_t file_offset = 0;           // of the first byte, from the start of the file
  std::span<const std::byte> bytes;  // inside the mapping, any alignment; valid while the file object lives
};

// A file mapped read-only. Whoever keeps a view of its bytes keeps the shared_ptr. Immutable, so thread-safe.
// The file must not be shortened while it is mapped (a read behind its end is SIGBUS).
class SafetensorsFile {
 public:
  // NotFound: no such file; DataLoss: the file breaks the format (truncated, header length, JSON, duplicate
  // names, unknown dtype, shape against bytes, overlap, hole, bytes left over), naming file, tensor and
  // numbers.
  static absl::StatusOr<std::shared_ptr<const SafetensorsFile>> Open(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::string& path() const { return path_; }
  int64_t size_bytes() const { return size_bytes_; }
  int64_t header_bytes() const { return header_bytes_; }  // the JSON alone
  std::span<const std::byte> mapping() const { return {mapping_, static_cast<size_t>(size_bytes_)}; }
  const std::vector<SafetensorsTensor>& tensors() const { return tensors_; }  // in the order of their bytes
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  // nullptr: no such tensor.
  const SafetensorsTensor* Find(std::string_view name) const;

 private:
  SafetensorsFile() = default;
  absl::Status ReadHeader();
  absl::Status CheckRanges() const;

  std::string path_;
  const std::byte* mapping_ = nullptr;
  int64_t size_bytes_ = 0;
  int64_t header_bytes_ = 0;
  std::vector<SafetensorsTensor> tensors_;
  std::map<std::string, size_t, std::less<>> by_name_;
  std::map<std::string, std::string> metadata_;
};

struct SafetensorsSpec {
  std::string name;
  DType dtype = DType::kFloat32;
  std::vector<int64_t> shape;
};

// Writes one file whose tensors are known beforehand. The bytes go to "PATH.partial-PID-N" beside it, which
// Close() renames to PATH; dropped unclosed or after an error, it removes that file and PATH stays as it was.
// Tensors are laid out in the order given, the first at a multiple of 64 bytes. Writes are thread-safe among
// themselves.
class SafetensorsWriter {
 public:
  // Reserves the whole size on the disk where the file system can. InvalidArgument: duplicate or reserved
  // name, negative shape, overflow; ResourceExhausted: disk or quota full, naming the path.
  static absl::StatusOr<std::unique_ptr<SafetensorsWriter>> Create(
      const std::string& path, const std::vector<SafetensorsSpec>& tensors,
      const std::map<std::string, std::string>& metadata);
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  // Every byte of a tensor is written exactly once, in any order; `offset_bytes` counts from the tensor's
  // first byte. After a failed write the writer is of no more use: later calls return the first error.
  absl::Status Write(std::string_view name, int64_t offset_bytes, std::span<const std::byte> bytes);
  // At the end of what earlier Append calls wrote to this tensor.
  absl::Status Append(std::string_view name, std::span<const std::byte> bytes);

  // FailedPrecondition if a byte of some tensor was never written, naming the tensor. Does not wait for the
  // disk.
  absl::Status Close();

  const std::string& path() const { return path_; }
  int64_t file_bytes() const { return file_bytes_; }  // of the whole file when complete

 private:
  struct Target {
    int64_t file_offset = 0;
    int64_t size_bytes = 0;
    int64_t appended_bytes = 0;
    std::map<int64_t, int64_t> written;  // disjoint, non-adjacent [begin, end)
  };
  SafetensorsWriter() = default;
  absl::StatusOr<int64_t> Claim(std::string_view name, std::optional<int64_t> offset_bytes,
                                int64_t size_bytes);
  absl::Status Fail(absl::Status status);
  void Discard();

  std::string path_;
  std::string partial_path_;
  int fd_ = -1;
  int64_t file_bytes_ = 0;
  std::mutex mutex_;  // guards targets_ and error_
  std::map<std::string, Target, std::less<>> targets_;
  absl::Status error_;
};

}  // namespace longfill

#endif  // LONGFILL_MODELS_SAFETENSORS_H_
