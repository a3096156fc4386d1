#ifndef LONGFILL_RUNTIME_KV_KV_DISCARD_SINK_H_
#define LONGFILL_RUNTIME_KV_KV_DISCARD_SINK_H_

#include "runtime/kv/kv_sink.h"

namespace longfill {

// Drops K and V after a checksum, for measurements of prompts whose cache fits nowhere. They are not
// converted: the spec's dtype is not looked at. The checksum does not depend on the pieces in which rows
// come: it is the CRC-32C of one little-endian uint32 for each layer, key before value, and KV head: the
// CRC-32C of that head's rows.
KvSinkFactory MakeKvDiscardSinkFactory();

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_KV_KV_DISCARD_SINK_H_
