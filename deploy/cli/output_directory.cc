#include "deploy/cli/output_directory.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "models/safetensors.h"

namespace longfill {
namespace {

namespace fs = std::filesystem;

absl::Status SystemError(const std::string& path, int error) {
  const std::string message = absl::StrCat("output ", path, ": ", std::strerror(error));
  switch (error) {
    case EACCES:
    case EPERM:
    case EROFS:
      return absl::PermissionDeniedError(message);
    case ENOSPC:
    case EDQUOT:
      return absl::ResourceExhaustedError(message);
    case ENOTDIR:
    case ENOENT:
    case ENAMETOOLONG:
      return absl::InvalidArgumentError(message);
    default:
      return absl::InternalError(message);
  }
}

bool IsPromptName(std::string_view name) {
  return name.size() >= 3 &&
         std::all_of(name.begin(), name.end(), [](unsigned char c) { return std::isdigit(c); });
}

// Also the temporary names of files that a killed run left half written.
bool IsOurFile(std::string_view name) {
  const absl::string_view text(name.data(), name.size());
  return absl::StartsWith(text, "kv-layer-") || absl::StartsWith(text, "manifest.json") ||
         absl::StartsWith(text, "logits.safetensors");
}

absl::Status RemoveOurFiles(const std::string& folder) {
  std::error_code error;
  std::vector<fs::path> ours;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    if (IsOurFile(it->path().filename().string()) && !it->is_directory(error)) ours.push_back(it->path());
  }
  if (error) return SystemError(folder, error.value());
  for (const fs::path& path : ours) {
    if (!fs::remove(path, error) && error) return SystemError(path.string(), error.value());
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<std::string>> PromptFolders(const std::string& path) {
  std::error_code error;
  std::vector<std::string> folders;
  for (fs::directory_iterator it(path, error), end; !error && it != end; it.increment(error)) {
    if (IsPromptName(it->path().filename().string()) && it->is_directory(error))
      folders.push_back(it->path().string());
  }
  if (error) return SystemError(path, error.value());
  return folders;
}

// Makes `path` and its missing parents; those made are appended to `made`, outermost first.
absl::Status MakeDirectories(const fs::path& path, std::vector<std::string>& made) {
  std::vector<fs::path> missing;
  std::error_code error;
  for (fs::path at = path; !at.empty() && !fs::exists(at, error); at = at.parent_path()) {
    missing.push_back(at);
    if (at == at.parent_path()) break;
  }
  for (auto it = missing.rbegin(); it != missing.rend(); ++it) {
    if (fs::create_directory(*it, error)) {
      made.push_back(it->string());
    } else if (error) {
      return SystemError(it->string(), error.value());
    }
  }
  return absl::OkStatus();
}

}  // namespace

std::string PromptName(int prompt) { return absl::StrFormat("%03d", prompt); }

absl::StatusOr<std::unique_ptr<OutputDirectory>> OutputDirectory::Open(const std::string& path,
                                                                       int num_prompts, bool overwrite) {
  std::unique_ptr<OutputDirectory> directory(new OutputDirectory(path, num_prompts));
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (status.type() == fs::file_type::none) return SystemError(path, error.value());
  if (fs::exists(status) && !fs::is_directory(status)) {
    return absl::InvalidArgumentError(absl::StrCat("output ", path, ": not a directory"));
  }
  LF_RETURN_IF_ERROR(MakeDirectories(fs::path(path).lexically_normal(), directory->made_));
  if (!overwrite) {
    const bool empty = fs::is_empty(path, error);
    if (error) return SystemError(path, error.value());
    if (!empty) {
      return absl::InvalidArgumentError(
          absl::StrCat("output ", path, ": not empty; --overwrite replaces an earlier result"));
    }
  }
  if (access(path.c_str(), R_OK | W_OK | X_OK) != 0) return SystemError(path, errno);
  return directory;
}

absl::Status OutputDirectory::Prepare() {
  LF_RETURN_IF_ERROR(RemoveOurFiles(path_));
  LF_ASSIGN_OR_RETURN(const std::vector<std::string> old_folders, PromptFolders(path_));
  for (const std::string& folder : old_folders) {
    LF_RETURN_IF_ERROR(RemoveOurFiles(folder));
    std::error_code ignored;  // a folder that holds other files stays
    fs::remove(folder, ignored);
  }
  prepared_ = true;
  for (int prompt = 0; prompt < num_prompts_; ++prompt) {
    LF_RETURN_IF_ERROR(MakeDirectories(Folder(prompt), made_));
  }
  return absl::OkStatus();
}

OutputDirectory::~OutputDirectory() {
  if (keep_) return;
  // An error while cleaning up after an error has no one to be told: the first one is being reported.
  if (prepared_) {
    for (int prompt = 0; prompt < num_prompts_; ++prompt) RemoveOurFiles(Folder(prompt)).IgnoreError();
  }
  for (auto it = made_.rbegin(); it != made_.rend(); ++it) {
    std::error_code ignored;
    fs::remove(*it, ignored);
  }
}

std::string OutputDirectory::Folder(int prompt) const {
  return num_prompts_ == 1 ? path_ : (fs::path(path_) / PromptName(prompt)).string();
}

absl::Status WriteTextFile(const std::string& path, std::string_view text) {
  const std::string partial = absl::StrCat(path, ".partial-", getpid());
  const int fd = open(partial.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd < 0) return SystemError(path, errno);
  int error = 0;
  while (!text.empty() && error == 0) {
    const ssize_t count = write(fd, text.data(), text.size());
    if (count >= 0) {
      text.remove_prefix(static_cast<size_t>(count));
    } else if (errno != EINTR) {
      error = errno;
    }
  }
  if (close(fd) != 0 && error == 0) error = errno;
  if (error == 0 && rename(partial.c_str(), path.c_str()) != 0) error = errno;
  if (error == 0) return absl::OkStatus();
  unlink(partial.c_str());
  return SystemError(path, error);
}

absl::Status WriteLogitsFile(const std::string& folder, std::span<const int64_t> positions,
                             std::span<const float> logits, int64_t vocab_size) {
  const auto count = static_cast<int64_t>(positions.size());
  const std::vector<SafetensorsSpec> tensors = {{"positions", DType::kInt64, {count}},
                                                {"logits", DType::kFloat32, {count, vocab_size}}};
  LF_ASSIGN_OR_RETURN(auto writer,
                      SafetensorsWriter::Create((fs::path(folder) / kLogitsFileName).string(), tensors, {}));
  LF_RETURN_IF_ERROR(writer->Append("positions", std::as_bytes(positions)));
  LF_RETURN_IF_ERROR(writer->Append("logits", std::as_bytes(logits)));
  return writer->Close();
}

}  // namespace longfill
