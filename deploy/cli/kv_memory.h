#ifndef LONGFILL_DEPLOY_CLI_KV_MEMORY_H_
#define LONGFILL_DEPLOY_CLI_KV_MEMORY_H_

// --kv-memory: where `serve` keeps KV caches until they have been read.

#include <memory>
#include <string>

#include "deploy/cli/command.h"
#include "runtime/kv/file_memory.h"
#include "runtime/kv/kv_tier.h"

namespace longfill {

struct KvMemory {
  enum class Kind { kHost, kPageable, kFile, kDevice, kReader };
  Kind kind = Kind::kHost;
  std::string directory;  // kFile
  int64_t bytes = 0;      // kDevice: the budget; kReader: the ring
};

// "host", "pageable", "file:DIR", "device:BYTES", "reader" or "reader:BYTES". InvalidArgument says what is
// wrong.
absl::StatusOr<KvMemory> ParseKvMemory(const std::string& text);
CLI::Option* AddKvMemoryOption(CLI::App& app, std::string& text);

// What a memory plan counts of it.
KvTierOptions PlanOf(const KvMemory& memory);

// The tier, and the memory below it.
class KvMemoryTier {
 public:
  // Takes a device's budget. `backend` outlives the result.
  static absl::StatusOr<std::unique_ptr<KvMemoryTier>> Create(const KvMemory& memory, Backend& backend);
  KvTier* tier() const { return tier_.get(); }

 private:
  KvMemoryTier() = default;
  CpuMemoryResource pageable_;
  std::unique_ptr<FileMemoryResource> files_;
  std::unique_ptr<KvTier> tier_;
};

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_KV_MEMORY_H_
