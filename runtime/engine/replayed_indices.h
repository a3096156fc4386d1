#ifndef LONGFILL_RUNTIME_ENGINE_REPLAYED_INDICES_H_
#define LONGFILL_RUNTIME_ENGINE_REPLAYED_INDICES_H_

// Recorded selections in the place of those that the index builder makes. Random weights give attention
// without structure, whose diagonals are far denser than those of a trained model; timings on them say
// nothing.

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/api/backend.h"
#include "kernels/base/memory.h"
#include "kernels/base/status.h"
#include "kernels/sparse/head_pattern.h"
#include "kernels/sparse/index_view.h"
#include "kernels/sparse/sparse_index.h"
#include "models/pattern_file.h"
#include "runtime/engine/prefill_engine.h"

namespace longfill {

// What the heads of some model selected on one prompt: for each recorded (layer, head) key positions and
// distances, ranked, best first, so that the first v and s of a row are the selection for the budget (v, s).
class RecordedIndices {
 public:
  // A safetensors file: `vertical` I32 [layers, heads, V], `slash` I32 [layers, heads, S], metadata `tokens`,
  // the length of the prompt. InvalidArgument naming file, tensor and value: another form, entries that are
  // not in [0, tokens) or come twice in a row. Errors of the file as SafetensorsFile::Open gives them.
  static absl::StatusOr<RecordedIndices> Load(const std::string& path);

  const std::string& path() const { return path_; }
  int64_t num_tokens() const { return num_tokens_; }
  int64_t num_layers() const { return num_layers_; }
  int64_t num_heads() const { return num_heads_; }
  int64_t max_vertical() const { return max_vertical_; }
  int64_t max_slash() const { return max_slash_; }
  std::span<const int32_t> vertical(int64_t layer, int64_t head) const {
    return std::span(vertical_).subspan((layer * num_heads_ + head) * max_vertical_, max_vertical_);
  }
  std::span<const int32_t> slash(int64_t layer, int64_t head) const {
    return std::span(slash_).subspan((layer * num_heads_ + head) * max_slash_, max_slash_);
  }

  // Whether a prompt of num_tokens under `patterns` can be replayed. InvalidArgument: another length (both
  // are named), a budget beyond what was recorded, patterns without a vertical-slash head. Unimplemented: a
  // head that selects blocks, of which nothing is recorded.
  absl::Status CheckReplays(const PatternSet& patterns, int64_t num_tokens) const;

  // Indices of the heads of one layer of another model, on the host: a vertical-slash head h takes its own
  // budget from recorded layer `layer` and head h, both modulo what is recorded; dense and A-shape heads need
  // nothing. Precondition: CheckReplays passed.
  std::vector<SparseIndex> IndicesOfLayer(const PatternSet& patterns, int64_t layer, Coverage coverage) const;

 private:
  RecordedIndices() = default;

  std::string path_;
  int64_t num_tokens_ = 0;
  int64_t num_layers_ = 0;
  int64_t num_heads_ = 0;
  int64_t max_vertical_ = 0;
  int64_t max_slash_ = 0;
  std::vector<int32_t> vertical_;  // [num_layers, num_heads, max_vertical]
  std::vector<int32_t> slash_;     // [num_layers, num_heads, max_slash]
};

// The recorded indices as those of a model with `patterns`: all layers are in the backend's memory from Begin
// to End. Stands in for prompts of the recorded length; those of another, as to warm up, keep what is built
// for them.
class ReplayedIndices final : public IndexReplacement {
 public:
  // Errors of CheckReplays.
  static absl::StatusOr<std::shared_ptr<ReplayedIndices>> Create(const RecordedIndices& recorded,
                                                                 const PatternSet& patterns,
                                                                 Coverage coverage);

  // Of the heads of one layer, on the host.
  const PackedIndices& packed(int64_t layer) const { return layers_[static_cast<size_t>(layer)].packed; }

  int64_t PlanBytes(int64_t num_tokens) const override;
  // Waits for backend.stream().
  absl::Status Begin(Backend& backend, int64_t num_tokens) override;
  absl::Status Replace(int64_t layer, LayerIndex* index) override;
  void End() override;

 private:
  struct Layer {
    PackedIndices packed;
    int64_t num_heads = 0;
    Buffer memory;
    std::vector<IndexView> heads;   // in `memory`
    std::vector<PairCounts> pairs;  // empty until the first Begin
  };
  ReplayedIndices() = default;
  absl::Status CountPairs(Backend& backend, Layer& layer) const;

  int64_t num_tokens_ = 0;
  std::vector<Layer> layers_;
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_ENGINE_REPLAYED_INDICES_H_
