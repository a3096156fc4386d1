#ifndef LONGFILL_DEPLOY_CLI_TOKEN_FILE_H_
#define LONGFILL_DEPLOY_CLI_TOKEN_FILE_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/status.h"

namespace longfill {

// Token ids of one prompt: a file NAME.i32 of little-endian int32, any other file a JSON list of integers,
// "-" a JSON list on standard input. At least one id, none negative. InvalidArgument names the file, the
// index and the value; NotFound and PermissionDenied the file.
absl::StatusOr<std::vector<int32_t>> ReadTokenFile(const std::string& path);

// The two forms, from bytes; `source` names them in messages.
absl::StatusOr<std::vector<int32_t>> ParseBinaryTokens(std::string_view bytes, const std::string& source);
absl::StatusOr<std::vector<int32_t>> ParseJsonTokens(std::string_view text, const std::string& source);

// "last" (an empty list) or positions such as "4094,4095", in the order given.
absl::StatusOr<std::vector<int64_t>> ParseLogitsPositions(std::string_view text);

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_TOKEN_FILE_H_
