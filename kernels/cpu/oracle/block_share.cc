#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/cpu/oracle/oracle.h"

namespace longfill::oracle {
namespace {

constexpr int64_t kBlock = 64;
constexpr int64_t kCoarse = 8;  // key blocks of a coarse block
constexpr double kInfinity = std::numeric_limits<double>::infinity();

double Dot(const double* q, const double* key, int64_t head_dim) {
  double product = 0;
  for (int64_t i = 0; i < head_dim; ++i) product += q[i] * key[i];
  return product;
}

// Of what can be written with 4 bits of exponent, whose least is -6, and 3 of fraction, the nearest; of two
// the even one. |x| is below 256, so that it does not matter where E4M3 ends.
double NearestE4m3(double x) {
  const int exponent = x == 0 ? -6 : std::max(-6, std::ilogb(x));
  const double spacing = std::ldexp(1.0, exponent - 3);
  return std::nearbyint(x / spacing) * spacing;
}

// All values together, after a power of two, up to 2^47, that brings the largest magnitude to [128, 256).
void RoundToE4m3(const std::vector<double*>& values) {
  double largest = 0;
  for (const double* value : values) largest = std::max(largest, std::abs(*value));
  if (largest == 0) return;
  const double power = std::ldexp(1.0, std::min(47, 7 - std::ilogb(largest)));
  for (double* value : values) *value = NearestE4m3(*value * power) / power;
}

// In each block of rows [count, num_blocks, head_dim].
void RoundBlocksToE4m3(int64_t count, int64_t num_blocks, int64_t head_dim, std::vector<double>* rows) {
  for (int64_t b = 0; b < num_blocks; ++b) {
    std::vector<double*> values;
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < head_dim; ++i) values.push_back(&(*rows)[(r * num_blocks + b) * head_dim + i]);
    }
    RoundToE4m3(values);
  }
}

// In each piece of so many elements, the last of which may be shorter.
void RoundPiecesToE4m3(int64_t piece, std::vector<double>* x) {
  for (int64_t begin = 0; begin < std::ssize(*x); begin += piece) {
    std::vector<double*> values;
    for (int64_t i = begin; i < std::min(begin + piece, std::ssize(*x)); ++i) values.push_back(&(*x)[i]);
    RoundToE4m3(values);
  }
}

// Of one query for the first `num_scored` of `num_blocks` blocks of `keys` keys, each the largest product
// with its representatives [count, num_blocks, head_dim], of which the first num_samples are samples.
std::vector<double> Scores(const double* q, const std::vector<double>& representatives, int64_t count,
                           int64_t num_samples, int64_t num_blocks, int64_t keys, int64_t num_scored,
                           int64_t head_dim, double scale) {
  std::vector<double> scores(num_scored, -kInfinity);
  for (int64_t b = 0; b < num_scored; ++b) {
    for (int64_t r = 0; r < count; ++r) {
      double score = scale * Dot(q, representatives.data() + (r * num_blocks + b) * head_dim, head_dim);
      if (r < num_samples) score += std::log(static_cast<double>(keys) / static_cast<double>(num_samples));
      scores[b] = std::max(scores[b], score);
    }
  }
  return scores;
}

// log of the sum of exp(score), -infinity of none.
double LogSum(const std::vector<double>& scores) {
  double highest = -kInfinity;
  for (const double score : scores) highest = std::max(highest, score);
  if (highest == -kInfinity) return highest;
  double sum = 0;
  for (const double score : scores) sum += std::exp(score - highest);
  return highest + std::log(sum);
}

void RaiseTo(const std::vector<double>& values, std::vector<double>* largest) {
  for (size_t i = 0; i < values.size(); ++i) (*largest)[i] = std::max((*largest)[i], values[i]);
}

}  // namespace

