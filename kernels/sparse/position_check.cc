#include "kernels/sparse/position_check.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace longfill {

absl::Status CheckKeepsTogether(std::string_view operation, const PositionMap& map, int64_t rows,
                                int64_t num_rows) {
  if (map.Ascends() && map.KeepsTogether(rows, num_rows)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(std::string(operation), ": position map ", ToString(map),
                                                 " does not keep blocks of ", rows, " rows together"));
}

}  // namespace longfill
