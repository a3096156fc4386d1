#include "deploy/cli/kv_memory.h"

#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"

namespace longfill {
namespace {

constexpr int64_t kDefaultRingBytes = int64_t{256} << 20;
constexpr const char* kForms = "host, pageable, file:DIR, device:BYTES, reader or reader:BYTES";

// A CLI11 check: what is wrong, or nothing.
std::string CheckKvMemory(const std::string& text) {
  const absl::StatusOr<KvMemory> memory = ParseKvMemory(text);
  return memory.ok() ? std::string() : std::string(memory.status().message());
}

}  // namespace

absl::StatusOr<KvMemory> ParseKvMemory(const std::string& text) {
  using Kind = KvMemory::Kind;
  const size_t colon = text.find(':');
  const std::string name = text.substr(0, colon);
  const std::string value = colon == std::string::npos ? "" : text.substr(colon + 1);
  if (text == "host") return KvMemory{.kind = Kind::kHost};
  if (text == "pageable") return KvMemory{.kind = Kind::kPageable};
  if (text == "reader") return KvMemory{.kind = Kind::kReader, .bytes = kDefaultRingBytes};
  if (name == "file" && !value.empty()) return KvMemory{.kind = Kind::kFile, .directory = value};
  if ((name != "device" && name != "reader") || value.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("\"", text, "\" is not ", kForms));
  }
  const absl::StatusOr<int64_t> bytes = ParseBytes(value);
  const int64_t least = name == "device" ? 1 : kMinReaderRingBytes;
  if (!bytes.ok() || *bytes < least) {
    return absl::InvalidArgumentError(absl::StrCat("\"", text, "\": ", name, ":BYTES wants at least ", least,
                                                   " bytes, such as ", name, ":2GB"));
  }
  return KvMemory{.kind = name == "device" ? Kind::kDevice : Kind::kReader, .bytes = *bytes};
}

CLI::Option* AddKvMemoryOption(CLI::App& app, std::string& text) {
  return app
      .add_option(
          "--kv-memory", text,
          "where each rank keeps KV caches until they have been read: host (default, page-locked for a\n"
          "GPU); pageable; file:DIR, unnamed files in DIR, for caches larger than the host's memory;\n"
          "device:BYTES, so much of the device; or reader[:BYTES], straight to one waiting reader through\n"
          "a ring of BYTES (default: 256 MiB)")
      ->type_name("WHERE")
      ->check(CheckKvMemory, "WHERE");
}

KvTierOptions PlanOf(const KvMemory& memory) {
  switch (memory.kind) {
    case KvMemory::Kind::kHost:
    case KvMemory::Kind::kPageable:
      return {.kind = KvTierKind::kHost};
    case KvMemory::Kind::kFile:
      return {.kind = KvTierKind::kNone};  // takes none of the host's memory
    case KvMemory::Kind::kDevice:
      return {.kind = KvTierKind::kDevice, .bytes = memory.bytes};
    case KvMemory::Kind::kReader:
      return {.kind = KvTierKind::kReader, .bytes = memory.bytes};
  }
  return {};
}

absl::StatusOr<std::unique_ptr<KvMemoryTier>> KvMemoryTier::Create(const KvMemory& memory, Backend& backend) {
  std::unique_ptr<KvMemoryTier> result(new KvMemoryTier);
  switch (memory.kind) {
    case KvMemory::Kind::kHost:
      // That of a CPU is its device's too, whose account is for what a prompt computes with.
      result->tier_ = MakeMemoryTier(backend.kernels().device() == DeviceKind::kCpu
                                         ? static_cast<MemoryResource*>(&result->pageable_)
                                         : &backend.host_memory());
      break;
    case KvMemory::Kind::kPageable:
      result->tier_ = MakeMemoryTier(&result->pageable_);
      break;
    case KvMemory::Kind::kFile: {
      LF_ASSIGN_OR_RETURN(result->files_, FileMemoryResource::Create(memory.directory));
      result->tier_ = MakeMemoryTier(result->files_.get());
      break;
    }
    case KvMemory::Kind::kDevice: {
      LF_ASSIGN_OR_RETURN(result->tier_, MakeDeviceTier(backend, memory.bytes));
      break;
    }
    case KvMemory::Kind::kReader:
      // The exporter's buffers are what the device copies to; these need not be page-locked.
      result->tier_ = MakeReaderTier(&result->pageable_, memory.bytes);
      break;
  }
  return result;
}

}  // namespace longfill
