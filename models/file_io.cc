#include "models/file_io.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"

namespace longfill {

absl::Status WriteErrorStatus(int error_number, std::string_view what) {
  const std::string message = absl::StrCat(std::string(what), ": ", strerror(error_number));
  switch (error_number) {
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
      return absl::ResourceExhaustedError(message);
    case EIO:
      return absl::DataLossError(message);
    default:
      return absl::ErrnoToStatus(error_number, std::string(what));
  }
}

absl::Status WriteFully(int fd, int64_t offset, std::span<const std::byte> bytes, std::string_view path) {
  while (!bytes.empty()) {
    const ssize_t written = pwrite(fd, bytes.data(), bytes.size(), offset);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) {
      return WriteErrorStatus(
          written == 0 ? ENOSPC : errno,
          absl::StrCat("cannot write ", bytes.size(), " bytes at ", offset, " of ", std::string(path)));
    }
    bytes = bytes.subspan(static_cast<size_t>(written));
    offset += written;
  }
  return absl::OkStatus();
}

}  // namespace longfill
