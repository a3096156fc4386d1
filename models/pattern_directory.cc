#include "models/pattern_directory.h"

#include <algorithm>
#include <filesystem>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace longfill {
namespace {

struct PublishedPatterns {
  std::string_view model;  // lower case, without its owner
  std::string_view file;
};

// The table of MInference 1.0 (minference/configs/model2path.py), with the files that it publishes for
// Qwen2.5-1M.
constexpr PublishedPatterns kPublished[] = {
    {"llama-3-8b-instruct-262k", "Llama_3_8B_Instruct_262k_kv_out_v32_fit_o_best_pattern.json"},
    {"llama-3-8b-instruct-gradient-1048k", "Llama_3_8B_Instruct_262k_kv_out_v32_fit_o_best_pattern.json"},
    {"llama-3-8b-instruct-gradient-4194k", "Llama_3_8B_Instruct_262k_kv_out_v32_fit_o_best_pattern.json"},
    {"llama-3-70b-instruct-gradient-262k", "Llama_3_70B_Instruct_262k_kv_out_v32_fit_o_best_pattern.json"},
    {"llama-3-70b-instruct-gradient-1048k", "Llama_3_70B_Instruct_262k_kv_out_v32_fit_o_best_pattern.json"},
    {"meta-llama-3.1-8b-instruct", "Llama_3.1_8B_Instruct_128k_kv_out_v32_fit_o_best_pattern_v2.json"},
    {"llama-3.1-8b-instruct", "Llama_3.1_8B_Instruct_128k_kv_out_v32_fit_o_best_pattern_v2.json"},
    {"meta-llama-3.1-70b-instruct", "Llama_3.1_70B_Instruct_128k_kv_out_v32_fit_o_best_pattern_v2.json"},
    {"llama-3.1-70b-instruct", "Llama_3.1_70B_Instruct_128k_kv_out_v32_fit_o_best_pattern_v2.json"},
    {"yi-9b-200k", "Yi_9B_200k_kv_out_v32_fit_o_best_pattern.json"},
    {"phi-3-mini-128k-instruct", "Phi_3_mini_128k_instruct_kv_out_v32_fit_o_best_pattern.json"},
    {"glm-4-9b-chat-1m", "GLM_4_9B_1M_instruct_kv_out_v32_fit_o_best_pattern.json"},
    {"glm-4-9b-chat-1m-hf", "GLM_4_9B_1M_instruct_kv_out_v32_fit_o_best_pattern.json"},
    {"qwen2-7b-instruct", "Qwen2_7B_Instruct_128k_instruct_kv_out_v32_fit_o_best_pattern.json"},
    {"qwen2.5-7b-instruct", "Qwen2.5_7B_Instruct_128k_instruct_kv_out_v32_fit_o_best_pattern.json"},
    {"qwen2.5-32b-instruct", "Qwen2.5_32B_Instruct_128k_kv_out_v32_fit_o_best_pattern.json"},
    {"qwen2.5-72b-instruct", "Qwen2.5_72B_Instruct_128k_kv_out_v32_fit_o_best_pattern.json"},
    {"qwen2.5-7b-instruct-1m", "Qwen2.5_7B_Instruct_1M.json"},
    {"qwen2.5-14b-instruct-1m", "Qwen2.5_14B_Instruct_1M.json"},
};

constexpr std::string_view kAnyModel = "patterns.json";
constexpr std::string_view kCachePrefix = "models--";

void AddName(std::string name, std::vector<std::string>* names) {
  if (name.empty() || name == "." || name == "..") return;
  if (std::find(names->begin(), names->end(), name) == names->end()) names->push_back(std::move(name));
}

}  // namespace

std::vector<std::string> ModelNames(const std::string& model_dir, std::string_view name_or_path) {
  std::vector<std::string> names;
  std::error_code error;
  std::filesystem::path path = std::filesystem::absolute(model_dir, error).lexically_normal();
  if (!path.has_filename()) path = path.parent_path();  // DIR/
  const std::string cache = path.parent_path().parent_path().filename().string();
  if (path.parent_path().filename() == "snapshots" && cache.starts_with(kCachePrefix)) {
    const size_t owner_end = cache.find("--", kCachePrefix.size());
    const size_t begin = owner_end == std::string::npos ? kCachePrefix.size() : owner_end + 2;
    AddName(cache.substr(begin), &names);
  } else {
    AddName(path.filename().string(), &names);
  }
  AddName(std::string(name_or_path.substr(name_or_path.find_last_of('/') + 1)), &names);
  return names;
}

absl::StatusOr<std::string> FindPatternFile(const std::string& directory,
                                            std::span<const std::string> names) {
  const std::filesystem::path folder(directory);
  const auto is_file = [](const std::filesystem::path& path) {
    std::error_code ignored;
    return std::filesystem::is_regular_file(path, ignored);
  };
  for (const std::string& name : names) {
    if (is_file(folder / (name + ".json"))) return (folder / (name + ".json")).string();
    const std::string lower = absl::AsciiStrToLower(name);
    for (const PublishedPatterns& published : kPublished) {
      if (published.model == lower && is_file(folder / published.file)) {
        return (folder / published.file).string();
      }
    }
  }
  if (is_file(folder / kAnyModel)) return (folder / kAnyModel).string();
  const std::string model = names.empty() ? "without a name (give the file itself)"
                                          : absl::StrCat("named ", absl::StrJoin(names, " or "));
  return absl::NotFoundError(absl::StrCat("no pattern file in ", directory, " for a model ", model, ", nor ",
                                          std::string(kAnyModel)));
}

}  // namespace longfill
