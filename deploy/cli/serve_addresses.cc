#include "deploy/cli/serve_addresses.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "runtime/client/endpoint.h"

namespace longfill {

void AddListenOptions(CLI::App& app, std::string& listen, std::string& kv_listen) {
  app.add_option("--listen", listen,
                 absl::StrCat("where rank 0 takes prompts; port 0 takes any free one (default of serve: ",
                              kDefaultListen, ")"))
      ->type_name("HOST:PORT");
  app.add_option("--kv-listen", kv_listen,
                 "where ranks serve their KV pages: rank r at PORT + r, with port 0 at any free one\n"
                 "(default: rank 0 at --listen, the others on its host at any free port)")
      ->type_name("HOST:PORT");
}

absl::StatusOr<ServeAddresses> MakeServeAddresses(const std::string& listen, const std::string& kv_listen,
                                                  int rank, const std::vector<std::string>& hosts) {
  ServeAddresses addresses;
  const auto size = static_cast<int>(hosts.size());
  const std::string kv_text = kv_listen.empty() ? listen : kv_listen;
  LF_RETURN_IF_ERROR(ParseHostPort(listen).status());
  LF_ASSIGN_OR_RETURN(const HostPort kv, ParseHostPort(kv_text));
  const bool fixed_ports = !kv_listen.empty() && kv.port != 0;
  if (kv.port + (fixed_ports ? size - 1 : 0) > 65535) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--kv-listen ", kv_text, ": rank r listens r ports above, and there are ", size, " ranks"));
  }
  addresses.listen = rank == 0 ? listen : absl::StrCat(kv.host, ":", fixed_ports ? kv.port + rank : 0);
  if (rank == 0) addresses.kv_listen = kv_listen;
  const bool several_hosts =
      std::any_of(hosts.begin(), hosts.end(), [&](const std::string& host) { return host != hosts.front(); });
  if (several_hosts && IsWildcardHost(kv.host)) addresses.advertise_host = hosts[static_cast<size_t>(rank)];
  return addresses;
}

}  // namespace longfill
