#ifndef LONGFILL_RUNTIME_KV_CRC32C_H_
#define LONGFILL_RUNTIME_KV_CRC32C_H_

#include <cstdint>

namespace longfill {

// Standard CRC-32C (Castagnoli, RFC 3720 appendix B.4): Crc32c("123456789", 9) == 0xE3069283. `crc` is that
// of the bytes before, so that pieces chain: Crc32c(b, nb, Crc32c(a, na)) is the checksum of a followed by b.
uint32_t Crc32c(const void* data, int64_t size_bytes, uint32_t crc = 0);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_KV_CRC32C_H_
