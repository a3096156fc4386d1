#include "models/file_io.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
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

absl::Status OutputError(const std::string& path, int error_number) {
  const std::string message = absl::StrCat("output ", path, ": ", strerror(error_number));
  switch (error_number) {
    case EACCES:
    case EPERM:
    case EROFS:
      return absl::PermissionDeniedError(message);
    case ENOSPC:
    case EDQUOT:
      return absl::ResourceExhaustedError(message);
    case ENOTDIR:
    case ENOENT:
    case ENAMETOOLONG:
    case EISDIR:
      return absl::InvalidArgumentError(message);
    default:
      return absl::InternalError(message);
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

absl::Status CheckCanWrite(const std::string& path) {
  struct stat info;
  if (stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode)) return OutputError(path, EISDIR);
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  if (stat(folder.c_str(), &info) != 0) return OutputError(path, errno);
  if (!S_ISDIR(info.st_mode)) return OutputError(path, ENOTDIR);
  if (access(folder.c_str(), W_OK | X_OK) != 0) return OutputError(path, errno);
  return absl::OkStatus();
}

absl::Status WriteTextFile(const std::string& path, std::string_view text) {
  const std::string partial = absl::StrCat(path, ".partial-", getpid());
  const int fd = open(partial.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd < 0) return OutputError(path, errno);
  int error = 0;
  while (!text.empty() && error == 0) {
    const ssize_t count = write(fd, text.data(), text.size());
    if (count >= 0) {
      text.remove_prefix(static_cast<size_t>(count));
    } else if (errno != EINTR) {
      error = errno;
    }
  }
  if (close(fd) != 0 && error == 0) error = errno;
  if (error == 0 && rename(partial.c_str(), path.c_str()) != 0) error = errno;
  if (error == 0) return absl::OkStatus();
  unlink(partial.c_str());
  return OutputError(path, error);
}

}  // namespace longfill
