#include "parallel/peer_memory.h"

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "parallel/communicator.h"
#include "tests/testing/guarded_backend.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// Plays as many ranks as there are hosts named, each on a backend of its host.
void OnRanksOf(const std::vector<std::string>& hosts,
               const std::function<void(Communicator& group, Backend& backend)>& play) {
  const auto ranks = CreateInProcessCommunicators(static_cast<int>(hosts.size()), {});
  std::vector<std::thread> threads;
  for (size_t rank = 0; rank < hosts.size(); ++rank) {
    threads.emplace_back([&, rank] {
      const auto backend =
          hosts[rank] == "CPU" ? CreateLimitedCpuBackend() : CreateGuardedBackend({.host = hosts[rank]});
      play(*ranks[rank], *backend);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(PeerHosts, FindsWhoIsOnOneHost) {
  OnRanksOf({"x", "y", "x", "y", "x", "y"}, [](Communicator& group, Backend& backend) {
    LF_ASSERT_OK_AND_ASSIGN(const PeerHosts hosts, PeerHosts::Find(group, backend));
    EXPECT_EQ(hosts.num_hosts(), 2);
    EXPECT_THAT(hosts.RanksOf(0), ElementsAre(0, 2, 4));
    EXPECT_THAT(hosts.RanksOf(1), ElementsAre(1, 3, 5));
    EXPECT_EQ(hosts.HostOf(group.rank()), group.rank() % 2);
    EXPECT_EQ(hosts.LocalOf(group.rank()), group.rank() / 2);
    LF_EXPECT_OK(hosts.CheckAlike());
  });
}

TEST(PeerHosts, OneHostOfAnySizeIsEnough) {
  for (const size_t size : {1, 3}) {
    OnRanksOf(std::vector<std::string>(size, "x"), [](Communicator& group, Backend& backend) {
      LF_ASSERT_OK_AND_ASSIGN(const PeerHosts hosts, PeerHosts::Find(group, backend));
      EXPECT_EQ(hosts.num_hosts(), 1);
      LF_EXPECT_OK(hosts.CheckAlike());
    });
  }
  LF_EXPECT_OK(PeerHosts().CheckAlike());
}

TEST(PeerHosts, HostsThatDifferInRanksOrHaveOneAreRefusedWithTheirNumbers) {
  EXPECT_THAT(PeerHosts({7, 7, 3}).CheckAlike(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("the hosts have 2, 1 ranks")));
  EXPECT_THAT(PeerHosts({0, 1}).CheckAlike(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("the hosts have 1, 1 ranks")));
}

TEST(PeerHosts, ADeviceThatLendsNothingIsTheSameErrorOnAllRanks) {
  OnRanksOf({"x", "CPU", "x"}, [](Communicator& group, Backend& backend) {
    EXPECT_THAT(PeerHosts::Find(group, backend).status(),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("CPU lends no memory to peers")));
    EXPECT_THAT(TryPeerMemory(group, backend),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("CPU lends no memory to peers")));
  });
}

TEST(PeerMemory, RanksOfAHostReadOneAnother) {
  OnRanksOf({"x", "y", "x", "y"}, [](Communicator& group, Backend& backend) {
    LF_ASSERT_OK_AND_ASSIGN(const PeerHosts hosts, PeerHosts::Find(group, backend));
    LF_ASSERT_OK_AND_ASSIGN(const auto own_host,
                            group.Split(hosts.HostOf(group.rank()), hosts.LocalOf(group.rank())));
    EXPECT_EQ(own_host->size(), 2);
    LF_EXPECT_OK(TryPeerMemory(*own_host, backend));
  });
}

}  // namespace
}  // namespace longfill
