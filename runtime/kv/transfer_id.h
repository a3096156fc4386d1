#ifndef LONGFILL_RUNTIME_KV_TRANSFER_ID_H_
#define LONGFILL_RUNTIME_KV_TRANSFER_ID_H_

#include <string>

#include "kernels/base/status.h"

namespace longfill {

// 192 random bits of the kernel as 48 hex digits: who knows it may read the pages, so it must not be
// guessable. Never used twice. Internal if the kernel gives none.
absl::StatusOr<std::string> NewTransferId();

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_KV_TRANSFER_ID_H_
