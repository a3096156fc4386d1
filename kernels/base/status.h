#ifndef LONGFILL_KERNELS_BASE_STATUS_H_
#define LONGFILL_KERNELS_BASE_STATUS_H_

// Error handling of the whole project: absl::Status values, propagated by the two macros below.
// No exception crosses a longfill header. Which code means what is stated in kernels/README.md.

#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace longfill {

// The same code and payload-free message with "`prefix`: " in front; OK stays OK.
absl::Status Annotate(const absl::Status& status, std::string_view prefix);

namespace internal {
[[noreturn]] void CheckFailed(const char* file, int line, const char* condition);
}  // namespace internal
}  // namespace longfill

// Programmer errors only (a broken invariant of our own); input is answered with a Status.
#define LF_CHECK(condition)                                                              \
  do {                                                                                   \
    if (!(condition)) ::longfill::internal::CheckFailed(__FILE__, __LINE__, #condition); \
  } while (false)

#define LF_RETURN_IF_ERROR(expression)                              \
  do {                                                              \
    if (absl::Status lf_status_ = (expression); !lf_status_.ok()) { \
      return lf_status_;                                            \
    }                                                               \
  } while (false)

#define LF_STATUS_CONCAT_INNER_(a, b) a##b
#define LF_STATUS_CONCAT_(a, b) LF_STATUS_CONCAT_INNER_(a, b)

// LF_ASSIGN_OR_RETURN(auto value, Compute());
#define LF_ASSIGN_OR_RETURN(lhs, expression) \
  LF_ASSIGN_OR_RETURN_IMPL_(LF_STATUS_CONCAT_(lf_status_or_, __LINE__), lhs, expression)
#define LF_ASSIGN_OR_RETURN_IMPL_(result, lhs, expression) \
  auto result = (expression);                              \
  if (!result.ok()) return std::move(result).status();     \
  lhs = std::move(result).value()

#endif  // LONGFILL_KERNELS_BASE_STATUS_H_
