#include "models/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "models/json_input.h"

namespace longfill {
namespace {

using Json = nlohmann::json;

static_assert(std::endian::native == std::endian::little, "safetensors holds little-endian numbers");

constexpr int64_t kLengthBytes = 8;
constexpr size_t kMaxRank = 16;

struct StoredDType {
  std::string_view name;
  int64_t bits;
  std::optional<DType> dtype;
};

// Every dtype of the format; bits, since some are smaller than a byte.
constexpr StoredDType kStoredDTypes[] = {
    {"F32", 32, DType::kFloat32}, {"BF16", 16, DType::kBFloat16}, {"F16", 16, DType::kFloat16},
    {"I32", 32, DType::kInt32},   {"I64", 64, DType::kInt64},     {"F64", 64, std::nullopt},
    {"C64", 64, std::nullopt},    {"U64", 64, std::nullopt},      {"U32", 32, std::nullopt},
    {"I16", 16, std::nullopt},    {"U16", 16, std::nullopt},      {"I8", 8, std::nullopt},
    {"U8", 8, std::nullopt},      {"BOOL", 8, std::nullopt},      {"F8_E4M3", 8, std::nullopt},
    {"F8_E5M2", 8, std::nullopt}, {"F8_E8M0", 8, std::nullopt},   {"F6_E2M3", 6, std::nullopt},
    {"F6_E3M2", 6, std::nullopt}, {"F4", 4, std::nullopt},
};

const StoredDType* FindStoredDType(std::string_view name) {
  const auto* found = std::find_if(std::begin(kStoredDTypes), std::end(kStoredDTypes),
                                   [&](const StoredDType& dtype) { return dtype.name == name; });
  return found == std::end(kStoredDTypes) ? nullptr : found;
}

std::optional<int64_t> AsOffset(const Json& value) {
  if (!value.is_number_unsigned()) return std::nullopt;
  const uint64_t number = value.get<uint64_t>();
  if (number > static_cast<uint64_t>(INT64_MAX)) return std::nullopt;
  return static_cast<int64_t>(number);
}

// Bytes of a tensor of the shape; nullopt where they overflow or are no whole number.
std::optional<int64_t> ShapeBytes(const std::vector<int64_t>& shape, int64_t bits) {
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
  int64_t total = bits;
  for (const int64_t extent : shape) {
    if (__builtin_mul_overflow(total, extent, &total)) return std::nullopt;
  }
  if (total % 8 != 0) return std::nullopt;
  return total / 8;
}

// One header entry; file_offset counts from the data's start until the caller adds it.
absl::StatusOr<SafetensorsTensor> ParseTensor(const std::string& name, const Json& entry,
                                              int64_t data_bytes) {
  const auto bad = [&](const auto&... parts) {
    return absl::DataLossError(absl::StrCat("tensor ", QuoteForMessage(name), " ", parts...));
  };
  if (!entry.is_object() || entry.size() != 3 || !entry.contains("dtype") || !entry.contains("shape") ||
      !entry.contains("data_offsets")) {
    return bad("must have dtype, shape and data_offsets and nothing else");
  }
  SafetensorsTensor tensor;
  tensor.name = name;
  const Json& dtype = entry["dtype"];
  const StoredDType* stored =
      dtype.is_string() ? FindStoredDType(dtype.get_ref<const std::string&>()) : nullptr;
  if (stored == nullptr) return bad("has the unknown dtype ", QuoteForMessage(dtype.dump()));
  tensor.stored_dtype = std::string(stored->name);
  tensor.dtype = stored->dtype;

  const Json& shape = entry["shape"];
  if (!shape.is_array() || shape.size() > kMaxRank)
    return bad("has a shape that is no list of at most 16 numbers");
  for (const Json& extent : shape) {
    const std::optional<int64_t> value = AsOffset(extent);
    if (!value.has_value())
      return bad("has the bad extent ", QuoteForMessage(extent.dump()), " in its shape");
    tensor.shape.push_back(*value);
  }
  const Json& offsets = entry["data_offsets"];
  if (!offsets.is_array() || offsets.size() != 2) return bad("has data_offsets that are not two numbers");
  const std::optional<int64_t> begin = AsOffset(offsets[0]), end = AsOffset(offsets[1]);
  if (!begin.has_value() || !end.has_value() || *begin > *end || *end > data_bytes) {
    return bad("has data_offsets ", QuoteForMessage(offsets.dump()), " outside the file's ", data_bytes,
               " bytes of data (is it truncated?)");
  }
  const std::optional<int64_t> expected = ShapeBytes(tensor.shape, stored->bits);
  if (!expected.has_value() || *expected != *end - *begin) {
    return bad("of dtype ", tensor.stored_dtype, " and shape [", absl::StrJoin(tensor.shape, ", "),
               "] needs ",
               expected.has_value() ? absl::StrCat(*expected) : "no whole or representable number of",
               " bytes, its data_offsets span ", *end - *begin);
  }
  tensor.file_offset = *begin;
  return tensor;
}

absl::StatusOr<std::map<std::string, std::string>> ParseMetadata(const Json& entry) {
  std::map<std::string, std::string> metadata;
  if (!entry.is_object()) return absl::DataLossError("__metadata__ is no object");
  for (const auto& [key, value] : entry.items()) {
    if (!value.is_string()) {
      return absl::DataLossError(absl::StrCat("__metadata__ ", QuoteForMessage(key), " is no string"));
    }
    metadata.emplace(key, value.get<std::string>());
  }
  return metadata;
}

}  // namespace

absl::StatusOr<std::shared_ptr<const SafetensorsFile>> SafetensorsFile::Open(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return absl::ErrnoToStatus(errno, absl::StrCat("cannot open ", path));
  struct Closer {
    int fd;
    ~Closer() { close(fd); }
  } closer{fd};
  struct stat info;
  if (fstat(fd, &info) != 0) return absl::ErrnoToStatus(errno, absl::StrCat("cannot examine ", path));
  if (!S_ISREG(info.st_mode)) return absl::InvalidArgumentError(absl::StrCat(path, " is not a plain file"));
  if (info.st_size < kLengthBytes) {
    return absl::DataLossError(
        absl::StrCat(path, ": ", info.st_size, " bytes are no safetensors file (truncated?)"));
  }
  std::shared_ptr<SafetensorsFile> file(new SafetensorsFile);
  file->path_ = path;
  void* mapping = mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ, MAP_SHARED, fd, 0);
  if (mapping == MAP_FAILED) return absl::ErrnoToStatus(errno, absl::StrCat("cannot map ", path));
  file->mapping_ = static_cast<const std::byte*>(mapping);
  file->size_bytes_ = info.st_size;
  const absl::Status status = file->ReadHeader();
  if (!status.ok()) return Annotate(status, path);
  return std::shared_ptr<const SafetensorsFile>(std::move(file));
}

