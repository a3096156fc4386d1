#ifndef LONGFILL_RUNTIME_OBSERVE_LOG_H_
#define LONGFILL_RUNTIME_OBSERVE_LOG_H_

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <type_traits>
#include <variant>

#include "kernels/base/status.h"

namespace longfill {

enum class LogLevel : uint8_t { kDebug, kInfo, kWarning, kError, kOff };

// "debug", "info", "warning", "error", "off"; InvalidArgument otherwise.
absl::StatusOr<LogLevel> ParseLogLevel(std::string_view text);

struct LogField {
  using Value = std::variant<int64_t, double, bool, std::string>;
  std::string_view key;
  Value value;

  template <typename T>
  LogField(std::string_view name, const T& v) : key(name), value(Wrap(v)) {}

 private:
  template <typename T>
  static Value Wrap(const T& v) {
    if constexpr (std::is_same_v<T, bool>) {
      return v;
    } else if constexpr (std::is_integral_v<T>) {
      return static_cast<int64_t>(v);
    } else if constexpr (std::is_floating_point_v<T>) {
      return static_cast<double>(v);
    } else {
      return std::string(v);
    }
  }
};

// Level of this process, kInfo at first, and the rank that every line carries.
void ConfigureLog(LogLevel level, int rank);

// One JSON object on one line of standard error: time (UTC), level, rank, event, then the fields. `event` is
// a short constant in snake_case. Never the prompt, never a whole transfer id. Thread-safe.
void Log(LogLevel level, std::string_view event, std::initializer_list<LogField> fields = {});

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_OBSERVE_LOG_H_
