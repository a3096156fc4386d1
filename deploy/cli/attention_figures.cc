#include "deploy/cli/attention_figures.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/sparse/coverage.h"

namespace longfill {
namespace {

using Json = nlohmann::ordered_json;

// Below it the error of a naive computation is chance.
constexpr double kLeastError = 1e-6;

Json CheckJson(const AttentionCheck& check) {
  Json json = {{"passed", check.Passed()},
               {"rows", check.rows},
               {"max_error", check.max_error},
               {"rms_error", check.rms_error()},
               {"naive_max_error", check.naive_max_error},
               {"naive_rms_error", check.naive_rms_error()},
               {"lse_error", check.lse_error},
               {"lse_limit", check.lse_limit},
               {"compared_heads", check.compared_heads},
               {"bit_runs", check.bit_runs},
               {"bits_equal", check.bits_equal},
               {"pairs_equal", check.pairs_equal}};
  if (check.generic_difference) json["generic_difference"] = *check.generic_difference;
  return json;
}

std::string CheckText(const AttentionCheck& check) {
  std::string text = absl::StrFormat(
      "  error         %.2e at most, %.2e rms over %d rows; naive %.2e and %.2e; lse %.1e of %.1e allowed\n",
      check.max_error, check.rms_error(), check.rows, check.naive_max_error, check.naive_rms_error(),
      check.lse_error, check.lse_limit);
  text += absl::StrFormat("  bits          %s over %d runs, %d heads", check.bits_equal ? "equal" : "DIFFER",
                          check.bit_runs, check.compared_heads);
  if (check.generic_difference) {
    text += absl::StrFormat("; generic kernels differ by %.2e of %.2e allowed", *check.generic_difference,
                            check.generic_limit());
  }
  if (!check.pairs_equal) text += "; covered pairs are NOT those of the index";
  absl::StrAppend(&text, "\n  check         ", check.Passed() ? "passed" : "FAILED", "\n");
  return text;
}

}  // namespace

double AttentionCheck::max_limit() const { return std::max(2 * naive_max_error, kLeastError); }
double AttentionCheck::rms_limit() const { return std::max(2 * naive_rms_error(), kLeastError); }

bool AttentionCheck::Passed() const {
  return max_error <= max_limit() && rms_error() <= rms_limit() && lse_error <= lse_limit && bits_equal &&
         pairs_equal && generic_difference.value_or(0) <= generic_limit();
}

double AttentionFigures::Tflops(int64_t pair_count, double seconds) const {
  return seconds > 0 ? 4e-12 * static_cast<double>(head_dim) * static_cast<double>(pair_count) / seconds : 0;
}

Json AttentionFigures::ToJson(double reference_tflops) const {
  const double causal = static_cast<double>(num_heads) * static_cast<double>(CausalPairs(num_tokens));
  const auto pair_figures = [&](int64_t count) {
    return Json{{"pairs", count},
                {"density", static_cast<double>(count) / causal},
                {"tflops", Tflops(count, attention.median)}};
  };
  Json json = {{"name", name},
               {"selections", source},
               {"tokens", num_tokens},
               {"head_dim", head_dim},
               {"heads", num_heads},
               {"calls", num_calls},
               {"q_heads_per_call", num_heads / num_calls},
               {"kv_heads_per_call", num_kv_heads},
               {"attention_seconds", longfill::ToJson(attention)},
               {"sum_seconds", longfill::ToJson(sum)},
               {"published", pair_figures(pairs.published)},
               {"covered", pair_figures(pairs.covered)},
               {"computed", pair_figures(computed_pairs)},
               {"effective_tflops", EffectiveTflops()}};
  if (index_built) json["index_seconds"] = longfill::ToJson(index);
  if (reference_tflops > 0) {
    json["effective_ratio"] = EffectiveTflops() / reference_tflops;
    json["covered_ratio"] = Tflops(pairs.covered, attention.median) / reference_tflops;
    json["computed_ratio"] = Tflops(computed_pairs, attention.median) / reference_tflops;
  }
  if (finish_imbalance) {
    json["finish_imbalance"] = *finish_imbalance;
    json["thread_blocks"] = thread_blocks;
  }
  if (check) json["check"] = CheckJson(*check);
  return json;
}

std::string AttentionFigures::ToText(double reference_tflops) const {
  std::string text = absl::StrFormat("%s, %d tokens, %d query heads of %d in %d calls on %d KV heads, %s\n",
                                     name, num_tokens, num_heads, head_dim, num_calls, num_kv_heads, source);
  if (index_built) absl::StrAppend(&text, "  index    ", longfill::ToText(index), "\n");
  absl::StrAppend(&text, "  attention", longfill::ToText(attention), "\n");
  const double causal = static_cast<double>(num_heads) * static_cast<double>(CausalPairs(num_tokens));
  const auto line = [&](const char* what, int64_t count, double seconds) {
    const double tflops = Tflops(count, seconds);
    text += absl::StrFormat("  %-13s %18d pairs, density %.5f, %8.2f TFLOP/s", what, count,
                            static_cast<double>(count) / causal, tflops);
    if (reference_tflops > 0) text += absl::StrFormat(" = %.3f R", tflops / reference_tflops);
    text += "\n";
  };
  line("published", pairs.published, attention.median);
  line("covered", pairs.covered, attention.median);
  line("computed", computed_pairs, attention.median);
  line("effective", pairs.published, sum.median);
  if (finish_imbalance) {
    text += absl::StrFormat("  ends          latest after the mean by %.2f %% of a call, %d thread blocks\n",
                            100 * *finish_imbalance, thread_blocks);
  }
  if (check) text += CheckText(*check);
  return text;
}

}  // namespace longfill
