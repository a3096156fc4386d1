#ifndef LONGFILL_DEPLOY_CLI_OUTPUT_DIRECTORY_H_
#define LONGFILL_DEPLOY_CLI_OUTPUT_DIRECTORY_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/status.h"

namespace longfill {

inline constexpr std::string_view kManifestFileName = "manifest.json";
inline constexpr std::string_view kLogitsFileName = "logits.safetensors";

// The directory that `prefill` and `submit` write to, one folder for each prompt: the directory itself for
// one prompt, OUT/000, OUT/001, ... for several. Files in it that are not ours are never touched.
class OutputDirectory {
 public:
  // Makes the directory if it is not there and checks that it can be written to. InvalidArgument: it holds
  // something and `overwrite` is false, or it is no directory; PermissionDenied, ResourceExhausted, Internal:
  // the system's refusal.
  static absl::StatusOr<std::unique_ptr<OutputDirectory>> Open(const std::string& path, int num_prompts,
                                                               bool overwrite);
  // Removes what it made and what is then empty, unless Keep() was called.
  ~OutputDirectory();
  OutputDirectory(const OutputDirectory&) = delete;
  OutputDirectory& operator=(const OutputDirectory&) = delete;

  // Removes what an earlier run left (manifest.json, logits.safetensors, kv-layer-LLL-rank-RRR.safetensors,
  // these half written, and all of it in 000/, 001/ and so on) and makes the folders of the prompts. Nothing
  // is removed before this call.
  absl::Status Prepare();

  // Folder of one prompt.
  std::string Folder(int prompt) const;

  // The work is done: what is there stays.
  void Keep() { keep_ = true; }

 private:
  OutputDirectory(std::string path, int num_prompts) : path_(std::move(path)), num_prompts_(num_prompts) {}

  std::string path_;
  int num_prompts_;
  std::vector<std::string> made_;  // directories that this object made, outermost first
  bool prepared_ = false;
  bool keep_ = false;
};

// "000" for prompt 0: the name of its folder among several.
std::string PromptName(int prompt);

// logits.safetensors of a prompt: positions I64 [P], logits F32 [P, vocab_size].
absl::Status WriteLogitsFile(const std::string& folder, std::span<const int64_t> positions,
                             std::span<const float> logits, int64_t vocab_size);

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_OUTPUT_DIRECTORY_H_
