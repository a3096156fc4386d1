#include "kernels/sparse/head_pattern.h"

#include <algorithm>
#include <charconv>
#include <limits>
#include <span>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "kernels/sparse/share_check.h"

namespace longfill {
namespace {

constexpr std::string_view kForms =
    "expected dense, a-shape:N_INIT,N_LOCAL, vertical-slash:V,S, block-sparse:K or "
    "block-share:R,TAU[,S[,C]][,fp8]";

constexpr std::string_view kFp8 = ",fp8";

// Positions are int32 everywhere, so no budget can mean more.
constexpr int64_t kMaxBudget = std::numeric_limits<int32_t>::max();

// What a message may repeat of text that anybody could have sent.
std::string Quoted(std::string_view text) {
  constexpr size_t kShown = 80;
  const std::string_view shown = text.substr(0, kShown);
  return absl::StrCat("'", absl::CHexEscape(absl::string_view(shown.data(), shown.size())),
                      shown.size() < text.size() ? "...'" : "'");
}

absl::Status CheckBudget(const char* pattern, const char* field, int64_t value, int64_t min,
                         int64_t max = kMaxBudget) {
  if (value >= min && value <= max) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(pattern, ": ", field, " ", value, " is not in [", min, ", ", max, "]"));
}

// The shortest decimal form that reads back as the same number.
std::string ShortestDecimal(double value) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof(text), value).ptr};
}

struct PatternCheck {
  absl::Status operator()(const Dense&) const { return absl::OkStatus(); }
  absl::Status operator()(const AShape& p) const {
    LF_RETURN_IF_ERROR(CheckBudget("a-shape", "n_init", p.n_init, 0));
    return CheckBudget("a-shape", "n_local", p.n_local, 1);
  }
  absl::Status operator()(const VerticalSlash& p) const {
    LF_RETURN_IF_ERROR(CheckBudget("vertical-slash", "vertical", p.vertical, 0));
    LF_RETURN_IF_ERROR(CheckBudget("vertical-slash", "slash", p.slash, 0));
    if (p.vertical + p.slash >= 1) return absl::OkStatus();
    return absl::InvalidArgumentError("vertical-slash: vertical 0 and slash 0 select nothing");
  }
  absl::Status operator()(const BlockSparse& p) const {
    return CheckBudget("block-sparse", "num_blocks", p.num_blocks, 1);
  }
  absl::Status operator()(const BlockShare& p) const {
    LF_RETURN_IF_ERROR(CheckRepresentatives("block-share: ", p.samples, p.outliers));
    LF_RETURN_IF_ERROR(CheckCoarse("block-share: ", p.coarse, p.samples));
    if (p.min_share >= kLeastShare && p.min_share <= 1) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("block-share: min_share ", ShortestDecimal(p.min_share),
                                                   " is not in [", ShortestDecimal(kLeastShare), ", 1]"));
  }
};

// Exactly values.size() decimal integers separated by single commas, nothing around them.
bool ParseIntegers(std::string_view text, std::span<int64_t> values) {
  const char* at = text.data();
  const char* const end = text.data() + text.size();
  for (size_t i = 0; i < values.size(); ++i) {
    if (i > 0 && (at == end || *at++ != ',')) return false;
    const auto [after, error] = std::from_chars(at, end, values[i]);
    if (error != std::errc()) return false;
    at = after;
  }
  return at == end;
}

// Such a number and nothing around it.
bool ParseDecimal(std::string_view text, double* value) {
  const auto [after, error] = std::from_chars(text.data(), text.data() + text.size(), *value);
  return error == std::errc() && after == text.data() + text.size();
}

