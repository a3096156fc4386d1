#ifndef LONGFILL_TESTS_TESTING_HOST_INDEX_H_
#define LONGFILL_TESTS_TESTING_HOST_INDEX_H_

#include "kernels/sparse/index_view.h"

namespace longfill {

// One index in host memory, as the CPU kernels and coverage.h read it.
class HostIndex {
 public:
  explicit HostIndex(const SparseIndex& index)
      : packed_({&index, 1}), view_(packed_.Views(packed_.data()).front()) {}
  HostIndex(const HostIndex&) = delete;
  HostIndex& operator=(const HostIndex&) = delete;

  const IndexView& view() const { return view_; }

 private:
  const PackedIndices packed_;
  const IndexView view_;
};

}  // namespace longfill

#endif  // LONGFILL_TESTS_TESTING_HOST_INDEX_H_