RepresentativeChoice ChooseRepresentatives(const float* k, int64_t num_tokens, int64_t head_dim,
                                           int64_t num_outliers) {
  RepresentativeChoice choice;
  for (int64_t b = 0; b < num_tokens / kBlock; ++b) {
    std::vector<double> mean(head_dim, 0);
    for (int64_t key = b * kBlock; key < (b + 1) * kBlock; ++key) {
      for (int64_t i = 0; i < head_dim; ++i) mean[i] += k[key * head_dim + i] / static_cast<double>(kBlock);
    }
    for (int64_t key = b * kBlock; key < (b + 1) * kBlock; ++key) {
      double squares = 0;
      for (int64_t i = 0; i < head_dim; ++i) squares += std::pow(k[key * head_dim + i] - mean[i], 2);
      choice.distances.push_back(std::sqrt(squares));
    }
    std::vector<int32_t> keys(kBlock);
    std::iota(keys.begin(), keys.end(), static_cast<int32_t>(b * kBlock));
    std::stable_sort(keys.begin(), keys.end(),
                     [&](int32_t x, int32_t y) { return choice.distances[x] > choice.distances[y]; });
    keys.resize(num_outliers);
    choice.outliers.push_back(std::move(keys));
    choice.means.insert(choice.means.end(), mean.begin(), mean.end());
  }
  return choice;
}

std::vector<double> ChooseCoarse(const std::vector<double>& rows, int64_t count, int64_t num_samples,
                                 int64_t num_key_blocks, int64_t head_dim, int64_t num_coarse) {
  const int64_t num_blocks = num_key_blocks / kCoarse;
  const int64_t num_planes = std::max<int64_t>(1, num_samples) + num_coarse;
  std::vector<double> coarse(num_planes * num_blocks * head_dim, 0);
  for (int64_t c = 0; c < num_blocks; ++c) {
    const auto row_at = [&](int64_t plane, int64_t block) {
      return rows.data() + (plane * num_key_blocks + c * kCoarse + block) * head_dim;
    };
    std::vector<std::vector<double>> chosen;
    if (num_samples == 0) {
      chosen.emplace_back(head_dim, 0);
      for (int64_t b = 0; b < kCoarse; ++b) {
        for (int64_t i = 0; i < head_dim; ++i) chosen[0][i] += row_at(0, b)[i] / double{kCoarse};
      }
    }
    std::vector<const double*> samples;  // block after block
    for (int64_t b = 0; b < kCoarse; ++b) {
      for (int64_t s = 0; s < num_samples; ++s) samples.push_back(row_at(s, b));
    }
    for (int64_t n = kCoarse / 2; n < std::ssize(samples); n += kCoarse) {
      chosen.emplace_back(samples[n], samples[n] + head_dim);
    }
    while (std::ssize(chosen) < num_planes) {
      const double* farthest = nullptr;
      double longest = -1;
      for (int64_t n = 0; n < count * kCoarse; ++n) {  // plane after plane
        const double* candidate = row_at(n / kCoarse, n % kCoarse);
        double nearest = kInfinity;
        for (const std::vector<double>& before : chosen) {
          double squares = 0;
          for (int64_t i = 0; i < head_dim; ++i) squares += std::pow(candidate[i] - before[i], 2);
          nearest = std::min(nearest, std::sqrt(squares));
        }
        if (nearest > longest) {
          longest = nearest;
          farthest = candidate;
        }
      }
      chosen.emplace_back(farthest, farthest + head_dim);
    }
    for (int64_t plane = 0; plane < num_planes; ++plane) {
      std::copy_n(chosen[plane].begin(), head_dim, coarse.data() + (plane * num_blocks + c) * head_dim);
    }
  }
  return coarse;
}

