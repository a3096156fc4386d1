// A process that no launcher started.

#include "parallel/mpi_communicator.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

TEST(MpiSession, WithoutLauncherIsAGroupOfOneAndMayStartAgain) {
  for (int round = 0; round < 2; ++round) {
    LF_ASSERT_OK_AND_ASSIGN(const auto session, MpiSession::Start({.launched = false}));
    EXPECT_EQ(session->world().size(), 1);
    EXPECT_EQ(session->world().name(), "single");
    CpuStream stream;
    LF_EXPECT_OK(session->world().Barrier(stream));
    EXPECT_FALSE(session->broken());
  }
}

TEST(MpiSession, MessageSizesThatMpiCannotCountAreRefused) {
  for (const int64_t bytes : {int64_t{0}, int64_t{24}, int64_t{1} << 31}) {
    EXPECT_THAT(MpiSession::Start({.launched = true, .max_message_bytes = bytes}).status(),
                StatusIs(absl::StatusCode::kInvalidArgument, testing::HasSubstr(std::to_string(bytes))));
  }
}

}  // namespace
}  // namespace longfill
