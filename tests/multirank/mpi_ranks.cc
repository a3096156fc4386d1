// Main program of a test under mpirun. Every rank runs the same tests in the same order; ranks other than 0
// print failures only. `--max-message-bytes=N` lowers the size of one MPI message.

#include <gtest/gtest.h>

#include <cstdlib>
#include <iostream>
#include <string>

#include "parallel/mpi_communicator.h"
#include "tests/multirank/ranks.h"

namespace longfill {
namespace {

Communicator* g_world = nullptr;  // of main's session

class FailurePrinter : public testing::EmptyTestEventListener {
 public:
  explicit FailurePrinter(int rank) : rank_(rank) {}
  void OnTestStart(const testing::TestInfo& info) override { test_ = info.name(); }
  // Runs under gtest's lock: asking it for the current test here would deadlock.
  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (!result.failed()) return;
    const char* file = result.file_name() != nullptr ? result.file_name() : "?";
    std::cerr << "rank " << rank_ << ": " << test_ << ": " << file << ":" << result.line_number() << ": "
              << result.message() << std::endl;
  }

 private:
  const int rank_;
  std::string test_;
};

}  // namespace

std::vector<int> GroupSizes() { return {g_world->size()}; }

void OnEveryRank(int, const std::function<void(Communicator& world)>& body) { body(*g_world); }

}  // namespace longfill

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  longfill::MpiOptions options;
  options.launched = true;
  options.communicator.timeout = std::chrono::seconds(60);
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const std::string name = "--max-message-bytes=";
    if (argument.rfind(name, 0) == 0) options.max_message_bytes = std::atoll(argument.c_str() + name.size());
  }
  auto session = longfill::MpiSession::Start(options);
  if (!session.ok()) {
    std::cerr << session.status() << std::endl;
    return 1;
  }
  longfill::g_world = &(*session)->world();
  if (const int rank = longfill::g_world->rank(); rank != 0) {
    auto& listeners = testing::UnitTest::GetInstance()->listeners();
    delete listeners.Release(listeners.default_result_printer());
    listeners.Append(new longfill::FailurePrinter(rank));
  }
  return RUN_ALL_TESTS();
}