ShareSelection SelectByShare(const float* q, const float* k, int64_t num_tokens, int64_t head_dim,
                             const Representatives& given, double scale, double min_share) {
  const int64_t whole_blocks = num_tokens / kBlock;
  Representatives all = given;
  std::vector<double> queries(q, q + num_tokens * head_dim), keys;
  if (all.num_samples > 0) keys.assign(k, k + num_tokens * head_dim);
  const int64_t coarse_count = std::max<int64_t>(1, all.num_samples) + all.num_coarse;
  if (all.fp8) {
    RoundPiecesToE4m3(kBlock * head_dim, &queries);
    RoundPiecesToE4m3(kBlock * head_dim, &keys);
    RoundBlocksToE4m3(all.count, whole_blocks, head_dim, &all.rows);
    if (all.num_coarse > 0) {
      RoundBlocksToE4m3(coarse_count, whole_blocks / kCoarse, head_dim, &all.coarse);
    }
  }
  ShareSelection result;
  for (int64_t m = 0; m * kBlock < num_tokens; ++m) {
    const int64_t end_row = std::min(num_tokens, (m + 1) * kBlock);
    const int64_t num_coarse_blocks = all.num_coarse == 0 ? 0 : m / kCoarse;
    std::vector<double> largest_coarse(num_coarse_blocks, 0);
    // With samples, the scores of the row's own block.
    const auto with_own_keys = [&](std::vector<double> scores, int64_t row) {
      for (int64_t key = m * kBlock; all.num_samples > 0 && key <= row; ++key) {
        scores.push_back(scale * Dot(&queries[row * head_dim], &keys[key * head_dim], head_dim));
      }
      return scores;
    };
    std::vector<double> coarse_sums;  // of each row, as logs
    for (int64_t row = m * kBlock; row < end_row; ++row) {
      std::vector<double> shares =
          Scores(&queries[row * head_dim], all.coarse, coarse_count, all.num_samples, whole_blocks / kCoarse,
                 kCoarse * kBlock, num_coarse_blocks, head_dim, scale);
      coarse_sums.push_back(LogSum(with_own_keys(shares, row)));
      for (double& share : shares) share = std::exp(share - coarse_sums.back());
      RaiseTo(shares, &largest_coarse);
    }
    std::vector<double> largest(m, 0);
    for (int64_t row = m * kBlock; row < end_row; ++row) {
      std::vector<double> shares = Scores(&queries[row * head_dim], all.rows, all.count, all.num_samples,
                                          whole_blocks, kBlock, m, head_dim, scale);
      for (int64_t b = 0; b < num_coarse_blocks * kCoarse; ++b) {
        if (largest_coarse[b / kCoarse] < 0.5 * min_share) shares[b] = -kInfinity;
      }
      const double sum = std::max(LogSum(with_own_keys(shares, row)), coarse_sums[row - m * kBlock]);
      for (double& share : shares) share = std::exp(share - sum);
      RaiseTo(shares, &largest);
    }
    std::vector<int32_t> blocks;
    for (int64_t b = 0; b <= m; ++b) {
      if (b == 0 || m - b < 4 || largest[b] >= min_share) blocks.push_back(static_cast<int32_t>(b));
    }
    result.shares.push_back(std::move(largest));
    result.coarse_shares.push_back(std::move(largest_coarse));
    result.blocks.push_back(std::move(blocks));
  }
  return result;
}

ShareSelection SelectByShare(const float* q, const float* k, int64_t num_tokens, int64_t head_dim,
                             double scale, const BlockShare& pattern) {
  const RepresentativeChoice choice = ChooseRepresentatives(k, num_tokens, head_dim, pattern.outliers);
  Representatives all = {.count = NumRepresentatives(pattern.samples, pattern.outliers),
                         .num_samples = pattern.samples,
                         .num_coarse = pattern.coarse,
                         .fp8 = pattern.fp8};
  if (pattern.samples == 0) all.rows = choice.means;
  for (int64_t i = 0; i < pattern.samples; ++i) {
    for (int64_t b = 0; b < num_tokens / kBlock; ++b) {
      const int64_t step = kBlock / pattern.samples;
      const float* key = k + (b * kBlock + i * step + step / 2) * head_dim;
      all.rows.insert(all.rows.end(), key, key + head_dim);
    }
  }
  for (int64_t r = 0; r < pattern.outliers; ++r) {
    for (const std::vector<int32_t>& keys : choice.outliers) {
      const float* key = k + keys[r] * head_dim;
      all.rows.insert(all.rows.end(), key, key + head_dim);
    }
  }
  if (pattern.coarse > 0) {
    all.coarse =
        ChooseCoarse(all.rows, all.count, pattern.samples, num_tokens / kBlock, head_dim, pattern.coarse);
  }
  return SelectByShare(q, k, num_tokens, head_dim, all, scale, pattern.min_share);
}

}  // namespace longfill::oracle
