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

ShardPlan::ShardPlan(Mesh mesh, int64_t num_tokens) : ShardPlan(mesh, num_tokens, kTokenBlock) {
  const double mean = static_cast<double>(num_tokens) / mesh.size();
  const auto longest = static_cast<int64_t>(mean) / kMinDealtBlocks / kTokenBlock * kTokenBlock;
  for (int64_t block = std::min(kMaxDealBlock, longest); block > kTokenBlock; block -= kTokenBlock) {
    const ShardPlan plan(mesh, num_tokens, block);
    if (static_cast<double>(plan.MostTokens()) > (1 + kMaxExcess) * mean) continue;
    deal_block_ = block;
    return;
  }
}

PositionMap ShardPlan::GroupPositions(int sequence_index) const {
  return {.first = deal_block_ * sequence_index,
          .block = deal_block_,
          .stride = deal_block_ * mesh_.sequence,
          .odd_shift = deal_block_ * (mesh_.sequence - 1 - 2 * sequence_index)};
}

int64_t ShardPlan::GroupNumTokens(int sequence_index) const {
  return GroupPositions(sequence_index).RowsBelow(num_tokens_);
}

// The last block lies with the first group or, on the way back, the last one has a block more.
int64_t ShardPlan::MostGroupTokens() const {
  return std::max(GroupNumTokens(0), GroupNumTokens(mesh_.sequence - 1));
}

PositionMap ShardPlan::TokenPositions(int rank) const {
  // Of the group's blocks every mesh_.head-th from number `index` on: with even mesh_.head all on the way
  // there or all on the way back.
  const PositionMap group = GroupPositions(SequenceIndex(rank));
  const int index = HeadIndex(rank);
  const int64_t shift = index % 2 == 0 ? group.odd_shift : -group.odd_shift;
  return {.first = group.Position(index * group.block),
          .block = group.block,
          .stride = group.stride * mesh_.head,
          .odd_shift = mesh_.head % 2 == 0 ? 0 : shift};
}

int64_t ShardPlan::NumTokens(int rank) const { return TokenPositions(rank).RowsBelow(num_tokens_); }

int64_t ShardPlan::MostTokens() const {
  return std::max(NumTokens(0), NumTokens((mesh_.sequence - 1) * mesh_.head));  // the first of their groups
}

std::vector<TokenRange> ShardPlan::TokenRanges(int rank) const {
  std::vector<TokenRange> ranges;
  const PositionMap positions = TokenPositions(rank);
  const int64_t rows = NumTokens(rank);
  for (int64_t row = 0; row < rows; row += deal_block_) {
    const int64_t begin = positions.Position(row);
    const int64_t end = begin + std::min(deal_block_, rows - row);
    if (!ranges.empty() && ranges.back().end == begin) {
      ranges.back().end = end;
    } else {
      ranges.push_back({begin, end});
    }
  }
  return ranges;
}

int ShardPlan::RankOfToken(int64_t position) const {
  const int64_t block = position / deal_block_;
  const int64_t turn = block / mesh_.sequence;
  const auto place = static_cast<int>(block % mesh_.sequence);
  const int sequence_index = turn % 2 == 0 ? place : mesh_.sequence - 1 - place;
  return sequence_index * mesh_.head + static_cast<int>(turn % mesh_.head);
}

}  // namespace longfill
