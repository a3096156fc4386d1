// Launches as the environment shows them; the variables are those that Open MPI 4.1 and Slurm 22.05 set.

#include "deploy/cli/launch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

#include "deploy/cli/serve_addresses.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kOpenMpi[] = "Open MPI v4.1.4";

Launch With(const std::map<std::string, std::string>& variables) {
  return LaunchOf([&](const char* name) -> std::optional<std::string> {
    const auto found = variables.find(name);
    if (found == variables.end()) return std::nullopt;
    return found->second;
  });
}

// What srun sets beside the variables of PMI.
std::map<std::string, std::string> Step(std::map<std::string, std::string> more) {
  std::map<std::string, std::string> variables = {
      {"SLURM_JOB_ID", "7"},  {"SLURM_NTASKS", "4"},         {"SLURM_PROCID", "2"},
      {"SLURM_STEP_ID", "0"}, {"SLURM_STEP_NUM_TASKS", "4"},
  };
  variables.merge(more);
  return variables;
}

TEST(LaunchOf, NothingIsOneProcess) {
  const Launch launch = With({});
  EXPECT_FALSE(launch.parallel);
  EXPECT_EQ(launch.launcher, "");
  EXPECT_EQ(FindLaunchProblem(launch, 1, kOpenMpi), std::nullopt);
}

TEST(LaunchOf, MpirunAlsoInsideASlurmStep) {
  // The daemons of mpirun are started by srun, and their children have its variables.
  for (const auto& variables :
       {std::map<std::string, std::string>{{"OMPI_COMM_WORLD_RANK", "5"}, {"OMPI_COMM_WORLD_SIZE", "8"}},
        Step({{"OMPI_COMM_WORLD_RANK", "5"}, {"OMPI_COMM_WORLD_SIZE", "8"}, {"PMIX_RANK", "5"}})}) {
    const Launch launch = With(variables);
    EXPECT_TRUE(launch.parallel);
    EXPECT_EQ(launch.rank, 5);
    EXPECT_EQ(launch.launcher, "mpirun");
    EXPECT_EQ(launch.num_processes, 8);
    EXPECT_EQ(FindLaunchProblem(launch, 8, kOpenMpi), std::nullopt);
  }
}

TEST(LaunchOf, SrunWithPmix) {
  const Launch launch = With(Step({{"PMIX_RANK", "2"}, {"PMIX_NAMESPACE", "slurm.pmix.2.0"}}));
  EXPECT_TRUE(launch.parallel);
  EXPECT_EQ(launch.rank, 2);
  EXPECT_EQ(launch.launcher, "srun --mpi=pmix");
  EXPECT_EQ(launch.evidence, "SLURM_STEP_NUM_TASKS=4");
  EXPECT_EQ(FindLaunchProblem(launch, 4, kOpenMpi), std::nullopt);
  EXPECT_EQ(WarnBeforeMpi(launch, kOpenMpi), "");
  const auto alone = FindLaunchProblem(launch, 1, kOpenMpi);
  ASSERT_TRUE(alone.has_value());
  EXPECT_THAT(alone->advice, HasSubstr("PMIx"));
}

TEST(LaunchOf, SrunWithoutPmixIsRefusedByName) {
  const Launch launch = With(Step({}));
  EXPECT_FALSE(launch.parallel);
  EXPECT_EQ(launch.rank, 0);
  EXPECT_EQ(launch.process, 2);
  const auto problem = FindLaunchProblem(launch, 1, kOpenMpi);
  ASSERT_TRUE(problem.has_value());
  EXPECT_THAT(problem->what, HasSubstr("srun has started 4 processes (SLURM_STEP_NUM_TASKS=4)"));
  EXPECT_THAT(problem->what, HasSubstr("rank 0 of 1"));
  EXPECT_THAT(problem->advice, HasSubstr("srun --mpi=pmix"));
}

