#include "runtime/engine/replayed_indices.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "models/json_input.h"
#include "models/safetensors.h"
#include "parallel/index_storage.h"

namespace longfill {
namespace {

absl::StatusOr<int64_t> RecordedTokens(const SafetensorsFile& file) {
  const auto found = file.metadata().find("tokens");
  const std::string text = found == file.metadata().end() ? "" : found->second;
  int64_t tokens = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), tokens);
  if (error != std::errc() || end != text.data() + text.size() || tokens < 1 || tokens > INT32_MAX) {
    return absl::InvalidArgumentError(absl::StrCat(file.path(), ": metadata tokens is ",
                                                   QuoteForMessage(text),
                                                   ", expected the length of the recorded prompt"));
  }
  return tokens;
}

// int32 [layers, heads, entries].
absl::StatusOr<const SafetensorsTensor*> FindRanked(const SafetensorsFile& file, const char* name) {
  const SafetensorsTensor* tensor = file.Find(name);
  if (tensor == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(file.path(), ": no tensor \"", name, "\""));
  }
  const bool empty = std::find(tensor->shape.begin(), tensor->shape.end(), 0) != tensor->shape.end();
  if (tensor->dtype != DType::kInt32 || tensor->shape.size() != 3 || empty) {
    return absl::InvalidArgumentError(
        absl::StrCat(file.path(), ": tensor \"", name, "\" is ", tensor->stored_dtype, " of rank ",
                     tensor->shape.size(), ", expected I32 [layers, heads, entries], none of them 0"));
  }
  return tensor;
}

// The values of a tensor whose rows have `row_length` entries, each in [0, num_tokens) and once in its row.
absl::StatusOr<std::vector<int32_t>> ReadRanked(const SafetensorsFile& file, const SafetensorsTensor& tensor,
                                                int64_t num_tokens) {
  std::vector<int32_t> values(tensor.bytes.size() / sizeof(int32_t));
  std::memcpy(values.data(), tensor.bytes.data(), tensor.bytes.size());
  const int64_t row_length = tensor.shape[2];
  std::vector<int64_t> seen_in(num_tokens, -1);  // the last row that had this value
  for (size_t i = 0; i < values.size(); ++i) {
    const int64_t row = static_cast<int64_t>(i) / row_length;
    const auto bad = [&](const char* what) {
      return absl::InvalidArgumentError(absl::StrCat(
          file.path(), ": ", tensor.name, "[", row / tensor.shape[1], ", ", row % tensor.shape[1], ", ",
          static_cast<int64_t>(i) % row_length, "] = ", values[i], what));
    };
    if (values[i] < 0 || values[i] >= num_tokens) {
      return bad(absl::StrCat(" is not in [0, ", num_tokens, ")").c_str());
    }
    if (seen_in[values[i]] == row) return bad(" comes twice");
    seen_in[values[i]] = row;
  }
  return values;
}

}  // namespace

absl::StatusOr<RecordedIndices> RecordedIndices::Load(const std::string& path) {
  LF_ASSIGN_OR_RETURN(const std::shared_ptr<const SafetensorsFile> file, SafetensorsFile::Open(path));
  RecordedIndices recorded;
  recorded.path_ = path;
  LF_ASSIGN_OR_RETURN(recorded.num_tokens_, RecordedTokens(*file));
  LF_ASSIGN_OR_RETURN(const SafetensorsTensor* vertical, FindRanked(*file, "vertical"));
  LF_ASSIGN_OR_RETURN(const SafetensorsTensor* slash, FindRanked(*file, "slash"));
  if (vertical->shape[0] != slash->shape[0] || vertical->shape[1] != slash->shape[1]) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": vertical is recorded of ", vertical->shape[0],
                                                   " x ", vertical->shape[1], " layers and heads, slash of ",
                                                   slash->shape[0], " x ", slash->shape[1]));
  }
  recorded.num_layers_ = vertical->shape[0];
  recorded.num_heads_ = vertical->shape[1];
  recorded.max_vertical_ = vertical->shape[2];
  recorded.max_slash_ = slash->shape[2];
  LF_ASSIGN_OR_RETURN(recorded.vertical_, ReadRanked(*file, *vertical, recorded.num_tokens_));
  LF_ASSIGN_OR_RETURN(recorded.slash_, ReadRanked(*file, *slash, recorded.num_tokens_));
  return recorded;
}

absl::Status RecordedIndices::CheckReplays(const PatternSet& patterns, int64_t num_tokens) const {
  if (num_tokens != num_tokens_) {
    return absl::InvalidArgumentError(absl::StrCat(path_, " was recorded on ", num_tokens_,
                                                   " tokens, it cannot stand for a prompt of ", num_tokens));
  }
  bool replays = false;
  for (int64_t layer = 0; layer < patterns.num_layers(); ++layer) {
    for (int64_t head = 0; head < patterns.num_heads(); ++head) {
      const HeadPattern& pattern = patterns.at(layer, head);
      const auto where = [&] {
        return absl::StrCat("layer ", layer, ", head ", head, ": ", ToString(pattern));
      };
      if (std::holds_alternative<BlockSparse>(pattern) || std::holds_alternative<BlockShare>(pattern)) {
        return absl::UnimplementedError(
            absl::StrCat(where(), ": no selection of blocks is recorded in ", path_));
      }
      const auto* budget = std::get_if<VerticalSlash>(&pattern);
      if (budget == nullptr) continue;
      replays = true;
      const VerticalSlashBudget clamped(*budget, num_tokens);
      if (clamped.columns > max_vertical_ || clamped.distances > max_slash_) {
        return absl::InvalidArgumentError(absl::StrCat(where(), " is beyond the ", max_vertical_,
                                                       " keys and ", max_slash_, " distances recorded in ",
                                                       path_));
      }
    }
  }
  if (replays) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("no head is vertical-slash, there is nothing to replay from ", path_));
}

