#include "parallel/mesh.h"

#include <algorithm>
#include <charconv>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace longfill {
namespace {

constexpr int kMaxRanks = 1 << 20;

absl::Status BadMesh(std::string_view text, std::string_view why) {
  return absl::InvalidArgumentError(absl::StrCat("mesh \"", absl::string_view(text.data(), text.size()),
                                                 "\": ", absl::string_view(why.data(), why.size()),
                                                 "; expected sequence=S,head=H"));
}

}  // namespace

absl::StatusOr<Mesh> ParseMesh(std::string_view text) {
  std::optional<int> sequence;
  std::optional<int> head;
  for (const absl::string_view part : absl::StrSplit(absl::string_view(text.data(), text.size()), ',')) {
    const size_t equals = part.find('=');
    if (equals == absl::string_view::npos) return BadMesh(text, absl::StrCat("\"", part, "\" has no value"));
    const absl::string_view name = part.substr(0, equals);
    const absl::string_view value = part.substr(equals + 1);
    if (name != "sequence" && name != "head")
      return BadMesh(text, absl::StrCat("unknown part \"", name, "\""));
    std::optional<int>& field = name == "sequence" ? sequence : head;
    if (field.has_value()) return BadMesh(text, absl::StrCat("\"", name, "\" is given twice"));
    int number = 0;
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
    if (error != std::errc() || end != value.data() + value.size() || number < 1 || number > kMaxRanks) {
      return BadMesh(text,
                     absl::StrCat("\"", name, "\" is \"", value, "\", not a number in [1, ", kMaxRanks, "]"));
    }
    field = number;
  }
  const Mesh mesh{sequence.value_or(1), head.value_or(1)};
  if (int64_t{mesh.sequence} * mesh.head > kMaxRanks) {
    return BadMesh(text, absl::StrCat("more than ", kMaxRanks, " ranks"));
  }
  return mesh;
}

std::string ToString(const Mesh& mesh) {
  return absl::StrCat("sequence=", mesh.sequence, ",head=", mesh.head);
}

ShardPlan::ShardPlan(Mesh mesh, int64_t num_tokens)
    : mesh_(mesh), num_tokens_(num_tokens), deal_block_(kTokenBlock) {
  while (deal_block_ < kMaxDealBlock && num_tokens >= 2 * deal_block_ * kMinDealtBlocks * mesh.size()) {
    deal_block_ *= 2;
  }
}

PositionMap ShardPlan::TokenPositions(int rank) const {
  return {deal_block_ * Slot(rank), deal_block_, deal_block_ * mesh_.size()};
}

int64_t ShardPlan::NumTokens(int rank) const { return TokenPositions(rank).RowsBelow(num_tokens_); }

std::vector<TokenRange> ShardPlan::TokenRanges(int rank) const {
  std::vector<TokenRange> ranges;
  const int64_t stride = deal_block_ * mesh_.size();
  for (int64_t begin = deal_block_ * Slot(rank); begin < num_tokens_; begin += stride) {
    const int64_t end = std::min(begin + deal_block_, num_tokens_);
    if (!ranges.empty() && ranges.back().end == begin) {
      ranges.back().end = end;
    } else {
      ranges.push_back({begin, end});
    }
  }
  return ranges;
}

int ShardPlan::RankOfToken(int64_t position) const {
  const int slot = static_cast<int>(position / deal_block_ % mesh_.size());
  return slot % mesh_.sequence * mesh_.head + slot / mesh_.sequence;
}

PositionMap ShardPlan::GroupPositions(int sequence_index) const {
  return {deal_block_ * sequence_index, deal_block_, deal_block_ * mesh_.sequence};
}

int64_t ShardPlan::GroupNumTokens(int sequence_index) const {
  return GroupPositions(sequence_index).RowsBelow(num_tokens_);
}

}  // namespace longfill
