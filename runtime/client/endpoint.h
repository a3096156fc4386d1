#ifndef LONGFILL_RUNTIME_CLIENT_ENDPOINT_H_
#define LONGFILL_RUNTIME_CLIENT_ENDPOINT_H_

#include <string>
#include <string_view>

#include "kernels/base/status.h"

namespace longfill {

struct HostPort {
  std::string host;  // brackets of an IPv6 address kept
  int port = 0;
};

// "HOST:PORT" or "[IPV6]:PORT"; the host may be empty. InvalidArgument for anything else, naming the text.
absl::StatusOr<HostPort> ParseHostPort(std::string_view text);

// 0.0.0.0, [::] or empty: every address of a host.
bool IsWildcardHost(std::string_view host);

// Where a client of `target` (HOST:PORT of rank 0) reaches a rank whose manifest entry is `endpoint`. A
// wildcard host becomes the target's host. A loopback host stays; it is
// FailedPrecondition when the target is not on loopback, since it would be reached on the wrong machine.
absl::StatusOr<std::string> ResolveEndpoint(std::string_view endpoint, std::string_view target);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_CLIENT_ENDPOINT_H_
