#ifndef LONGFILL_RUNTIME_CLIENT_CHANNEL_H_
#define LONGFILL_RUNTIME_CLIENT_CHANNEL_H_

#include <memory>
#include <string>

namespace grpc {
class Channel;
}

namespace longfill {

// A connection of its own to HOST:PORT (channels to one address would else share one), with keepalive and
// room for manifests of very long prompts.
std::shared_ptr<grpc::Channel> MakeChannel(const std::string& target);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_CLIENT_CHANNEL_H_