// "R,TAU", "R,TAU,S" or "R,TAU,S,C", each also with ",fp8" behind it. A 0 at the end of the numbers is not
// written, so that a pattern has one form.
bool ParseBlockShare(std::string_view text, BlockShare* pattern) {
  pattern->fp8 = text.ends_with(kFp8);
  if (pattern->fp8) text.remove_suffix(kFp8.size());
  const size_t comma = text.find(',');
  if (comma == std::string_view::npos ||
      !ParseIntegers(text.substr(0, comma), std::span(&pattern->outliers, 1))) {
    return false;
  }
  text.remove_prefix(comma + 1);
  const size_t second = text.find(',');
  if (!ParseDecimal(text.substr(0, second), &pattern->min_share)) return false;
  if (second == std::string_view::npos) return true;
  text.remove_prefix(second + 1);
  int64_t counts[2] = {0, 0};
  const size_t given = text.find(',') == std::string_view::npos ? 1 : 2;
  if (!ParseIntegers(text, std::span(counts).first(given)) || counts[given - 1] == 0) return false;
  pattern->samples = counts[0];
  pattern->coarse = counts[1];
  return true;
}

}  // namespace

absl::Status Validate(const HeadPattern& pattern) { return std::visit(PatternCheck(), pattern); }

HeadPattern BoundByWindow(const HeadPattern& pattern, int64_t window, int64_t num_tokens) {
  if (window == 0 || window >= num_tokens) return pattern;
  const auto* a_shape = std::get_if<AShape>(&pattern);
  if (a_shape != nullptr && a_shape->n_init == 0) return AShape{0, std::min(a_shape->n_local, window)};
  return AShape{0, window};
}

absl::StatusOr<HeadPattern> ParseHeadPattern(std::string_view text) {
  const size_t colon = text.find(':');
  const std::string_view name = text.substr(0, colon);
  const std::string_view numbers =
      colon == std::string_view::npos ? std::string_view() : text.substr(colon + 1);
  int64_t value[2] = {0, 0};
  BlockShare block_share;
  HeadPattern pattern;
  if (text == "dense") {
    pattern = Dense();
  } else if (name == "a-shape" && ParseIntegers(numbers, value)) {
    pattern = AShape{value[0], value[1]};
  } else if (name == "vertical-slash" && ParseIntegers(numbers, value)) {
    pattern = VerticalSlash{value[0], value[1]};
  } else if (name == "block-sparse" && ParseIntegers(numbers, std::span(value, 1))) {
    pattern = BlockSparse{value[0]};
  } else if (name == "block-share" && ParseBlockShare(numbers, &block_share)) {
    pattern = block_share;
  } else {
    return absl::InvalidArgumentError(absl::StrCat("attention pattern ", Quoted(text), ": ",
                                                   absl::string_view(kForms.data(), kForms.size())));
  }
  LF_RETURN_IF_ERROR(Annotate(Validate(pattern), "attention pattern " + Quoted(text)));
  return pattern;
}

std::string ToString(const HeadPattern& pattern) {
  struct Writer {
    std::string operator()(const Dense&) const { return "dense"; }
    std::string operator()(const AShape& p) const {
      return absl::StrCat("a-shape:", p.n_init, ",", p.n_local);
    }
    std::string operator()(const VerticalSlash& p) const {
      return absl::StrCat("vertical-slash:", p.vertical, ",", p.slash);
    }
    std::string operator()(const BlockSparse& p) const { return absl::StrCat("block-sparse:", p.num_blocks); }
    std::string operator()(const BlockShare& p) const {
      std::string text = absl::StrCat("block-share:", p.outliers, ",", ShortestDecimal(p.min_share));
      if (p.samples != 0 || p.coarse != 0) absl::StrAppend(&text, ",", p.samples);
      if (p.coarse != 0) absl::StrAppend(&text, ",", p.coarse);
      if (p.fp8) text += kFp8;
      return text;
    }
  };
  return std::visit(Writer(), pattern);
}

absl::StatusOr<Coverage> ParseCoverage(std::string_view text) {
  if (text == "tiles") return Coverage::kTiles;
  if (text == "parity") return Coverage::kParity;
  return absl::InvalidArgumentError(absl::StrCat("coverage ", Quoted(text), ": expected tiles or parity"));
}

std::string_view CoverageName(Coverage coverage) { return coverage == Coverage::kTiles ? "tiles" : "parity"; }

}  // namespace longfill
