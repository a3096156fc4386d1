#include "kernels/sparse/position_map.h"

#include "absl/strings/str_cat.h"

namespace longfill {

std::string ToString(const PositionMap& map) {
  std::string text = absl::StrCat("first ", map.first, ", block ", map.block, ", stride ", map.stride);
  if (map.odd_shift != 0) absl::StrAppend(&text, ", odd shift ", map.odd_shift);
  if (map.skipped != 0) absl::StrAppend(&text, ", skipped ", map.skipped);
  return text;
}

}  // namespace longfill
