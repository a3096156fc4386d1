#include "deploy/doctor/finding.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <nlohmann/json.hpp>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

namespace longfill {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view kResultNames[] = {"ok", "warning", "failed", "skipped"};

Finding Make(std::string_view check, CheckResult result, std::string value, std::string advice = "") {
  return {
      .check = std::string(check), .result = result, .value = std::move(value), .advice = std::move(advice)};
}

bool SameButRanks(const Finding& a, const Finding& b) {
  return a.check == b.check && a.result == b.result && a.value == b.value && a.advice == b.advice;
}

std::vector<int> AllRanks(size_t count) {
  std::vector<int> ranks(count);
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

// Hosts in the order of their first rank, with their ranks.
std::vector<std::pair<std::string, std::vector<int>>> GroupByHost(const std::vector<std::string>& hosts,
                                                                  const std::vector<int>& ranks) {
  std::vector<std::pair<std::string, std::vector<int>>> groups;
  for (const int rank : ranks) {
    const std::string& host = hosts[static_cast<size_t>(rank)];
    const auto found =
        std::find_if(groups.begin(), groups.end(), [&](const auto& group) { return group.first == host; });
    if (found == groups.end()) {
      groups.push_back({host, {rank}});
    } else {
      found->second.push_back(rank);
    }
  }
  return groups;
}

std::string Dump(const Json& json) {
  // A host may have a name that is not UTF-8.
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace

std::string_view CheckResultName(CheckResult result) { return kResultNames[static_cast<size_t>(result)]; }

Finding Ok(std::string_view check, std::string value) {
  return Make(check, CheckResult::kOk, std::move(value));
}
Finding Warning(std::string_view check, std::string value, std::string advice) {
  return Make(check, CheckResult::kWarning, std::move(value), std::move(advice));
}
Finding Failed(std::string_view check, std::string value, std::string advice) {
  return Make(check, CheckResult::kFailed, std::move(value), std::move(advice));
}
Finding Skipped(std::string_view check, std::string reason) {
  return Make(check, CheckResult::kSkipped, std::move(reason));
}

std::string RankList(const std::vector<int>& ranks) {
  std::string text;
  for (size_t begin = 0; begin < ranks.size();) {
    size_t end = begin + 1;
    while (end < ranks.size() && ranks[end] == ranks[end - 1] + 1) ++end;
    absl::StrAppend(&text, text.empty() ? "" : ",", ranks[begin]);
    if (end - begin > 1) absl::StrAppend(&text, "-", ranks[end - 1]);
    begin = end;
  }
  return text;
}

std::string NameRanks(const std::vector<int>& ranks) {
  return absl::StrCat(ranks.size() == 1 ? "rank " : "ranks ", RankList(ranks));
}

std::string ByRank(const std::vector<std::string>& texts) {
  const auto groups = GroupByHost(texts, AllRanks(texts.size()));
  if (groups.size() == 1) return groups.front().first;
  return absl::StrJoin(groups, "; ", [](std::string* to, const auto& group) {
    absl::StrAppend(to, NameRanks(group.second), ": ", group.first);
  });
}

std::string ByHost(const std::vector<std::string>& hosts, const std::vector<int>& ranks) {
  return absl::StrJoin(GroupByHost(hosts, ranks), ", ", [](std::string* to, const auto& group) {
    absl::StrAppend(to, group.first, " ", RankList(group.second));
  });
}

std::string Scaled(double value, std::string_view unit) {
  constexpr std::array<const char*, 5> kPrefixes = {"", "k", "M", "G", "T"};
  size_t power = 0;
  while (value >= 1000 && power + 1 < kPrefixes.size()) {
    value /= 1000;
    ++power;
  }
  return absl::StrFormat("%.*f %s%s", power == 0 ? 0 : 1, value, kPrefixes[power], std::string(unit));
}

std::string FindingsToText(const std::vector<Finding>& findings) {
  Json list = Json::array();
  for (const Finding& finding : findings) {
    list.push_back(
        {finding.check, static_cast<int>(finding.result), finding.value, finding.advice, finding.ranks});
  }
  return Dump(list);
}

absl::StatusOr<std::vector<Finding>> FindingsFromText(std::string_view text) {
  std::vector<Finding> findings;
  try {
    for (const Json& item : Json::parse(text)) {
      const int result = item.at(1).get<int>();
      if (result < 0 || result >= static_cast<int>(std::size(kResultNames))) {
        return absl::InvalidArgumentError(absl::StrCat("a finding has the result ", result));
      }
      findings.push_back({item.at(0).get<std::string>(), static_cast<CheckResult>(result),
                          item.at(2).get<std::string>(), item.at(3).get<std::string>(),
                          item.at(4).get<std::vector<int>>()});
    }
  } catch (const nlohmann::json::exception& error) {
    return absl::InvalidArgumentError(absl::StrCat("findings of another rank: ", error.what()));
  }
  return findings;
}

void DoctorReport::Add(std::vector<Finding> findings) {
  for (Finding& finding : findings) {
    const auto same = std::find_if(findings_.begin(), findings_.end(),
                                   [&](const Finding& other) { return SameButRanks(other, finding); });
    if (same != findings_.end()) {
      std::vector<int> ranks;
      std::set_union(same->ranks.begin(), same->ranks.end(), finding.ranks.begin(), finding.ranks.end(),
                     std::back_inserter(ranks));
      same->ranks = std::move(ranks);
      continue;
    }
    const auto last = std::find_if(findings_.rbegin(), findings_.rend(),
                                   [&](const Finding& other) { return other.check == finding.check; });
    findings_.insert(last == findings_.rend() ? findings_.end() : last.base(), std::move(finding));
  }
}

int DoctorReport::Count(CheckResult result) const {
  return static_cast<int>(std::count_if(findings_.begin(), findings_.end(),
                                        [&](const Finding& f) { return f.result == result; }));
}

std::string DoctorReport::ToText(const ReportHeader& header) const {
  const std::vector<int> all = AllRanks(header.hosts.size());
  std::string text =
      absl::StrCat("longfill ", header.version, " (commit ", header.commit, "), device ", header.device,
                   ", started by ", header.launcher.empty() ? "no launcher" : header.launcher,
                   "; ranks: ", ByHost(header.hosts, all), "\n");
  std::vector<std::string> places;
  size_t check_width = 0;
  size_t place_width = 0;
  for (const Finding& finding : findings_) {
    places.push_back(finding.ranks == all && all.size() > 1 ? "all" : ByHost(header.hosts, finding.ranks));
    check_width = std::max(check_width, finding.check.size());
    place_width = std::max(place_width, places.back().size());
  }
  for (size_t i = 0; i < findings_.size(); ++i) {
    const Finding& finding = findings_[i];
    absl::StrAppendFormat(&text, "%-7s  %-*s  %-*s  %s\n", std::string(CheckResultName(finding.result)),
                          static_cast<int>(check_width), finding.check, static_cast<int>(place_width),
                          places[i], finding.value);
    if (!finding.advice.empty()) absl::StrAppend(&text, "         -> ", finding.advice, "\n");
  }
  absl::StrAppend(&text, Count(CheckResult::kFailed), " failed, ", Count(CheckResult::kWarning),
                  " warnings, ", Count(CheckResult::kOk), " ok, ", Count(CheckResult::kSkipped),
                  " skipped\n");
  return text;
}

std::string DoctorReport::ToJson(const ReportHeader& header) const {
  const auto places = [&](const std::vector<int>& ranks) {
    Json list = Json::array();
    for (const auto& [host, its] : GroupByHost(header.hosts, ranks)) {
      list.push_back({{"host", host}, {"ranks", its}});
    }
    return list;
  };
  Json json;
  json["version"] = header.version;
  json["commit"] = header.commit;
  json["launcher"] = header.launcher;
  json["device"] = header.device;
  json["ranks"] = header.hosts.size();
  json["hosts"] = places(AllRanks(header.hosts.size()));
  for (const CheckResult result :
       {CheckResult::kFailed, CheckResult::kWarning, CheckResult::kOk, CheckResult::kSkipped}) {
    json[std::string(CheckResultName(result))] = Count(result);
  }
  json["findings"] = Json::array();
  for (const Finding& finding : findings_) {
    json["findings"].push_back({{"check", finding.check},
                                {"result", std::string(CheckResultName(finding.result))},
                                {"value", finding.value},
                                {"advice", finding.advice},
                                {"where", places(finding.ranks)}});
  }
  return Dump(json);
}

}  // namespace longfill
