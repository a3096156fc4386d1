#include "tests/contract/backend_fixture.h"

#include <map>
#include <random>

namespace longfill {
namespace {

absl::StatusOr<std::unique_ptr<Backend>> CreateNamed(const std::string& name) {
  if (name == "cpu") return CreateCpuBackend(2);
  return CreateCudaBackend({.compute_dtype = name == "cuda_float16" ? DType::kFloat16 : DType::kBFloat16,
                            .generic_kernels = name == "cuda_generic_bfloat16"});
}

// One of each for the whole program: starting a GPU takes most of a second.
absl::StatusOr<std::shared_ptr<Backend>> Shared(const std::string& name) {
  static std::map<std::string, absl::StatusOr<std::shared_ptr<Backend>>> backends;
  if (const auto known = backends.find(name); known != backends.end()) return known->second;
  return backends.emplace(name, CreateNamed(name)).first->second;
}

}  // namespace

void BackendTest::SetUp() {
  absl::StatusOr<std::shared_ptr<Backend>> backend = Shared(GetParam());
  if (!backend.ok()) GTEST_SKIP() << GetParam() << ": " << backend.status().message();
  backend_ = *backend;
}

double BackendTest::epsilon() {
  switch (compute_dtype()) {
    case DType::kBFloat16:
      return 1.0 / (1 << 9);
    case DType::kFloat16:
      return 1.0 / (1 << 12);
    default:
      return 1.0 / (1 << 24);
  }
}

Buffer BackendTest::Bytes(int64_t count) {
  absl::StatusOr<Buffer> buffer = backend_->memory().Allocate(count, "a test array");
  EXPECT_TRUE(buffer.ok()) << buffer.status();
  if (!buffer.ok()) return {};
  const std::vector<uint8_t> poison(static_cast<size_t>(count), 0x7F);
  Put(*buffer, poison.data(), count);
  return *std::move(buffer);
}

void BackendTest::Put(const Buffer& to, const void* from, int64_t bytes) {
  LF_EXPECT_OK(kernels().CopyIn(to.data(), from, bytes, stream()));
}

void BackendTest::Get(void* to, const void* from, int64_t bytes) {
  LF_EXPECT_OK(kernels().CopyOut(to, from, bytes, stream()));
  LF_EXPECT_OK(stream().Sync());
}

Buffer BackendTest::UploadCompute(const std::vector<float>& values) {
  const auto count = static_cast<int64_t>(values.size());
  std::vector<uint8_t> narrow(static_cast<size_t>(count * DTypeBytes(compute_dtype())));
  NarrowFromFloat(values.data(), count, compute_dtype(), narrow.data());
  return Upload(narrow);
}

std::vector<float> BackendTest::DownloadCompute(const void* from, int64_t count) {
  const std::vector<uint8_t> narrow = Download<uint8_t>(from, count * DTypeBytes(compute_dtype()));
  std::vector<float> values(static_cast<size_t>(count));
  WidenToFloat(narrow.data(), compute_dtype(), count, values.data());
  return values;
}

std::vector<float> BackendTest::Rounded(const std::vector<float>& values) {
  std::vector<uint8_t> narrow(values.size() * static_cast<size_t>(DTypeBytes(compute_dtype())));
  NarrowFromFloat(values.data(), static_cast<int64_t>(values.size()), compute_dtype(), narrow.data());
  std::vector<float> rounded(values.size());
  WidenToFloat(narrow.data(), compute_dtype(), static_cast<int64_t>(values.size()), rounded.data());
  return rounded;
}

Workspace BackendTest::NewWorkspace(int64_t bytes) {
  kept_.push_back(Bytes(bytes));
  return {kept_.back().data(), bytes};
}

std::vector<IndexView> BackendTest::UploadIndices(std::span<const SparseIndex> indices) {
  const PackedIndices packed(indices);
  kept_.push_back(Bytes(packed.size_bytes()));
  Put(kept_.back(), packed.data(), packed.size_bytes());
  return packed.Views(kept_.back().data());
}

std::vector<float> NormalFloats(int64_t count, uint32_t seed, float stddev) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0F, stddev);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

std::vector<std::string> BackendNames() {
  return {"cpu", "cuda_bfloat16", "cuda_float16", "cuda_generic_bfloat16"};
}

}  // namespace longfill
