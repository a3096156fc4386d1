#include "runtime/kv/crc32c.h"

#include <isa-l/crc.h>

#include <algorithm>

namespace longfill {

uint32_t Crc32c(const void* data, int64_t size_bytes, uint32_t crc) {
  // ISA-L works on the bare register: the standard's inversions before and after are ours. It takes int
  // lengths and a pointer to non-const that it does not write through.
  constexpr int64_t kPiece = int64_t{1} << 30;
  auto* bytes = const_cast<unsigned char*>(static_cast<const unsigned char*>(data));
  uint32_t bare = ~crc;
  while (size_bytes > 0) {
    const int64_t piece = std::min(size_bytes, kPiece);
    bare = crc32_iscsi(bytes, static_cast<int>(piece), bare);
    bytes += piece;
    size_bytes -= piece;
  }
  return ~bare;
}

}  // namespace longfill
