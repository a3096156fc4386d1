#include "deploy/cli/bench_work.h"

#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "models/geometry.h"

namespace longfill {

absl::StatusOr<BenchWork> ReadBenchWork(const BenchWorkOptions& options, const ModelOptions& model,
                                        const AttentionDefaults& defaults) {
  BenchWork work;
  LF_ASSIGN_OR_RETURN(work.config, GeometryConfig(options.geometry));
  if (options.num_tokens > work.config.max_position_embeddings) {
    return absl::InvalidArgumentError(absl::StrCat("--tokens ", options.num_tokens, " is beyond the ",
                                                   work.config.max_position_embeddings, " positions of ",
                                                   options.geometry));
  }
  LF_ASSIGN_OR_RETURN(work.attention, model.patterns_path.empty() ? ReadAttentionSpec(options.attention)
                                                                  : ReadPatterns(model));
  LF_ASSIGN_OR_RETURN(work.coverage, ParseCoverage(options.coverage));
  LF_ASSIGN_OR_RETURN(ResolvedAttention attention,
                      ResolveAttention(work.attention, defaults, options.num_tokens, work.config));
  work.patterns = std::move(attention.patterns);
  if (!options.indices.empty()) {
    absl::StatusOr<RecordedIndices> recorded = RecordedIndices::Load(options.indices);
    absl::Status status = recorded.status();
    if (status.ok()) status = recorded->CheckReplays(work.patterns, options.num_tokens);
    if (!status.ok()) return Annotate(status, "--indices");
    LF_ASSIGN_OR_RETURN(work.replayed, ReplayedIndices::Create(*recorded, work.patterns, work.coverage));
    work.num_recorded_layers = recorded->num_layers();
  }
  std::mt19937_64 random(options.seed);
  std::uniform_int_distribution<int32_t> draw(0, static_cast<int32_t>(work.config.vocab_size) - 1);
  work.token_ids.resize(static_cast<size_t>(options.num_tokens));
  for (int32_t& id : work.token_ids) id = draw(random);
  return work;
}

void AddBenchWorkOptions(CLI::App& app, BenchWorkOptions& options, ModelOptions& model) {
  app.add_option("--geometry", options.geometry, absl::StrCat(GeometryNames(), ", or a config.json"))
      ->type_name("NAME|FILE")
      ->required();
  app.add_option("--tokens", options.num_tokens, "length of the prompt, whose ids are random")
      ->type_name("N")
      ->required()
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 31));
  CLI::Option* patterns =
      app.add_option("--patterns", model.patterns_path, "a pattern file in the published JSON form")
          ->type_name("FILE|DIR");
  app.add_option("--attention", options.attention,
                 "dense (default), a-shape:N_INIT,N_LOCAL, vertical-slash:V,S, block-sparse:K or "
                 "block-share:R,TAU[,S[,C]][,fp8] for all heads")
      ->type_name("SPEC")
      ->excludes(patterns);
  app.add_option("--coverage", options.coverage, "tiles (default) or parity")
      ->type_name("COVERAGE")
      ->check(CLI::IsMember({"parity", "tiles"}));
  app.add_option(
         "--indices", options.indices,
         "recorded selections that attention uses in place of those that are built: each vertical-slash\n"
         "head takes its own budget, layers and heads in turn; of a prompt of N tokens")
      ->type_name("FILE");
  app.add_option("--seed", options.seed, "of weights and token ids (default: 1)")->type_name("S");
}

}  // namespace longfill
