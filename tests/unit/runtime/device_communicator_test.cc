// Which communicator the ranks choose, from what all of them know.

#include "runtime/engine/device_communicator.h"

#include <vector>

#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr int kVersion = 22809;

absl::StatusOr<CommunicatorChoice> Choose(CommunicatorKind kind, std::vector<RankDevice> ranks,
                                          bool ranks_share_gpus = false) {
  return ChooseCommunicator({.kind = kind, .nccl = {.ranks_share_gpus = ranks_share_gpus}}, ranks);
}

std::vector<RankDevice> Gpus(std::vector<std::string> ids, int version = kVersion) {
  std::vector<RankDevice> ranks;
  for (std::string& id : ids) ranks.push_back({std::move(id), version});
  return ranks;
}

TEST(ChooseCommunicator, AutoTakesNcclWhereEveryRankHasAGpuOfItsOwn) {
  LF_ASSERT_OK_AND_ASSIGN(CommunicatorChoice choice, Choose(CommunicatorKind::kAuto, Gpus({"a", "b", "c"})));
  EXPECT_EQ(choice.kind, CommunicatorKind::kNccl);
  EXPECT_THAT(choice.reason, HasSubstr("own"));
  LF_ASSERT_OK_AND_ASSIGN(choice, Choose(CommunicatorKind::kAuto, Gpus({"a", "b", "a"})));
  EXPECT_EQ(choice.kind, CommunicatorKind::kStaged);
  EXPECT_THAT(choice.reason, HasSubstr("ranks 0 and 2 share GPU a"));
}

TEST(ChooseCommunicator, AutoStagesWhereNcclIsMissingOrDiffers) {
  std::vector<RankDevice> ranks = Gpus({"a", "b"});
  ranks[1].nccl_version = 0;
  LF_ASSERT_OK_AND_ASSIGN(CommunicatorChoice choice, Choose(CommunicatorKind::kAuto, ranks));
  EXPECT_EQ(choice.kind, CommunicatorKind::kStaged);
  EXPECT_THAT(choice.reason, AllOf(HasSubstr("rank 1"), HasSubstr("LONGFILL_NCCL")));
  ranks[0].id.clear();
  LF_ASSERT_OK_AND_ASSIGN(choice, Choose(CommunicatorKind::kAuto, ranks));
  EXPECT_EQ(choice.kind, CommunicatorKind::kStaged);
  EXPECT_THAT(choice.reason, HasSubstr("rank 0 computes on the CPU"));
  LF_ASSERT_OK_AND_ASSIGN(choice, Choose(CommunicatorKind::kAuto, Gpus({"a"})));
  EXPECT_EQ(choice.kind, CommunicatorKind::kStaged) << "a rank alone";
  LF_ASSERT_OK_AND_ASSIGN(choice, Choose(CommunicatorKind::kAuto, Gpus({"", ""}, 0)));
  EXPECT_EQ(choice.kind, CommunicatorKind::kStaged) << "the CPU";
}

TEST(ChooseCommunicator, ForcedNcclIsTakenOrRefusedByName) {
  LF_ASSERT_OK_AND_ASSIGN(const CommunicatorChoice choice, Choose(CommunicatorKind::kNccl, Gpus({"a", "b"})));
  EXPECT_EQ(choice.kind, CommunicatorKind::kNccl);
  EXPECT_THAT(Choose(CommunicatorKind::kNccl, Gpus({"a", "b", "b"})),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("ranks 1 and 2 share GPU b")));
  EXPECT_THAT(Choose(CommunicatorKind::kNccl, Gpus({"", ""}, 0)),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("CPU")));
  EXPECT_THAT(Choose(CommunicatorKind::kNccl, Gpus({"a", "b"}, 0)),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("built without it")));
  std::vector<RankDevice> ranks = Gpus({"a", "b"});
  ranks[1].nccl_version = 23003;
  EXPECT_THAT(Choose(CommunicatorKind::kNccl, ranks),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("NCCL")));
}

TEST(ChooseCommunicator, RanksMayShareGpusWhereNcclWasToldAndCan) {
  const std::vector<RankDevice> old = Gpus({"a", "a"}), able = Gpus({"a", "a"}, kFirstNcclWithSharedGpus);
  EXPECT_THAT(Choose(CommunicatorKind::kNccl, old, true),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("share")));
  EXPECT_THAT(Choose(CommunicatorKind::kNccl, able, false),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("share")));
  LF_ASSERT_OK_AND_ASSIGN(CommunicatorChoice choice, Choose(CommunicatorKind::kNccl, able, true));
  EXPECT_EQ(choice.kind, CommunicatorKind::kNccl);
  LF_ASSERT_OK_AND_ASSIGN(choice, Choose(CommunicatorKind::kAuto, able, true));
  EXPECT_EQ(choice.kind, CommunicatorKind::kStaged) << "only where it was asked for";
}

TEST(ChooseCommunicator, StagedIsTakenWhereItIsAskedFor) {
  LF_ASSERT_OK_AND_ASSIGN(const CommunicatorChoice choice,
                          Choose(CommunicatorKind::kStaged, Gpus({"a", "b"})));
  EXPECT_EQ(choice.kind, CommunicatorKind::kStaged);
}

}  // namespace
}  // namespace longfill
