#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <exception>
#include <utility>

#include "absl/strings/str_cat.h"
#include "models/file_io.h"
#include "models/json_input.h"
#include "models/safetensors.h"

namespace longfill {
namespace {

constexpr int64_t kDataAlignment = 64;

std::string_view StoredName(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "F32";
    case DType::kBFloat16:
      return "BF16";
    case DType::kFloat16:
      return "F16";
    case DType::kInt32:
      return "I32";
    case DType::kInt64:
      return "I64";
  }
  return "";
}

absl::StatusOr<int64_t> SpecBytes(const SafetensorsSpec& spec) {
  int64_t bytes = DTypeBytes(spec.dtype);
  for (const int64_t extent : spec.shape) {
    if (extent < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", QuoteForMessage(spec.name), " has the negative extent ", extent));
    }
    if (__builtin_mul_overflow(bytes, extent, &bytes)) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", QuoteForMessage(spec.name), " overflows 2^63 bytes"));
    }
  }
  return bytes;
}

// Length prefix and JSON, padded with spaces so that the data begins at a multiple of kDataAlignment.
absl::StatusOr<std::string> SerializeHeader(const nlohmann::json& header) {
  std::string text;
  try {
    text = header.dump();
  } catch (const std::exception& error) {  // a name or metadata value that is not UTF-8
    return absl::InvalidArgumentError(absl::StrCat("safetensors header: ", QuoteForMessage(error.what())));
  }
  constexpr int64_t kHeaderLengthBytes = 8;
  while ((static_cast<int64_t>(text.size()) + kHeaderLengthBytes) % kDataAlignment != 0) text.push_back(' ');
  if (static_cast<int64_t>(text.size()) > kMaxSafetensorsHeaderBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        "safetensors header of ", text.size(), " bytes is above the limit of ", kMaxSafetensorsHeaderBytes));
  }
  const uint64_t length = text.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + text;
}

absl::Status Reserve(int fd, int64_t size_bytes, const std::string& path) {
  while (fallocate(fd, 0, 0, size_bytes) != 0) {
    if (errno == EINTR) continue;
    if (errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL) return absl::OkStatus();
    return WriteErrorStatus(errno, absl::StrCat("cannot reserve ", size_bytes, " bytes for ", path));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<SafetensorsWriter>> SafetensorsWriter::Create(
    const std::string& path, const std::vector<SafetensorsSpec>& tensors,
    const std::map<std::string, std::string>& metadata) {
  std::unique_ptr<SafetensorsWriter> writer(new SafetensorsWriter);
  nlohmann::json header = nlohmann::json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  int64_t data_bytes = 0;
  for (const SafetensorsSpec& spec : tensors) {
    LF_ASSIGN_OR_RETURN(const int64_t size, SpecBytes(spec));
    const int64_t begin = data_bytes;
    if (__builtin_add_overflow(data_bytes, size, &data_bytes) || data_bytes > INT64_MAX / 2) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": the tensors overflow 2^62 bytes"));
    }
    if (spec.name == "__metadata__" || !writer->targets_.emplace(spec.name, Target{begin, size}).second) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": tensor name ", QuoteForMessage(spec.name), " is reserved or given twice"));
    }
    header[spec.name] = {
        {"dtype", StoredName(spec.dtype)}, {"shape", spec.shape}, {"data_offsets", {begin, data_bytes}}};
  }
  LF_ASSIGN_OR_RETURN(const std::string head, SerializeHeader(header));
  for (auto& [name, target] : writer->targets_) target.file_offset += static_cast<int64_t>(head.size());
  writer->path_ = path;
  writer->file_bytes_ = static_cast<int64_t>(head.size()) + data_bytes;

  static std::atomic<int64_t> counter{0};
  while (writer->fd_ < 0) {  // a name can be left over from a killed process that had our id
    writer->partial_path_ = absl::StrCat(path, ".partial-", getpid(), "-", counter.fetch_add(1));
    writer->fd_ = open(writer->partial_path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (writer->fd_ < 0 && errno != EEXIST)
      return WriteErrorStatus(errno, absl::StrCat("cannot create ", path));
  }
  LF_RETURN_IF_ERROR(Reserve(writer->fd_, writer->file_bytes_, path));
  LF_RETURN_IF_ERROR(WriteFully(writer->fd_, 0, std::as_bytes(std::span(head)), path));
  return writer;
}

