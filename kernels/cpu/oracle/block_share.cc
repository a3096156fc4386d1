#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/cpu/oracle/oracle.h"

namespace longfill::oracle {
namespace {

constexpr int64_t kBlock = 64;

double Dot(const float* q, const auto* key, int64_t head_dim) {
  double product = 0;
  for (int64_t i = 0; i < head_dim; ++i) product += q[i] * static_cast<double>(key[i]);
  return product;
}

// What stands for the key blocks of a head.
struct Representatives {
  const std::vector<double>& rows;  // [count, whole blocks, head_dim]
  int64_t count = 0;
  int64_t num_samples = 0;
  int64_t num_whole_blocks = 0;
};

// Of row `row` of a head, over the blocks before its own. k is read only if there are samples.
std::vector<double> RowShares(const float* q, const float* k, int64_t row, int64_t head_dim,
                              const Representatives& representatives, double scale) {
  const int64_t num_blocks = row / kBlock;
  std::vector<double> shares(num_blocks, -std::numeric_limits<double>::infinity());
  for (int64_t b = 0; b < num_blocks; ++b) {
    for (int64_t r = 0; r < representatives.count; ++r) {
      const double* key = representatives.rows.data() + (r * representatives.num_whole_blocks + b) * head_dim;
      double score = scale * Dot(q + row * head_dim, key, head_dim);
      if (r < representatives.num_samples) {
        score += std::log(static_cast<double>(kBlock) / static_cast<double>(representatives.num_samples));
      }
      shares[b] = std::max(shares[b], score);
    }
  }
  std::vector<double> others;  // in the softmax
  for (int64_t key = num_blocks * kBlock; representatives.num_samples > 0 && key <= row; ++key) {
    others.push_back(scale * Dot(q + row * head_dim, k + key * head_dim, head_dim));
  }
  double highest = -std::numeric_limits<double>::infinity();
  for (const double score : shares) highest = std::max(highest, score);
  for (const double score : others) highest = std::max(highest, score);
  double sum = 0;
  for (double& share : shares) sum += share = std::exp(share - highest);
  for (const double score : others) sum += std::exp(score - highest);
  for (double& share : shares) share /= sum;
  return shares;
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

ShareSelection SelectByShare(const float* q, const float* k, int64_t num_tokens, int64_t head_dim,
                             const std::vector<double>& representatives, int64_t num_representatives,
                             int64_t num_samples, double scale, double min_share) {
  const Representatives all = {representatives, num_representatives, num_samples, num_tokens / kBlock};
  ShareSelection result;
  for (int64_t m = 0; m * kBlock < num_tokens; ++m) {
    std::vector<double> largest(m, 0);
    for (int64_t row = m * kBlock; row < std::min(num_tokens, (m + 1) * kBlock); ++row) {
      const std::vector<double> shares = RowShares(q, k, row, head_dim, all, scale);
      for (int64_t b = 0; b < m; ++b) largest[b] = std::max(largest[b], shares[b]);
    }
    std::vector<int32_t> blocks;
    for (int64_t b = 0; b <= m; ++b) {
      if (b == 0 || m - b < 4 || largest[b] >= min_share) blocks.push_back(static_cast<int32_t>(b));
    }
    result.shares.push_back(std::move(largest));
    result.blocks.push_back(std::move(blocks));
  }
  return result;
}

ShareSelection SelectByShare(const float* q, const float* k, int64_t num_tokens, int64_t head_dim,
                             double scale, const BlockShare& pattern) {
  const RepresentativeChoice choice = ChooseRepresentatives(k, num_tokens, head_dim, pattern.outliers);
  std::vector<double> representatives;
  if (pattern.samples == 0) representatives = choice.means;
  for (int64_t i = 0; i < pattern.samples; ++i) {
    for (int64_t b = 0; b < num_tokens / kBlock; ++b) {
      const int64_t step = kBlock / pattern.samples;
      const float* key = k + (b * kBlock + i * step + step / 2) * head_dim;
      representatives.insert(representatives.end(), key, key + head_dim);
    }
  }
  for (int64_t r = 0; r < pattern.outliers; ++r) {
    for (const std::vector<int32_t>& keys : choice.outliers) {
      const float* key = k + keys[r] * head_dim;
      representatives.insert(representatives.end(), key, key + head_dim);
    }
  }
  return SelectByShare(q, k, num_tokens, head_dim, representatives,
                       NumRepresentatives(pattern.samples, pattern.outliers), pattern.samples, scale,
                       pattern.min_share);
}

}  // namespace longfill::oracle
