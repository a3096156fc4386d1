#include "deploy/cli/output_directory.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <string_view>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "models/file_io.h"
#include "models/safetensors.h"

namespace longfill {
namespace {

namespace fs = std::filesystem;

// Takes the number at the start of `text` off.
bool ConsumeNumber(std::string_view* text) {
  const size_t digits = std::min(text->find_first_not_of("0123456789"), text->size());
  text->remove_prefix(digits);
  return digits > 0;
}

bool Consume(std::string_view prefix, std::string_view* text) {
  if (!text->starts_with(prefix)) return false;
  text->remove_prefix(prefix.size());
  return true;
}

// Also what a killed run left half written, under a temporary name (models/file_io.h, safetensors_writer.h).
bool IsOurFile(std::string_view name) {
  std::string_view rest = name;
  const bool named = Consume(kManifestFileName, &rest) || Consume(kLogitsFileName, &rest) ||
                     (Consume("kv-layer-", &rest) && ConsumeNumber(&rest) && Consume("-rank-", &rest) &&
                      ConsumeNumber(&rest) && Consume(".safetensors", &rest));
  if (!named || rest.empty()) return named;
  return Consume(".partial-", &rest) && ConsumeNumber(&rest) &&
         (rest.empty() || (Consume("-", &rest) && ConsumeNumber(&rest) && rest.empty()));
}

absl::Status RemoveOurFiles(const std::string& folder) {
  std::error_code error;
  std::vector<fs::path> ours;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    if (IsOurFile(it->path().filename().string()) && !it->is_directory(error)) ours.push_back(it->path());
  }
  if (error) return OutputError(folder, error.value());
  for (const fs::path& path : ours) {
    if (!fs::remove(path, error) && error) return OutputError(path.string(), error.value());
  }
  return absl::OkStatus();
}

// Those of an earlier run with several prompts: 000, 001 and so on, without a gap.
std::vector<std::string> PromptFolders(const std::string& path) {
  std::vector<std::string> folders;
  std::error_code error;
  for (int prompt = 0;; ++prompt) {
    const fs::path folder = fs::path(path) / PromptName(prompt);
    if (!fs::is_directory(fs::symlink_status(folder, error))) return folders;
    folders.push_back(folder.string());
  }
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
      return OutputError(it->string(), error.value());
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
  if (status.type() == fs::file_type::none) return OutputError(path, error.value());
  if (fs::exists(status) && !fs::is_directory(status)) {
    return absl::InvalidArgumentError(absl::StrCat("output ", path, ": not a directory"));
  }
  LF_RETURN_IF_ERROR(MakeDirectories(fs::path(path).lexically_normal(), directory->made_));
  if (!overwrite) {
    const bool empty = fs::is_empty(path, error);
    if (error) return OutputError(path, error.value());
    if (!empty) {
      return absl::InvalidArgumentError(
          absl::StrCat("output ", path, ": not empty; --overwrite replaces an earlier result"));
    }
  }
  if (access(path.c_str(), R_OK | W_OK | X_OK) != 0) return OutputError(path, errno);
  return directory;
}

absl::Status OutputDirectory::Prepare() {
  LF_RETURN_IF_ERROR(RemoveOurFiles(path_));
  for (const std::string& folder : PromptFolders(path_)) {
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
