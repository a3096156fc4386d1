#ifndef LONGFILL_MODELS_FILE_IO_H_
#define LONGFILL_MODELS_FILE_IO_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "kernels/base/status.h"

namespace longfill {

// The status of a failed write: a full disk, quota or file-size limit is ResourceExhausted, an I/O error
// DataLoss, others as abseil maps errno.
absl::Status WriteErrorStatus(int error_number, std::string_view what);

// All bytes at the file offset, however many calls it takes; `path` is for messages.
absl::Status WriteFully(int fd, int64_t offset, std::span<const std::byte> bytes, std::string_view path);

// The status of an output that cannot be made or written: PermissionDenied, ResourceExhausted (a full disk),
// InvalidArgument (a path that cannot be) or Internal; the message names the path.
absl::Status OutputError(const std::string& path, int error_number);

// Whether WriteTextFile could write `path`, as far as can be said before, so that hours of work are not lost:
// OutputError's statuses for a folder of that name, or where its folder is none that may be written to.
absl::Status CheckCanWrite(const std::string& path);

// Writes `text` whole: the file is there complete or, as before, not at all. Errors are
// those of OutputError.
absl::Status WriteTextFile(const std::string& path, std::string_view text);

}  // namespace longfill

#endif  // LONGFILL_MODELS_FILE_IO_H_
