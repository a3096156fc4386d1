#ifndef LONGFILL_DEPLOY_CLI_SERVE_ADDRESSES_H_
#define LONGFILL_DEPLOY_CLI_SERVE_ADDRESSES_H_

// Where the ranks of a service listen, for `serve` and for `doctor`, which tries it out.

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "kernels/base/status.h"

namespace longfill {

inline constexpr char kDefaultListen[] = "127.0.0.1:50051";

// --listen and --kv-listen.
void AddListenOptions(CLI::App& app, std::string& listen, std::string& kv_listen);

// Of one rank; as in ServerOptions.
struct ServeAddresses {
  std::string listen;          // HOST:PORT
  std::string kv_listen;       // rank 0's second address, for pages; empty: `listen`
  std::string advertise_host;  // the manifest names it; empty: the host listened at
};
// Rank 0: --listen for prompts, and --kv-listen for pages where given. Rank r: port r above that of
// --kv-listen, or any free port; its host is that of --kv-listen, else of --listen. `hosts`: names by rank.
absl::StatusOr<ServeAddresses> MakeServeAddresses(const std::string& listen, const std::string& kv_listen,
                                                  int rank, const std::vector<std::string>& hosts);

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_SERVE_ADDRESSES_H_