SafetensorsWriter::~SafetensorsWriter() { Discard(); }

void SafetensorsWriter::Discard() {
  if (fd_ < 0) return;
  close(fd_);
  fd_ = -1;
  unlink(partial_path_.c_str());
}

absl::Status SafetensorsWriter::Fail(absl::Status status) {
  const std::lock_guard lock(mutex_);
  if (error_.ok()) error_ = status;
  return status;
}

absl::StatusOr<int64_t> SafetensorsWriter::Claim(std::string_view name, std::optional<int64_t> offset_bytes,
                                                 int64_t size_bytes) {
  const std::lock_guard lock(mutex_);
  if (!error_.ok()) return error_;
  if (fd_ < 0) return absl::FailedPreconditionError(absl::StrCat(path_, " is closed"));
  const auto found = targets_.find(name);
  if (found == targets_.end()) {
    return absl::InvalidArgumentError(absl::StrCat(path_, " has no tensor ", QuoteForMessage(name)));
  }
  Target& target = found->second;
  const int64_t begin = offset_bytes.value_or(target.appended_bytes);
  if (begin < 0 || begin > target.size_bytes || size_bytes > target.size_bytes - begin) {
    return absl::InvalidArgumentError(absl::StrCat(path_, ": ", size_bytes, " bytes at ", begin,
                                                   " of tensor ", QuoteForMessage(name), " exceed its ",
                                                   target.size_bytes));
  }
  int64_t end = begin + size_bytes;
  if (size_bytes > 0) {
    // Joins its neighbours, so that a tensor written in order keeps one range.
    auto next = target.written.lower_bound(begin);
    auto previous = next == target.written.begin() ? target.written.end() : std::prev(next);
    if ((next != target.written.end() && next->first < end) ||
        (previous != target.written.end() && previous->second > begin)) {
      return absl::InvalidArgumentError(absl::StrCat(path_, ": bytes [", begin, ", ", end, ") of tensor ",
                                                     QuoteForMessage(name), " were written before in part"));
    }
    if (next != target.written.end() && next->first == end) {
      end = next->second;
      target.written.erase(next);
    }
    if (previous != target.written.end() && previous->second == begin) {
      previous->second = end;
    } else {
      target.written.emplace(begin, end);
    }
  }
  if (!offset_bytes.has_value()) target.appended_bytes = begin + size_bytes;
  return target.file_offset + begin;
}

absl::Status SafetensorsWriter::Write(std::string_view name, int64_t offset_bytes,
                                      std::span<const std::byte> bytes) {
  LF_ASSIGN_OR_RETURN(const int64_t place, Claim(name, offset_bytes, static_cast<int64_t>(bytes.size())));
  const absl::Status status = WriteFully(fd_, place, bytes, path_);
  return status.ok() ? status : Fail(status);
}

absl::Status SafetensorsWriter::Append(std::string_view name, std::span<const std::byte> bytes) {
  LF_ASSIGN_OR_RETURN(const int64_t place, Claim(name, std::nullopt, static_cast<int64_t>(bytes.size())));
  const absl::Status status = WriteFully(fd_, place, bytes, path_);
  return status.ok() ? status : Fail(status);
}

absl::Status SafetensorsWriter::Close() {
  const std::lock_guard lock(mutex_);
  if (!error_.ok()) return error_;
  if (fd_ < 0) return absl::FailedPreconditionError(absl::StrCat(path_, " is closed"));
  for (const auto& [name, target] : targets_) {
    const auto whole = target.written.find(0);
    if (target.size_bytes > 0 && (whole == target.written.end() || whole->second != target.size_bytes)) {
      error_ =
          absl::FailedPreconditionError(absl::StrCat(path_, ": tensor ", QuoteForMessage(name), " of ",
                                                     target.size_bytes, " bytes was not written completely"));
      return error_;
    }
  }
  const int fd = std::exchange(fd_, -1);
  if (close(fd) != 0) {
    error_ = WriteErrorStatus(errno, absl::StrCat("cannot close ", path_));
  } else if (std::rename(partial_path_.c_str(), path_.c_str()) != 0) {
    error_ = WriteErrorStatus(errno, absl::StrCat("cannot rename the finished file to ", path_));
  }
  if (!error_.ok()) unlink(partial_path_.c_str());
  return error_;
}

}  // namespace longfill
