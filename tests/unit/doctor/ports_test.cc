#include "deploy/doctor/ports.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using std::chrono::milliseconds;
using ::testing::HasSubstr;

std::string Local(int port) { return absl::StrCat("127.0.0.1:", port); }

TEST(Listener, SaysItsWordToAllWhoConnect) {
  LF_ASSERT_OK_AND_ASSIGN(Listener first, Listener::Open("127.0.0.1:0"));
  LF_ASSERT_OK_AND_ASSIGN(Listener second, Listener::Open("0.0.0.0:0"));
  Callers callers({Local(first.port()), Local(second.port()), absl::StrCat("localhost:", first.port())},
                  milliseconds(20000));
  first.Answer("one", milliseconds(200));
  second.Answer("two", milliseconds(200));
  const auto heard = callers.Hear(milliseconds(20000));
  ASSERT_EQ(heard.size(), 3u);
  for (const auto& each : heard) LF_ASSERT_OK(each);
  EXPECT_EQ(*heard[0], "one");
  EXPECT_EQ(*heard[1], "two");
  EXPECT_EQ(*heard[2], "one");
}

TEST(Listener, IsRefusedWhereAnotherListens) {
  LF_ASSERT_OK_AND_ASSIGN(const Listener first, Listener::Open("127.0.0.1:0"));
  const absl::Status taken = Listener::Open(Local(first.port())).status();
  EXPECT_THAT(taken, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("in use")));
  const Finding finding = JudgePort("port.listen", "--listen", Local(first.port()), taken);
  EXPECT_EQ(finding.result, CheckResult::kFailed);
  EXPECT_THAT(finding.value, HasSubstr(Local(first.port())));
  EXPECT_THAT(finding.advice, HasSubstr("choose another port"));
}

TEST(Listener, IsRefusedAtAnAddressOfAnotherHost) {
  const absl::Status elsewhere = Listener::Open("192.0.2.1:0").status();  // TEST-NET-1, RFC 5737
  EXPECT_FALSE(elsewhere.ok());
  EXPECT_THAT(JudgePort("port.listen", "--listen", "192.0.2.1:0", elsewhere).advice,
              HasSubstr("not an address of"));
  EXPECT_THAT(Listener::Open("no address").status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("HOST:PORT")));
}

TEST(Callers, SayWhyNobodyAnswers) {
  int closed = 0;
  {
    LF_ASSERT_OK_AND_ASSIGN(const Listener gone, Listener::Open("127.0.0.1:0"));
    closed = gone.port();
  }
  LF_ASSERT_OK_AND_ASSIGN(const Listener silent, Listener::Open("127.0.0.1:0"));
  Callers callers({Local(closed), Local(silent.port()), "no-such-host.invalid:1"}, milliseconds(20000));
  const auto heard = callers.Hear(milliseconds(50));
  EXPECT_THAT(heard[0], StatusIs(absl::StatusCode::kUnavailable, HasSubstr("refused")));
  EXPECT_THAT(heard[1], StatusIs(absl::StatusCode::kUnavailable, HasSubstr("nothing was said")));
  EXPECT_THAT(heard[2], StatusIs(absl::StatusCode::kUnavailable, HasSubstr("no-such-host.invalid")));
}

TEST(JudgeReachability, NamesRankAddressAndReason) {
  const Reached right{.rank = 0, .address = "a:1", .heard = std::string("x"), .word = "x"};
  EXPECT_EQ(JudgeReachability({right}).result, CheckResult::kOk);
  Reached dropped{.rank = 3, .address = "b:2", .heard = absl::UnavailableError("no answer"), .word = "y"};
  Finding finding = JudgeReachability({right, dropped});
  EXPECT_EQ(finding.result, CheckResult::kFailed);
  EXPECT_EQ(finding.value, "rank 3 at b:2: no answer");
  EXPECT_THAT(finding.advice, HasSubstr("open the ports"));
  dropped.heard = std::string("x");
  finding = JudgeReachability({right, dropped});
  EXPECT_THAT(finding.value, HasSubstr("something else answers"));
  EXPECT_THAT(finding.advice, HasSubstr("/etc/hosts"));
}

}  // namespace
}  // namespace longfill
