#include <algorithm>
#include <cstring>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/upload.h"

namespace longfill {
namespace {

struct Parcel {
  uint32_t words[kUploadBytes / 4];
};

constexpr int kThreads = 256;

__global__ void UploadKernel(uint32_t* to, const __grid_constant__ Parcel parcel, int bytes) {
  const int words = bytes / 4;
  for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads) to[i] = parcel.words[i];
  const int rest = bytes % 4;
  if (static_cast<int>(threadIdx.x) < rest) {
    reinterpret_cast<uint8_t*>(to + words)[threadIdx.x] =
        static_cast<uint8_t>(parcel.words[words] >> (8 * threadIdx.x));
  }
}

}  // namespace

absl::Status Upload(void* to, const void* host, int64_t bytes, cudaStream_t stream) {
  for (int64_t begin = 0; begin < bytes; begin += kUploadBytes) {
    const int64_t size = std::min(bytes - begin, kUploadBytes);
    Parcel parcel;
    std::memcpy(parcel.words, static_cast<const char*>(host) + begin, static_cast<size_t>(size));
    auto* piece = reinterpret_cast<uint32_t*>(static_cast<char*>(to) + begin);
    LF_RETURN_IF_ERROR(Launch("UploadKernel", UploadKernel, {.block = kThreads}, stream, piece, parcel,
                              static_cast<int>(size)));
  }
  return absl::OkStatus();
}

}  // namespace longfill
