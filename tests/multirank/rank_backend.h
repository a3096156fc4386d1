#ifndef LONGFILL_TESTS_MULTIRANK_RANK_BACKEND_H_
#define LONGFILL_TESTS_MULTIRANK_RANK_BACKEND_H_

// Multi-rank tests run over several backends, one for each rank: "cpu"; "guarded", the CPU behind the habits
// of a GPU (tests/testing/guarded_backend.h); "cuda_bfloat16", where all ranks share one GPU and exchange
// through pinned host memory; "nccl", where each has a GPU and they exchange over NCCL. Where there are no
// such GPUs, the tests skip and say why.

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/api/backend.h"
#include "parallel/communicator.h"
#include "parallel/staged_communicator.h"
#include "tests/multirank/ranks.h"

namespace longfill {

// Thread-safe. Backends of a GPU are made once for each rank and shared by all tests; the memory of others is
// limited to limit_bytes (0: no limit).
absl::StatusOr<std::shared_ptr<Backend>> RankBackend(const std::string& name, int rank,
                                                     int64_t limit_bytes = 0);

// The communicator for memory of that backend; staged in slices of so many bytes, where it is staged.
absl::StatusOr<std::unique_ptr<Communicator>> DeviceWorld(const std::string& name, Communicator& host,
                                                          Backend& backend,
                                                          int64_t slice_bytes = kStagingSliceBytes);

// The lists of an index that lies in the backend's memory; padded block lists become dense ones.
SparseIndex DownloadIndex(Backend& backend, const IndexView& index, int64_t num_tokens);

class RankBackendTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override;

  bool on_gpu() const { return GetParam() == "cuda_bfloat16" || over_nccl(); }
  bool over_nccl() const { return GetParam() == "nccl"; }
  bool on_cpu() const { return GetParam() == "cpu"; }
  // Group sizes that are worth their time: ranks behind a device are slower than those on the CPU.
  std::vector<int> Sizes() const;
};

#define LF_INSTANTIATE_RANK_BACKENDS(suite)                                                             \
  INSTANTIATE_TEST_SUITE_P(Backends, suite, testing::Values("cpu", "guarded", "cuda_bfloat16", "nccl"), \
                           [](const testing::TestParamInfo<std::string>& backend) { return backend.param; })

}  // namespace longfill

#endif  // LONGFILL_TESTS_MULTIRANK_RANK_BACKEND_H_
