#include <thread>

#include "tests/multirank/ranks.h"
#include "tests/testing/sanitized.h"

namespace longfill {

std::vector<int> GroupSizes() {
  if (kSanitized) return {1, 2, 3};
  return {1, 2, 3, 4, 6, 8};
}

void OnEveryRank(int size, const std::function<void(Communicator& world)>& body) {
  auto ranks = CreateInProcessCommunicators(size, {.timeout = std::chrono::seconds(60)});
  std::vector<std::thread> threads;
  threads.reserve(size);
  for (int r = 0; r < size; ++r) threads.emplace_back([&, r] { body(*ranks[r]); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace longfill
