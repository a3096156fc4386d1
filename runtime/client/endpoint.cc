#include "runtime/client/endpoint.h"

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace longfill {
namespace {

bool IsLoopback(std::string_view host) {
  return host == "localhost" || host == "[::1]" || host.substr(0, 4) == "127.";
}

}  // namespace

bool IsWildcardHost(std::string_view host) { return host.empty() || host == "0.0.0.0" || host == "[::]"; }

absl::StatusOr<HostPort> ParseHostPort(std::string_view text) {
  const size_t colon = text.rfind(':');
  HostPort parsed;
  const auto bad = [&] {
    return absl::InvalidArgumentError(absl::StrCat("\"", std::string(text), "\" is not HOST:PORT"));
  };
  if (colon == std::string_view::npos) return bad();
  parsed.host = std::string(text.substr(0, colon));
  const bool bracketed = parsed.host.size() > 2 && parsed.host.front() == '[' && parsed.host.back() == ']';
  if (!bracketed && parsed.host.find_first_of(":[]/ ") != std::string::npos) return bad();
  const std::string port(text.substr(colon + 1));
  if (port.empty() || port.find_first_not_of("0123456789") != std::string::npos ||
      !absl::SimpleAtoi(port, &parsed.port) || parsed.port > 65535) {
    return bad();
  }
  return parsed;
}

absl::StatusOr<std::string> ResolveEndpoint(std::string_view endpoint, std::string_view target) {
  LF_ASSIGN_OR_RETURN(const HostPort at, ParseHostPort(endpoint));
  LF_ASSIGN_OR_RETURN(const HostPort reached, ParseHostPort(target));
  if (IsWildcardHost(at.host))
    return absl::StrCat(IsWildcardHost(reached.host) ? "127.0.0.1" : reached.host, ":", at.port);
  if (IsLoopback(at.host) && !IsLoopback(reached.host) && !IsWildcardHost(reached.host)) {
    return absl::FailedPreconditionError(
        absl::StrCat("the KV pages are served at ", std::string(endpoint), ", on loopback of ", reached.host,
                     "; start the service with an address that this machine can reach"));
  }
  return std::string(endpoint);
}

}  // namespace longfill
