#include "parallel/distributed_selection.h"

#include <numeric>

#include "absl/strings/str_cat.h"

namespace longfill {
namespace {

// Digits from the top of the 64 bits: three of the score, three of the index.
constexpr int kDigitBits[] = {11, 11, 10, 11, 11, 10};
constexpr int kMaxBins = 1 << 11;
constexpr uint64_t kNoPrefix = ~uint64_t{0};  // no shifted key equals it

// One list on its way to the k-th largest key.
struct Cut {
  int64_t missing = 0;     // still to be taken among the keys that share `prefix`
  uint64_t prefix = 0;     // the bits known so far
  uint64_t threshold = 0;  // once settled: keys at or above it are selected
  bool settled = false;
};

// Takes the next digit from the histogram. False when the list holds too few keys.
bool Advance(const uint64_t* histogram, int digit_bits, int digit_shift, Cut* cut) {
  int64_t above = 0;
  for (int bin = (1 << digit_bits) - 1; bin >= 0; --bin) {
    const int64_t count = static_cast<int64_t>(histogram[bin]);
    if (above + count < cut->missing) {
      above += count;
      continue;
    }
    cut->prefix = cut->prefix << digit_bits | static_cast<uint64_t>(bin);
    cut->settled = above + count == cut->missing;  // the whole bin is taken
    cut->missing -= above;
    if (cut->settled) cut->threshold = cut->prefix << digit_shift;
    return true;
  }
  return false;
}

absl::Status FindThresholds(KernelSet& kernels, Communicator& world, const uint64_t* keys,
                            int64_t list_stride, int64_t num_keys, Workspace workspace,
                            std::vector<Cut>* cuts, Stream& stream) {
  const int64_t num_lists = static_cast<int64_t>(cuts->size());
  uint64_t* const histogram = static_cast<uint64_t*>(workspace.data);
  uint64_t* const prefixes = histogram + num_lists * kMaxBins;
  int shift = 64;
  for (const int bits : kDigitBits) {
    bool open = false;
    for (int64_t l = 0; l < num_lists; ++l) {
      open |= !(*cuts)[l].settled;
      prefixes[l] = (*cuts)[l].settled ? kNoPrefix : (*cuts)[l].prefix;
    }
    if (!open) return absl::OkStatus();
    SelectionHistogramParams params;
    params.keys = keys;
    params.list_stride = list_stride;
    params.num_keys = num_keys;
    params.num_lists = num_lists;
    params.prefixes = prefixes;
    params.prefix_shift = shift;
    shift -= bits;
    params.digit_shift = shift;
    params.num_bins = 1 << bits;
    params.histogram = histogram;
    LF_RETURN_IF_ERROR(kernels.SelectionHistogram(params, stream));
    LF_RETURN_IF_ERROR(
        world.AllReduce(histogram, num_lists * params.num_bins, ReduceType::kUInt64, ReduceOp::kSum, stream));
    LF_RETURN_IF_ERROR(stream.Sync());
    for (int64_t l = 0; l < num_lists; ++l) {
      Cut& cut = (*cuts)[l];
      if (!cut.settled && !Advance(histogram + l * params.num_bins, bits, shift, &cut)) {
        return absl::InternalError(
            absl::StrCat("selection list ", l, " holds too few keys: ", cut.missing, " are missing"));
      }
    }
  }
  for (int64_t l = 0; l < num_lists; ++l) {
    if (!(*cuts)[l].settled)
      return absl::InternalError(absl::StrCat("selection list ", l, ": keys are not unique"));
  }
  return absl::OkStatus();
}

}  // namespace

int64_t DistributedSelectionBytes(int64_t num_lists) {
  return num_lists * (kMaxBins + 1) * static_cast<int64_t>(sizeof(uint64_t));
}

absl::StatusOr<std::vector<std::vector<int32_t>>> SelectLargest(KernelSet& kernels, Communicator& world,
                                                                const uint64_t* keys, int64_t list_stride,
                                                                int64_t num_keys,
                                                                std::span<const int64_t> budgets,
                                                                Workspace workspace, Stream& stream) {
  const size_t num_lists = budgets.size();
  if (workspace.size_bytes < DistributedSelectionBytes(static_cast<int64_t>(num_lists))) {
    return absl::InvalidArgumentError(
        absl::StrCat("selection workspace has ", workspace.size_bytes, " bytes for ", num_lists, " lists"));
  }
  std::vector<Cut> cuts(num_lists);
  for (size_t l = 0; l < num_lists; ++l) {
    cuts[l].missing = budgets[l];
    cuts[l].settled = budgets[l] == 0;
    cuts[l].threshold = kNoPrefix;
  }
  LF_RETURN_IF_ERROR(FindThresholds(kernels, world, keys, list_stride, num_keys, workspace, &cuts, stream));

  std::vector<int32_t> mine;
  std::vector<int64_t> my_counts(num_lists);
  for (size_t l = 0; l < num_lists; ++l) {
    const size_t before = mine.size();
    const uint64_t* list = keys + static_cast<int64_t>(l) * list_stride;
    for (int64_t j = 0; j < num_keys && budgets[l] > 0; ++j) {
      if (list[j] >= cuts[l].threshold) mine.push_back(SelectionKeyIndex(list[j]));
    }
    my_counts[l] = static_cast<int64_t>(mine.size() - before);
  }

  const int size = world.size();
  std::vector<int64_t> counts(num_lists * static_cast<size_t>(size));
  const std::vector<int64_t> count_bytes(size, static_cast<int64_t>(num_lists * sizeof(int64_t)));
  LF_RETURN_IF_ERROR(world.AllGather(my_counts.data(), counts.data(), count_bytes, stream));
  std::vector<int64_t> piece_bytes(size);
  for (int r = 0; r < size; ++r) {
    const auto begin = counts.begin() + static_cast<int64_t>(num_lists) * r;
    piece_bytes[r] = std::accumulate(begin, begin + static_cast<int64_t>(num_lists), int64_t{0}) *
                     static_cast<int64_t>(sizeof(int32_t));
  }
  std::vector<int32_t> all(std::accumulate(piece_bytes.begin(), piece_bytes.end(), int64_t{0}) /
                           sizeof(int32_t));
  LF_RETURN_IF_ERROR(world.AllGather(mine.data(), all.data(), piece_bytes, stream));
  LF_RETURN_IF_ERROR(stream.Sync());

  std::vector<std::vector<int32_t>> selected(num_lists);
  auto from = all.cbegin();
  for (int r = 0; r < size; ++r) {
    for (size_t l = 0; l < num_lists; ++l) {
      const int64_t count = counts[static_cast<size_t>(r) * num_lists + l];
      selected[l].insert(selected[l].end(), from, from + count);
      from += count;
    }
  }
  for (size_t l = 0; l < num_lists; ++l) {
    if (static_cast<int64_t>(selected[l].size()) != budgets[l]) {
      return absl::InternalError(
          absl::StrCat("selection list ", l, " has ", selected[l].size(), " of ", budgets[l], " entries"));
    }
  }
  return selected;
}

}  // namespace longfill