SafetensorsFile::~SafetensorsFile() {
  if (mapping_ != nullptr) munmap(const_cast<std::byte*>(mapping_), static_cast<size_t>(size_bytes_));
}

absl::Status SafetensorsFile::ReadHeader() {
  uint64_t length = 0;
  std::copy_n(mapping_, kLengthBytes, reinterpret_cast<std::byte*>(&length));
  if (length > static_cast<uint64_t>(kMaxSafetensorsHeaderBytes)) {
    return absl::DataLossError(
        absl::StrCat("header length ", length, " is above the limit of ", kMaxSafetensorsHeaderBytes));
  }
  header_bytes_ = static_cast<int64_t>(length);
  if (header_bytes_ > size_bytes_ - kLengthBytes) {
    return absl::DataLossError(absl::StrCat("header length ", header_bytes_, " reaches beyond the file of ",
                                            size_bytes_, " bytes (truncated?)"));
  }
  const std::string_view text(reinterpret_cast<const char*>(mapping_) + kLengthBytes, length);
  if (!text.starts_with('{')) return absl::DataLossError("the header does not begin with '{'");
  // 5 deep: file, tensor, shape; metadata is flat.
  const absl::StatusOr<Json> header = ParseJson(text, "header", {.max_depth = 5});
  if (!header.ok()) {
    return header.status().code() == absl::StatusCode::kInvalidArgument
               ? absl::DataLossError(header.status().message())
               : header.status();
  }
  const int64_t data_begin = kLengthBytes + header_bytes_;
  for (const auto& [name, entry] : header->items()) {
    if (name == "__metadata__") {
      LF_ASSIGN_OR_RETURN(metadata_, ParseMetadata(entry));
      continue;
    }
    LF_ASSIGN_OR_RETURN(SafetensorsTensor tensor, ParseTensor(name, entry, size_bytes_ - data_begin));
    const std::optional<int64_t> bytes = ShapeBytes(tensor.shape, FindStoredDType(tensor.stored_dtype)->bits);
    tensor.file_offset += data_begin;
    tensor.bytes = mapping().subspan(static_cast<size_t>(tensor.file_offset), static_cast<size_t>(*bytes));
    tensors_.push_back(std::move(tensor));
  }
  std::sort(tensors_.begin(), tensors_.end(), [](const SafetensorsTensor& a, const SafetensorsTensor& b) {
    return std::tuple(a.file_offset, a.bytes.size(), std::string_view(a.name)) <
           std::tuple(b.file_offset, b.bytes.size(), std::string_view(b.name));
  });
  for (size_t i = 0; i < tensors_.size(); ++i) by_name_.emplace(tensors_[i].name, i);
  return CheckRanges();
}

absl::Status SafetensorsFile::CheckRanges() const {
  int64_t covered_end = kLengthBytes + header_bytes_;
  for (const SafetensorsTensor& tensor : tensors_) {
    if (tensor.file_offset != covered_end) {
      return absl::DataLossError(absl::StrCat(
          "tensor ", QuoteForMessage(tensor.name), " begins at byte ", tensor.file_offset, " of the file, ",
          tensor.file_offset < covered_end ? "inside the tensor before it, which ends at "
                                           : "leaving a hole after byte ",
          covered_end));
    }
    covered_end += static_cast<int64_t>(tensor.bytes.size());
  }
  if (covered_end != size_bytes_) {
    return absl::DataLossError(
        absl::StrCat("the tensors end at byte ", covered_end, ", the file has ", size_bytes_, " bytes"));
  }
  return absl::OkStatus();
}

const SafetensorsTensor* SafetensorsFile::Find(std::string_view name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : &tensors_[found->second];
}

}  // namespace longfill
