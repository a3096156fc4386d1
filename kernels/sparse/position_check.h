#ifndef LONGFILL_KERNELS_SPARSE_POSITION_CHECK_H_
#define LONGFILL_KERNELS_SPARSE_POSITION_CHECK_H_

#include <cstdint>
#include <string_view>

#include "kernels/base/status.h"
#include "kernels/sparse/position_map.h"

namespace longfill {

// InvalidArgument naming `operation` and the map unless it ascends and keeps blocks of `rows` rows together
// in a buffer of num_rows.
absl::Status CheckKeepsTogether(std::string_view operation, const PositionMap& map, int64_t rows,
                                int64_t num_rows);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_SPARSE_POSITION_CHECK_H_
