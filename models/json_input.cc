#include "models/json_input.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <algorithm>

#include <cerrno>
#include <exception>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace longfill {
namespace {

using Json = nlohmann::json;

// Receives the parser's events and builds the document; refuses what the library's own builder lets through.
class StrictBuilder final : public nlohmann::json_sax<Json> {
 public:
  explicit StrictBuilder(const JsonLimits& limits) : limits_(limits) {}

  bool null() override { return Add(Json(nullptr)) != nullptr; }
  bool boolean(bool value) override { return Add(Json(value)) != nullptr; }
  bool number_integer(number_integer_t value) override { return Add(Json(value)) != nullptr; }
  bool number_unsigned(number_unsigned_t value) override { return Add(Json(value)) != nullptr; }
  bool number_float(number_float_t value, const string_t&) override { return Add(Json(value)) != nullptr; }
  bool string(string_t& value) override { return Add(Json(std::move(value))) != nullptr; }
  bool binary(binary_t&) override { return Fail("binary value"); }

  bool start_object(std::size_t) override { return Open(Json::object()); }
  bool start_array(std::size_t) override { return Open(Json::array()); }
  bool end_object() override { return CloseInnermost(); }
  bool end_array() override { return CloseInnermost(); }

  bool key(string_t& name) override {
    if (open_.back()->contains(name)) return Fail(absl::StrCat("duplicate key ", QuoteForMessage(name)));
    key_ = std::move(name);
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const Json::exception& error) override {
    return Fail(absl::StrCat("not valid JSON at byte ", position, ": ", QuoteForMessage(error.what())));
  }

  Json TakeRoot() { return std::move(root_); }
  const std::string& error() const { return error_; }

 private:
  Json* Add(Json&& value) {
    if (++num_values_ > limits_.max_values) {
      Fail(absl::StrCat("more than ", limits_.max_values, " values"));
      return nullptr;
    }
    if (open_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    Json& parent = *open_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return &parent.back();
    }
    return &(parent[key_] = std::move(value));
  }

  bool Open(Json&& container) {
    if (static_cast<int>(open_.size()) >= limits_.max_depth) {
      return Fail(absl::StrCat("nested deeper than ", limits_.max_depth));
    }
    Json* added = Add(std::move(container));
    if (added == nullptr) return false;
    open_.push_back(added);  // stays valid: its parent does not change until it is closed
    return true;
  }

  bool CloseInnermost() {
    open_.pop_back();
    return true;
  }

  bool Fail(std::string what) {
    if (error_.empty()) error_ = std::move(what);
    return false;
  }

  const JsonLimits limits_;
  Json root_;
  std::vector<Json*> open_;
  std::string key_;
  int64_t num_values_ = 0;
  std::string error_;
};

}  // namespace

std::string QuoteForMessage(std::string_view text) {
  constexpr size_t kMaxShown = 200;
  const bool cut = text.size() > kMaxShown;
  const std::string_view shown = text.substr(0, kMaxShown);
  return absl::StrCat("'", absl::Utf8SafeCEscape({shown.data(), shown.size()}), cut ? "...'" : "'");
}

absl::StatusOr<Json> ParseJson(std::string_view text, std::string_view source, const JsonLimits& limits) {
  const absl::string_view name(source.data(), source.size());
  try {
    StrictBuilder builder(limits);
    if (!Json::sax_parse(text.begin(), text.end(), &builder)) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": ", builder.error()));
    }
    return builder.TakeRoot();
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError(
        absl::StrCat(name, ": not enough memory for its JSON of ", text.size(), " bytes"));
  } catch (const std::exception& error) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": not valid JSON: ", QuoteForMessage(error.what())));
  }
}

absl::Status CheckKeys(const nlohmann::json& object, std::string_view name,
                       std::span<const char* const> keys) {
  const std::string where(name);
  for (const char* key : keys) {
    if (!object.contains(key)) return absl::InvalidArgumentError(absl::StrCat(where, " has no ", key));
  }
  for (const auto& [key, value] : object.items()) {
    if (std::find(keys.begin(), keys.end(), key) == keys.end()) {
      return absl::InvalidArgumentError(absl::StrCat(where, " has an unknown key ", QuoteForMessage(key)));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> ReadSmallFile(const std::string& path, int64_t max_bytes) {
  // O_NONBLOCK: a FIFO in the place of a file must not hang us.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return absl::ErrnoToStatus(errno, absl::StrCat("cannot open ", path));
  struct Closer {
    int fd;
    ~Closer() { close(fd); }
  } closer{fd};
  struct stat info;
  if (fstat(fd, &info) != 0) return absl::ErrnoToStatus(errno, absl::StrCat("cannot examine ", path));
  if (!S_ISREG(info.st_mode)) return absl::InvalidArgumentError(absl::StrCat(path, " is not a plain file"));
  if (info.st_size > max_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, " has ", info.st_size, " bytes, more than the limit of ", max_bytes));
  }
  std::string text(static_cast<size_t>(info.st_size), '\0');
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t got = read(fd, text.data() + done, text.size() - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return absl::ErrnoToStatus(errno, absl::StrCat("cannot read ", path));
    if (got == 0) {
      return absl::DataLossError(absl::StrCat(path, " ended after ", done, " of ", text.size(), " bytes"));
    }
    done += static_cast<size_t>(got);
  }
  return text;
}

}  // namespace longfill
