#ifndef LONGFILL_TESTS_TESTING_SANITIZED_H_
#define LONGFILL_TESTS_TESTING_SANITIZED_H_

namespace longfill {

// Built with a sanitizer, which makes code many times slower. Tests of many cases of one kind take fewer
// then: a sanitizer looks for what each kind does, and results are checked by the other builds.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

}  // namespace longfill

#endif  // LONGFILL_TESTS_TESTING_SANITIZED_H_
