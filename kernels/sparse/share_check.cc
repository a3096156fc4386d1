#include "kernels/sparse/share_check.h"

#include "absl/strings/str_cat.h"
#include "kernels/sparse/head_pattern.h"

namespace longfill {

absl::Status CheckRepresentatives(const std::string& where, int64_t num_samples, int64_t num_outliers) {
  if (num_outliers < 0 || num_outliers > kMaxOutliers) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, "outliers ", num_outliers, " is not in [0, ", kMaxOutliers, "]"));
  }
  if (num_samples < 0 || num_samples > kMaxOutliers - num_outliers) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, "samples ", num_samples, " is not in [0, ", kMaxOutliers - num_outliers, "]"));
  }
  if ((num_samples & (num_samples - 1)) == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(where, "samples ", num_samples, " is not a power of two"));
}

absl::Status CheckCoarse(const std::string& where, int64_t num_coarse, int64_t num_samples) {
  if (num_coarse >= 0 && num_coarse <= kMaxOutliers - num_samples) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(where, "coarse ", num_coarse, " is not in [0, ", kMaxOutliers - num_samples, "]"));
}

absl::Status CheckReadsRepresentatives(const char* operation, int64_t num_representatives,
                                       int64_t num_samples) {
  LF_RETURN_IF_ERROR(CheckRepresentatives(absl::StrCat(operation, ": num_"), num_samples, 0));
  const int64_t least = NumRepresentatives(num_samples, 0);
  const int64_t most = NumRepresentatives(num_samples, kMaxOutliers - num_samples);
  if (num_representatives < least || num_representatives > most) {
    return absl::InvalidArgumentError(absl::StrCat(operation, ": num_representatives ", num_representatives,
                                                   " is not in [", least, ", ", most, "]"));
  }
  return absl::OkStatus();
}

absl::Status CheckReadsOwnKeys(const char* operation, int64_t num_samples, const void* own_k) {
  if (num_samples == 0 || own_k != nullptr) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(operation, ": num_samples ", num_samples, " without the keys of the rows, own_k"));
}

absl::Status CheckReadsCoarse(const char* operation, int64_t num_coarse, int64_t num_samples,
                              int64_t num_key_blocks, const void* coarse) {
  LF_RETURN_IF_ERROR(CheckCoarse(absl::StrCat(operation, ": num_"), num_coarse, num_samples));
  if (num_coarse == 0 || num_key_blocks < kCoarseBlocks || coarse != nullptr) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(operation, ": num_coarse ", num_coarse,
                                                 " without the representatives of coarse blocks, coarse"));
}

absl::Status CheckShares(const char* operation, float scale, std::span<const float> min_share,
                         int64_t num_heads) {
  if (!(scale > 0)) {
    return absl::InvalidArgumentError(absl::StrCat(operation, ": scale ", scale, " is not above 0"));
  }
  if (std::ssize(min_share) != num_heads) {
    return absl::InvalidArgumentError(
        absl::StrCat(operation, ": ", min_share.size(), " values of min_share for ", num_heads, " heads"));
  }
  for (const float share : min_share) {
    if (share > 0 && share <= 1) continue;
    return absl::InvalidArgumentError(absl::StrCat(operation, ": min_share ", share, " is not in (0, 1]"));
  }
  return absl::OkStatus();
}

}  // namespace longfill
