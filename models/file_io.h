#ifndef LONGFILL_MODELS_FILE_IO_H_
#define LONGFILL_MODELS_FILE_IO_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "kernels/base/status.h"

namespace longfill {

// The status of a failed write: a full disk, quota or file-size limit is ResourceExhausted, an I/O error
// DataLoss, others as abseil maps errno.
absl::Status WriteErrorStatus(int error_number, std::string_view what);

// All bytes at the file offset, however many calls it takes; `path` is for messages.
absl::Status WriteFully(int fd, int64_t offset, std::span<const std::byte> bytes, std::string_view path);

}  // namespace longfill

#endif  // LONGFILL_MODELS_FILE_IO_H_
