#include "runtime/observe/log.h"

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <atomic>
#include <chrono>
#include <ctime>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace longfill {
namespace {

constexpr std::string_view kLevelNames[] = {"debug", "info", "warning", "error", "off"};
std::atomic<LogLevel> g_level = LogLevel::kInfo;
std::atomic<int> g_rank = 0;

spdlog::logger& Logger() {
  // Never destroyed: threads of gRPC may log while the process exits.
  static auto* const logger = [] {
    auto* made = new spdlog::logger("longfill", std::make_shared<spdlog::sinks::stderr_sink_mt>());
    made->set_pattern("%v");
    made->set_level(spdlog::level::trace);
    made->flush_on(spdlog::level::trace);
    return made;
  }();
  return *logger;
}

std::string UtcTime() {
  const auto now = std::chrono::system_clock::now();
  const std::time_t whole = std::chrono::system_clock::to_time_t(now);
  const auto ms =
      std::chrono::duration_cast<std::chrono::milliseconds>(now.time_since_epoch()).count() % 1000;
  std::tm utc{};
  gmtime_r(&whole, &utc);
  return absl::StrFormat("%04d-%02d-%02dT%02d:%02d:%02d.%03dZ", utc.tm_year + 1900, utc.tm_mon + 1,
                         utc.tm_mday, utc.tm_hour, utc.tm_min, utc.tm_sec, ms);
}

}  // namespace

absl::StatusOr<LogLevel> ParseLogLevel(std::string_view text) {
  for (size_t level = 0; level < std::size(kLevelNames); ++level) {
    if (text == kLevelNames[level]) return static_cast<LogLevel>(level);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("log level \"", std::string(text), "\": debug, info, warning, error or off is wanted"));
}

void ConfigureLog(LogLevel level, int rank) {
  g_level = level;
  g_rank = rank;
}

void Log(LogLevel level, std::string_view event, std::initializer_list<LogField> fields) {
  if (level < g_level.load(std::memory_order_relaxed) || level == LogLevel::kOff) return;
  nlohmann::ordered_json line;
  line["time"] = UtcTime();
  line["level"] = std::string(kLevelNames[static_cast<size_t>(level)]);
  line["rank"] = g_rank.load(std::memory_order_relaxed);
  line["event"] = std::string(event);
  for (const LogField& field : fields) {
    std::visit([&](const auto& value) { line[std::string(field.key)] = value; }, field.value);
  }
  // Bytes that are not UTF-8 (a hostile request id) are replaced, so that a line is JSON in any case.
  Logger().log(spdlog::level::info, "{}",
               line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
}

}  // namespace longfill
