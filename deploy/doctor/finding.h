#ifndef LONGFILL_DEPLOY_DOCTOR_FINDING_H_
#define LONGFILL_DEPLOY_DOCTOR_FINDING_H_

// What a check has found, and the report of all ranks.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/status.h"

namespace longfill {

enum class CheckResult : uint8_t { kOk, kWarning, kFailed, kSkipped };
std::string_view CheckResultName(CheckResult result);  // "ok", "warning", "failed", "skipped"

struct Finding {
  std::string check;  // "memory.shm"
  CheckResult result = CheckResult::kOk;
  std::string value;       // what was measured, or why nothing was
  std::string advice;      // one sentence; empty for ok and skipped
  std::vector<int> ranks;  // ascending
  bool operator==(const Finding&) const = default;
};

// Without ranks: whoever gathers them knows whom they are of.
Finding Ok(std::string_view check, std::string value);
Finding Warning(std::string_view check, std::string value, std::string advice);
Finding Failed(std::string_view check, std::string value, std::string advice);
Finding Skipped(std::string_view check, std::string reason);

// "0-3,5"; also of cores.
std::string RankList(const std::vector<int>& ranks);
std::string NameRanks(const std::vector<int>& ranks);  // "rank 2", "ranks 0-3,5"
// What each rank says, equal texts once: "cores 0-3" where all say that, else "ranks 0-1: cores 0-1; rank 2:
// cores 2".
std::string ByRank(const std::vector<std::string>& texts);
// Host names by rank as "host-a 0-3, host-b 4-7", of `ranks` alone.
std::string ByHost(const std::vector<std::string>& hosts, const std::vector<int>& ranks);
// `text` with one digit behind the point: "12.3 GB", "1.5 MB/s" with the unit "B/s". Powers of 1000.
std::string Scaled(double value, std::string_view unit);

// For the way from one rank to another; InvalidArgument for what is not such a text.
std::string FindingsToText(const std::vector<Finding>& findings);
absl::StatusOr<std::vector<Finding>> FindingsFromText(std::string_view text);

struct ReportHeader {
  std::string version;
  std::string commit;
  std::string launcher;            // empty: none
  std::string device;              // as asked for
  std::vector<std::string> hosts;  // by rank
};

// Findings that differ in ranks alone are one, and findings of one check stand together, in the order in
// which checks come first.
class DoctorReport {
 public:
  void Add(std::vector<Finding> findings);
  const std::vector<Finding>& findings() const { return findings_; }
  int Count(CheckResult result) const;

  std::string ToText(const ReportHeader& header) const;  // lines, the last one a summary
  std::string ToJson(const ReportHeader& header) const;  // one object

 private:
  std::vector<Finding> findings_;
};

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_DOCTOR_FINDING_H_