std::vector<SparseIndex> RecordedIndices::IndicesOfLayer(const PatternSet& patterns, int64_t layer,
                                                         Coverage coverage) const {
  std::vector<SparseIndex> indices;
  for (int64_t head = 0; head < patterns.num_heads(); ++head) {
    const HeadPattern& pattern = patterns.at(layer, head);
    if (std::optional<SparseIndex> fixed = MakeFixedIndex(pattern, num_tokens_); fixed.has_value()) {
      indices.push_back(*std::move(fixed));
      continue;
    }
    const VerticalSlashBudget taken(std::get<VerticalSlash>(pattern), num_tokens_);
    const auto columns = vertical(layer % num_layers_, head % num_heads_).first(taken.columns);
    const auto distances = slash(layer % num_layers_, head % num_heads_).first(taken.distances);
    indices.push_back(MakeVerticalSlashIndex({columns.begin(), columns.end()},
                                             {distances.begin(), distances.end()}, coverage));
  }
  return indices;
}

absl::StatusOr<std::shared_ptr<ReplayedIndices>> ReplayedIndices::Create(const RecordedIndices& recorded,
                                                                         const PatternSet& patterns,
                                                                         Coverage coverage) {
  LF_RETURN_IF_ERROR(recorded.CheckReplays(patterns, recorded.num_tokens()));
  std::shared_ptr<ReplayedIndices> replayed(new ReplayedIndices());
  replayed->num_tokens_ = recorded.num_tokens();
  for (int64_t layer = 0; layer < patterns.num_layers(); ++layer) {
    replayed->layers_.push_back({.packed = PackedIndices(recorded.IndicesOfLayer(patterns, layer, coverage)),
                                 .num_heads = patterns.num_heads()});
  }
  return replayed;
}

int64_t ReplayedIndices::PlanBytes(int64_t num_tokens) const {
  if (num_tokens != num_tokens_) return 0;
  int64_t bytes = 0;
  for (const Layer& layer : layers_) bytes += layer.packed.size_bytes();
  return bytes;
}

absl::Status ReplayedIndices::Begin(Backend& backend, int64_t num_tokens) {
  if (num_tokens != num_tokens_) return absl::OkStatus();
  for (Layer& layer : layers_) {
    const int64_t bytes = layer.packed.size_bytes();
    LF_ASSIGN_OR_RETURN(layer.memory, backend.memory().Allocate(bytes, "replayed indices"));
    LF_RETURN_IF_ERROR(
        backend.kernels().CopyIn(layer.memory.data(), layer.packed.data(), bytes, backend.stream()));
    layer.heads = layer.packed.Views(layer.memory.data());
    if (layer.pairs.empty()) LF_RETURN_IF_ERROR(CountPairs(backend, layer));
  }
  return backend.stream().Sync();
}

// Its scratch is gone before the prompt needs its own, so that no plan counts it.
absl::Status ReplayedIndices::CountPairs(Backend& backend, Layer& layer) const {
  KernelSet& kernels = backend.kernels();
  const int64_t bytes = layer.num_heads * static_cast<int64_t>(sizeof(PairCounts));
  const int64_t workspace_bytes = kernels.CountPairsWorkspaceBytes(layer.num_heads, num_tokens_);
  LF_ASSIGN_OR_RETURN(const Buffer counts, backend.memory().Allocate(bytes, "pair counts"));
  LF_ASSIGN_OR_RETURN(const Buffer workspace,
                      backend.memory().Allocate(workspace_bytes, "the workspace of pair counts"));
  LF_RETURN_IF_ERROR(kernels.CountPairs(
      {.indices = layer.heads, .num_tokens = num_tokens_, .counts = counts.as<PairCounts>()},
      {workspace.data(), workspace.size_bytes()}, backend.stream()));
  std::vector<PairCounts> pairs(layer.num_heads);
  LF_RETURN_IF_ERROR(kernels.CopyOut(pairs.data(), counts.data(), bytes, backend.stream()));
  LF_RETURN_IF_ERROR(backend.stream().Sync());
  layer.pairs = std::move(pairs);
  return absl::OkStatus();
}

absl::Status ReplayedIndices::Replace(int64_t layer, LayerIndex* index) {
  const Layer& replayed = layers_[layer];
  if (replayed.heads.empty()) return absl::OkStatus();  // a prompt of another length
  index->heads = replayed.heads;
  index->pairs = replayed.pairs;
  return absl::OkStatus();
}

void ReplayedIndices::End() {
  for (Layer& layer : layers_) {
    layer.heads.clear();
    layer.memory = Buffer();
  }
}

}  // namespace longfill
