#ifndef LONGFILL_RUNTIME_CLIENT_CONVERT_H_
#define LONGFILL_RUNTIME_CLIENT_CONVERT_H_

// Between longfill.v1 messages and the types of the library; used by the client and the server.

#include <grpcpp/support/status.h>

#include "kernels/base/status.h"
#include "longfill/v1/kv.pb.h"
#include "longfill/v1/prefill.pb.h"
#include "runtime/engine/memory_plan.h"
#include "runtime/engine/prefill_engine.h"
#include "runtime/kv/kv_manifest.h"
#include "runtime/kv/kv_page.h"
#include "runtime/kv/transfer_state.h"

namespace longfill {

// The codes are the same numbers.
grpc::Status ToGrpc(const absl::Status& status);
absl::Status FromGrpc(const grpc::Status& status);

v1::DataType ToProto(DType dtype);
// InvalidArgument for a number that this version does not know; unspecified is float32.
absl::StatusOr<DType> FromProto(v1::DataType dtype);
v1::Coverage ToProto(Coverage coverage);
absl::StatusOr<Coverage> FromProto(v1::Coverage coverage);
absl::StatusOr<KvLayout> FromProto(v1::KvLayout layout);
v1::TransferState ToProto(TransferState state);

v1::KvManifest ToProto(const KvManifest& manifest, int64_t lease_ms);
// DataLoss if it contradicts itself: sizes, ranges out of order, tokens that no shard or more than one owns.
absl::StatusOr<KvManifest> FromProto(const v1::KvManifest& message);

v1::RecallOptions ToProto(const RecallOptions& options);
// InvalidArgument with the value where the least recall is none.
absl::StatusOr<RecallOptions> FromProto(const v1::RecallOptions& message);

v1::PrefillFigures ToProto(const PrefillFigures& figures);
PrefillFigures FromProto(const v1::PrefillFigures& message);
v1::MemoryPlan ToProto(const MemoryPlan& plan);
MemoryPlan FromProto(const v1::MemoryPlan& message);
v1::Progress ToProto(const PrefillProgress& progress);
PrefillProgress FromProto(const v1::Progress& message);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_CLIENT_CONVERT_H_
