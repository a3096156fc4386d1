#ifndef LONGFILL_TESTS_CONTRACT_BACKEND_FIXTURE_H_
#define LONGFILL_TESTS_CONTRACT_BACKEND_FIXTURE_H_

// The contract suite of KernelSet runs over every backend of the machine: cpu, and cuda in bfloat16 and
// float16 where a GPU is there (else those tests skip and say why). Tests think in fp32 host arrays; Device
// arrays hold them in the backend's compute dtype. What a test compares with starts from the values as the
// backend holds them (Rounded), so that only the arithmetic is judged.

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/api/backend.h"
#include "tests/testing/status_matchers.h"

namespace longfill {

class BackendTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override;  // skips visibly where the backend cannot run here

  Backend& backend() { return *backend_; }
  KernelSet& kernels() { return backend_->kernels(); }
  Stream& stream() { return backend_->stream(); }
  DType compute_dtype() { return kernels().compute_dtype(); }
  bool on_gpu() { return kernels().device() == DeviceKind::kCuda; }
  // Largest relative rounding error of the compute dtype: 2^-24, 2^-9, 2^-12.
  double epsilon();

  Buffer Bytes(int64_t count);  // every byte 0x7F, so that what is not written shows
  template <typename T>
  Buffer Upload(std::span<const T> values) {
    Buffer buffer = Bytes(static_cast<int64_t>(values.size_bytes()));
    Put(buffer, values.data(), static_cast<int64_t>(values.size_bytes()));
    return buffer;
  }
  template <typename T>
  Buffer Upload(const std::vector<T>& values) {
    return Upload(std::span<const T>(values));
  }
  template <typename T>
  std::vector<T> Download(const void* from, int64_t count) {
    std::vector<T> values(static_cast<size_t>(count));
    Get(values.data(), from, count * static_cast<int64_t>(sizeof(T)));
    return values;
  }
  // fp32 host values to and from arrays of the compute dtype.
  Buffer UploadCompute(const std::vector<float>& values);
  Buffer ComputeArray(int64_t count) { return Bytes(count * DTypeBytes(compute_dtype())); }
  std::vector<float> DownloadCompute(const void* from, int64_t count);
  std::vector<float> Rounded(const std::vector<float>& values);  // to the compute dtype and back

  Workspace NewWorkspace(int64_t bytes);  // lives until the test ends
  // Host indices in the backend's memory, until the test ends.
  std::vector<IndexView> UploadIndices(std::span<const SparseIndex> indices);

 private:
  void Put(const Buffer& to, const void* from, int64_t bytes);
  void Get(void* to, const void* from, int64_t bytes);

  std::shared_ptr<Backend> backend_;
  std::vector<Buffer> kept_;
};

std::vector<float> NormalFloats(int64_t count, uint32_t seed, float stddev = 1.0F);

// "cpu", "cuda_bfloat16", "cuda_float16", and "cuda_generic_bfloat16", which has no kernel made for one
// architecture.
std::vector<std::string> BackendNames();
#define LF_INSTANTIATE_BACKENDS(suite)                                  \
  INSTANTIATE_TEST_SUITE_P(                                             \
      Backends, suite, ::testing::ValuesIn(::longfill::BackendNames()), \
      [](const ::testing::TestParamInfo<std::string>& backend) { return backend.param; })

}  // namespace longfill

#endif  // LONGFILL_TESTS_CONTRACT_BACKEND_FIXTURE_H_
