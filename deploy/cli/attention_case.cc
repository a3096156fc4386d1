#include "deploy/cli/attention_case.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <map>
#include <numeric>
#include <random>
#include <span>
#include <tuple>
#include <utility>
#include <variant>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "kernels/sparse/coverage.h"
#include "kernels/sparse/index_view.h"
#include "parallel/index_storage.h"

namespace longfill {
namespace {

constexpr char kRandomBlocksName[] = "random-blocks:";

// The first `count` of a ranked row, scaled to num_tokens.
std::vector<int32_t> ScaledEntries(std::span<const int32_t> ranked, int64_t count, int64_t recorded_tokens,
                                   int64_t num_tokens) {
  if (recorded_tokens == num_tokens) return {ranked.begin(), ranked.begin() + count};
  std::vector<int32_t> entries;
  std::vector<uint8_t> taken(static_cast<size_t>(num_tokens), 0);
  for (const int64_t recorded : ranked) {
    if (static_cast<int64_t>(entries.size()) == count) break;
    const int64_t entry = recorded * num_tokens / recorded_tokens;
    if (std::exchange(taken[entry], 1) == 0) entries.push_back(static_cast<int32_t>(entry));
  }
  return entries;
}

absl::StatusOr<SparseIndex> RecordedSelection(const RecordedPrompt& prompt, const VerticalSlash& pattern,
                                              int64_t head) {
  const RecordedIndices& recorded = prompt.recorded;
  const VerticalSlashBudget budget(pattern, prompt.num_tokens);
  if (budget.columns > recorded.max_vertical() || budget.distances > recorded.max_slash()) {
    return absl::InvalidArgumentError(absl::StrCat(ToString(pattern), " is beyond the ",
                                                   recorded.max_vertical(), " keys and ",
                                                   recorded.max_slash(), " distances of ", recorded.path()));
  }
  const int64_t layer = head / recorded.num_heads() % recorded.num_layers();
  const auto taken = [&](std::span<const int32_t> ranked, int64_t count) {
    return ScaledEntries(ranked, count, recorded.num_tokens(), prompt.num_tokens);
  };
  return MakeVerticalSlashIndex(taken(recorded.vertical(layer, head % recorded.num_heads()), budget.columns),
                                taken(recorded.slash(layer, head % recorded.num_heads()), budget.distances),
                                prompt.coverage);
}

double Unevenness(std::span<const int64_t> pairs) {
  const double sum = static_cast<double>(std::accumulate(pairs.begin(), pairs.end(), int64_t{0}));
  return static_cast<double>(*std::max_element(pairs.begin(), pairs.end())) *
         static_cast<double>(pairs.size()) / sum;
}

// Place of the recorded head that stands for `head` of `layer`.
int64_t RecordedHead(const RecordedIndices& recorded, int64_t layer, int64_t head) {
  return layer % recorded.num_layers() * recorded.num_heads() + head % recorded.num_heads();
}

// Covered pairs of every (layer, head). Heads with one budget and one recorded selection are counted once.
absl::StatusOr<std::vector<int64_t>> PairsOfHeads(const RecordedPrompt& prompt, const PatternSet& patterns,
                                                  ThreadPool& threads) {
  std::map<std::pair<int64_t, std::string>, size_t> known;
  std::vector<SparseIndex> indices;
  std::vector<size_t> places;
  for (int64_t layer = 0; layer < patterns.num_layers(); ++layer) {
    for (int64_t head = 0; head < patterns.num_heads(); ++head) {
      const int64_t recorded_head = RecordedHead(prompt.recorded, layer, head);
      const HeadPattern& pattern = patterns.at(layer, head);
      const auto [at, is_new] = known.try_emplace({recorded_head, ToString(pattern)}, indices.size());
      places.push_back(at->second);
      if (!is_new) continue;
      LF_ASSIGN_OR_RETURN(std::vector<SparseIndex> one,
                          RecordedSelections(prompt, {pattern}, {recorded_head}));
      indices.push_back(std::move(one[0]));
    }
  }
  const PackedIndices packed(indices);
  const std::vector<IndexView> views = packed.Views(packed.data());
  std::vector<int64_t> counted(indices.size());
  threads.ParallelFor(static_cast<int64_t>(views.size()),
                      [&](int64_t i, int) { counted[i] = CountPairs(views[i], prompt.num_tokens).covered; });
  std::vector<int64_t> pairs;
  pairs.reserve(places.size());
  for (const size_t place : places) pairs.push_back(counted[place]);
  return pairs;
}

// "128x64".
bool ParseBlockShape(absl::string_view text, RandomBlocks* blocks) {
  for (const int64_t rows : {64, 128}) {
    for (const int64_t keys : {64, 128}) {
      if (text != absl::StrCat(rows, "x", keys)) continue;
      blocks->block_rows = rows;
      blocks->block_keys = keys;
      return true;
    }
  }
  return false;
}

}  // namespace

bool IsRandomBlocks(const std::string& text) { return text.starts_with(kRandomBlocksName); }

absl::StatusOr<RandomBlocks> ParseRandomBlocks(const std::string& text) {
  RandomBlocks blocks;
  blocks.min_blocks = kMinRandomBlocks;
  absl::string_view form = text;
  const bool named = absl::ConsumePrefix(&form, kRandomBlocksName);
  const std::vector<absl::string_view> parts = absl::StrSplit(form, ',');
  if (!named || parts.size() != 2 || !absl::SimpleAtod(parts[0], &blocks.percent) ||
      !(blocks.percent > 0 && blocks.percent <= 100) || !ParseBlockShape(parts[1], &blocks)) {
    return absl::InvalidArgumentError(
        absl::StrCat(text,
                     " is not random-blocks:PERCENT,ROWSxKEYS with a percentage in (0, 100] and "
                     "blocks of 64 or 128 rows and keys"));
  }
  return blocks;
}

BlockListIndex MakeRandomBlocks(const RandomBlocks& blocks, int64_t num_tokens, uint64_t seed) {
  std::mt19937_64 random(seed);
  const int64_t wide = blocks.block_keys / kRowBlock;
  const int64_t tall = blocks.block_rows / kRowBlock;
  BlockListIndex index;
  index.row_offsets.push_back(0);
  std::vector<int32_t> candidates;
  std::vector<int32_t> taken;
  const int64_t num_row_blocks = RowBlocksOf(num_tokens);
  for (int64_t row_block = 0; row_block < num_row_blocks; ++row_block) {
    if (row_block % tall == 0) {  // a block of rows begins
      const int64_t last_row = std::min((row_block + tall) * kRowBlock, num_tokens) - 1;
      const int64_t visible = last_row / blocks.block_keys + 1;
      const auto wanted =
          static_cast<int64_t>(std::llround(blocks.percent / 100 * static_cast<double>(visible)));
      candidates.resize(static_cast<size_t>(visible));
      std::iota(candidates.begin(), candidates.end(), 0);
      taken.clear();
      std::sample(candidates.begin(), candidates.end(), std::back_inserter(taken),
                  std::max(wanted, blocks.min_blocks), random);
    }
    for (const int64_t block : taken) {
      for (int64_t i = 0; i < wide; ++i) {
        if (block * wide + i <= row_block) index.key_blocks.push_back(static_cast<int32_t>(block * wide + i));
      }
    }
    index.row_offsets.push_back(static_cast<int64_t>(index.key_blocks.size()));
  }
  return index;
}

absl::StatusOr<std::vector<SparseIndex>> RecordedSelections(const RecordedPrompt& prompt,
                                                            const std::vector<HeadPattern>& patterns,
                                                            const std::vector<int64_t>& recorded_heads) {
  const RecordedIndices& recorded = prompt.recorded;
  const int64_t num_tokens = prompt.num_tokens;
  if (num_tokens > recorded.num_tokens()) {
    return absl::InvalidArgumentError(absl::StrCat(recorded.path(), " was recorded on ",
                                                   recorded.num_tokens(), " tokens, it cannot stand for ",
                                                   num_tokens));
  }
  std::vector<SparseIndex> indices;
  for (size_t i = 0; i < patterns.size(); ++i) {
    if (std::optional<SparseIndex> fixed = MakeFixedIndex(patterns[i], num_tokens); fixed.has_value()) {
      indices.push_back(*std::move(fixed));
    } else if (const auto* budget = std::get_if<VerticalSlash>(&patterns[i]); budget != nullptr) {
      LF_ASSIGN_OR_RETURN(SparseIndex index, RecordedSelection(prompt, *budget, recorded_heads[i]));
      indices.push_back(std::move(index));
    } else {
      return absl::UnimplementedError(
          absl::StrCat(ToString(patterns[i]), ": no selection of blocks is recorded in ", recorded.path()));
    }
  }
  return indices;
}

absl::StatusOr<PatternHeads> MostUnevenHeads(const RecordedPrompt& prompt, const PatternSet& patterns,
                                             int64_t layer, int64_t count, ThreadPool& threads) {
  if (layer >= patterns.num_layers() || count < 1 || patterns.num_heads() % count != 0) {
    return absl::InvalidArgumentError(absl::StrCat("layer ", layer, " and groups of ", count,
                                                   " heads do not fit patterns of ", patterns.num_layers(),
                                                   " layers of ", patterns.num_heads(), " heads"));
  }
  LF_ASSIGN_OR_RETURN(const std::vector<int64_t> pairs, PairsOfHeads(prompt, patterns, threads));
  const auto of_heads = [&](int64_t of_layer, int64_t first, int64_t heads) {
    return Unevenness(std::span(pairs).subspan(of_layer * patterns.num_heads() + first, heads));
  };
  PatternHeads found;
  found.layer = std::max<int64_t>(layer, 0);
  for (int64_t other = 1; layer < 0 && other < patterns.num_layers(); ++other) {
    const double best = of_heads(found.layer, 0, patterns.num_heads());
    if (of_heads(other, 0, patterns.num_heads()) > best) found.layer = other;
  }
  for (int64_t first = 0; first < patterns.num_heads(); first += count) {
    const double uneven = of_heads(found.layer, first, count);
    if (uneven <= found.unevenness) continue;
    found.unevenness = uneven;
    found.first_head = first;
  }
  const auto heads = patterns.layer(found.layer).subspan(found.first_head, count);
  found.patterns.assign(heads.begin(), heads.end());
  for (int64_t head = found.first_head; head < found.first_head + count; ++head) {
    found.recorded_heads.push_back(RecordedHead(prompt.recorded, found.layer, head));
  }
  return found;
}

}  // namespace longfill