TEST(LaunchOf, SrunWithPmi2IsTriedAndWarnedOf) {
  const Launch launch = With(Step({{"PMI_RANK", "2"}, {"PMI_SIZE", "4"}, {"PMI_FD", "11"}}));
  EXPECT_TRUE(launch.parallel);
  EXPECT_EQ(launch.rank, 2);
  EXPECT_EQ(launch.evidence, "PMI_SIZE=4");
  EXPECT_THAT(WarnBeforeMpi(launch, kOpenMpi), HasSubstr("srun --mpi=pmix"));
  EXPECT_EQ(WarnBeforeMpi(launch, "MPICH Version: 4.0.2"), "");
  EXPECT_EQ(FindLaunchProblem(launch, 4, kOpenMpi), std::nullopt);
  ASSERT_TRUE(FindLaunchProblem(launch, 1, kOpenMpi).has_value());
}

TEST(LaunchOf, ThePmiLauncherOfAnotherMpiIsRefused) {
  const Launch launch = With({{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}});  // MPICH's mpirun, Open MPI's program
  const auto problem = FindLaunchProblem(launch, 1, kOpenMpi);
  ASSERT_TRUE(problem.has_value());
  EXPECT_THAT(problem->what, HasSubstr("PMI_SIZE=2"));
  EXPECT_THAT(problem->advice, HasSubstr(kOpenMpi));
}

TEST(LaunchOf, AllocationsAndSingleTasksAreNoLaunch) {
  const std::map<std::string, std::string> batch = {
      {"SLURM_JOB_ID", "4"}, {"SLURM_NTASKS", "4"}, {"SLURM_NPROCS", "4"}, {"SLURM_PROCID", "0"}};
  const std::map<std::string, std::string> shell = {{"SLURM_JOB_ID", "4"}, {"SLURM_NTASKS", "4"}};
  const std::map<std::string, std::string> one = {
      {"SLURM_STEP_ID", "0"}, {"SLURM_STEP_NUM_TASKS", "1"}, {"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "1"}};
  for (const auto& variables : {batch, shell, one}) {
    const Launch launch = With(variables);
    EXPECT_FALSE(launch.parallel);
    EXPECT_EQ(launch.launcher, "");
    EXPECT_EQ(FindLaunchProblem(launch, 1, kOpenMpi), std::nullopt);
  }
}

TEST(LaunchOf, WhatIsNoNumberIsNotLookedAt) {
  EXPECT_FALSE(With({{"OMPI_COMM_WORLD_RANK", "x"}}).parallel);
  EXPECT_FALSE(With({{"OMPI_COMM_WORLD_RANK", "-1"}}).parallel);
  const Launch launch = With({{"OMPI_COMM_WORLD_RANK", "1"}, {"OMPI_COMM_WORLD_SIZE", "many"}});
  EXPECT_EQ(launch.num_processes, 1);
}

TEST(ServeAddresses, FollowTheRankAndTheHosts) {
  const std::vector<std::string> one_host = {"a", "a", "a"};
  LF_ASSERT_OK_AND_ASSIGN(ServeAddresses got, MakeServeAddresses("127.0.0.1:50051", "", 0, one_host));
  EXPECT_EQ(got.listen, "127.0.0.1:50051");
  EXPECT_EQ(got.advertise_host, "");
  LF_ASSERT_OK_AND_ASSIGN(got, MakeServeAddresses("0.0.0.0:50051", "", 2, {"a", "a", "b"}));
  EXPECT_EQ(got.listen, "0.0.0.0:0");
  EXPECT_EQ(got.advertise_host, "b");
  LF_ASSERT_OK_AND_ASSIGN(got, MakeServeAddresses("0.0.0.0:50051", "10.0.0.1:6000", 0, one_host));
  EXPECT_EQ(got.listen, "0.0.0.0:50051");
  EXPECT_EQ(got.kv_listen, "10.0.0.1:6000");
  LF_ASSERT_OK_AND_ASSIGN(got, MakeServeAddresses("0.0.0.0:50051", "10.0.0.1:6000", 2, one_host));
  EXPECT_EQ(got.listen, "10.0.0.1:6002");
  EXPECT_THAT(MakeServeAddresses("0.0.0.0:1", "0.0.0.0:65534", 0, one_host),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("3 ranks")));
}

}  // namespace
}  // namespace longfill
