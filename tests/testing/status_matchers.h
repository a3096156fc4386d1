#ifndef LONGFILL_TESTS_TESTING_STATUS_MATCHERS_H_
#define LONGFILL_TESTS_TESTING_STATUS_MATCHERS_H_

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "kernels/base/status.h"

namespace longfill {

inline const absl::Status& StatusOf(const absl::Status& status) { return status; }
template <typename T>
const absl::Status& StatusOf(const absl::StatusOr<T>& result) {
  return result.status();
}

MATCHER(IsOk, "is OK") {
  *result_listener << StatusOf(arg).ToString();
  return StatusOf(arg).ok();
}

// StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("n_local -1"))
MATCHER_P2(StatusIs, code, message, "has the code and a matching message") {
  *result_listener << StatusOf(arg).ToString();
  return StatusOf(arg).code() == code && ::testing::Matches(message)(std::string(StatusOf(arg).message()));
}

}  // namespace longfill

#define LF_ASSERT_OK(expression) ASSERT_THAT((expression), ::longfill::IsOk())
#define LF_EXPECT_OK(expression) EXPECT_THAT((expression), ::longfill::IsOk())
#define LF_ASSERT_OK_AND_ASSIGN(lhs, expression) \
  LF_ASSERT_OK_AND_ASSIGN_IMPL_(LF_STATUS_CONCAT_(lf_test_result_, __LINE__), lhs, expression)
#define LF_ASSERT_OK_AND_ASSIGN_IMPL_(result, lhs, expression) \
  auto result = (expression);                                  \
  ASSERT_THAT(result, ::longfill::IsOk());                     \
  lhs = std::move(result).value()

#endif  // LONGFILL_TESTS_TESTING_STATUS_MATCHERS_H_
