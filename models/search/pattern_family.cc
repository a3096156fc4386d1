#include "models/search/pattern_family.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <variant>

#include "absl/strings/str_cat.h"

namespace longfill {
namespace {

int64_t Scaled(int64_t budget, double scale, int64_t least) {
  constexpr double kMost = std::numeric_limits<int32_t>::max();
  return std::max(least,
                  static_cast<int64_t>(std::min(std::round(static_cast<double>(budget) * scale), kMost)));
}

struct Scaler {
  double scale;
  HeadPattern operator()(const Dense& base) const { return base; }
  HeadPattern operator()(const AShape& base) const {
    return AShape{Scaled(base.n_init, scale, 0), Scaled(base.n_local, scale, 1)};
  }
  HeadPattern operator()(const VerticalSlash& base) const {
    const int64_t slash = Scaled(base.slash, scale, 0);
    return VerticalSlash{Scaled(base.vertical, scale, slash == 0 ? 1 : 0), slash};
  }
  HeadPattern operator()(const BlockSparse& base) const {
    return BlockSparse{Scaled(base.num_blocks, scale, 1)};
  }
  HeadPattern operator()(const BlockShare& base) const {
    // Four digits: the text form of a pattern file stays short.
    constexpr double kDigits = 1e4;
    const double share = std::round(base.min_share / scale * kDigits) / kDigits;
    BlockShare scaled = base;
    scaled.min_share = std::clamp(share, 1 / kDigits, 1.0);
    return scaled;
  }
};

}  // namespace

HeadPattern ScalePattern(const HeadPattern& base, double scale) {
  LF_CHECK(scale > 0);
  if (scale == 1) return base;
  return std::visit(Scaler{scale}, base);
}

std::vector<HeadPattern> DefaultFamilies() {
  return {VerticalSlash{1000, 6096}, VerticalSlash{3500, 100}, VerticalSlash{500, 700},
          VerticalSlash{30, 800},    AShape{1024, 4096},       BlockSparse{100},
          BlockShare{4, 0.1}};
}

absl::StatusOr<std::vector<HeadPattern>> ParseFamilies(const std::vector<std::string>& specs) {
  std::vector<HeadPattern> families;
  for (const std::string& spec : specs) {
    const absl::StatusOr<HeadPattern> pattern = ParseHeadPattern(spec);
    if (!pattern.ok()) return Annotate(pattern.status(), "candidates");
    if (std::holds_alternative<Dense>(*pattern)) {
      return absl::InvalidArgumentError("candidates: dense need not be given, it is always one of them");
    }
    if (std::find(families.begin(), families.end(), *pattern) != families.end()) {
      return absl::InvalidArgumentError(absl::StrCat("candidates: ", spec, " is given twice"));
    }
    families.push_back(*pattern);
  }
  return families;
}

}  // namespace longfill
