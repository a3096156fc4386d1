#ifndef LONGFILL_DEPLOY_CLI_FIGURES_H_
#define LONGFILL_DEPLOY_CLI_FIGURES_H_

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "runtime/engine/prefill_engine.h"

namespace longfill {

// What --json prints: the figures of one prompt as one object, of several as {"prompts": [...]} in the order
// given.
std::string FiguresToJson(const std::vector<PrefillFigures>& prompts);

// What the recall monitor saw, as it stands in there.
nlohmann::ordered_json ToJson(const RecallFigures& recall);

// One line for people: "4096 tokens in 1.52 s (2695 tokens/s), attention ..., density 1.0000, KV 188.7 MB,
// ...".
std::string FiguresToText(const PrefillFigures& figures);

// "12.3 MB"
std::string FormatBytes(int64_t bytes);

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_FIGURES_H_
