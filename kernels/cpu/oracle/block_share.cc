#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/cpu/oracle/oracle.h"

namespace longfill::oracle {
namespace {

constexpr int64_t kBlock = 64;

// Of one row, over the blocks before its own.
std::vector<double> RowShares(const float* q, int64_t num_blocks, int64_t head_dim,
                              const std::vector<double>& representatives, int64_t num_representatives,
                              int64_t num_whole_blocks, double scale) {
  std::vector<double> shares(num_blocks, -std::numeric_limits<double>::infinity());
  for (int64_t b = 0; b < num_blocks; ++b) {
    for (int64_t r = 0; r < num_representatives; ++r) {
      double product = 0;
      for (int64_t i = 0; i < head_dim; ++i) {
        product += q[i] * representatives[(r * num_whole_blocks + b) * head_dim + i];
      }
      shares[b] = std::max(shares[b], scale * product);
    }
  }
  if (num_blocks == 0) return shares;
  const double highest = *std::max_element(shares.begin(), shares.end());
  double sum = 0;
  for (double& share : shares) sum += share = std::exp(share - highest);
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

ShareSelection SelectByShare(const float* q, int64_t num_tokens, int64_t head_dim,
                             const std::vector<double>& representatives, int64_t num_representatives,
                             double scale, double min_share) {
  ShareSelection result;
  for (int64_t m = 0; m * kBlock < num_tokens; ++m) {
    std::vector<double> largest(m, 0);
    for (int64_t row = m * kBlock; row < std::min(num_tokens, (m + 1) * kBlock); ++row) {
      const std::vector<double> shares = RowShares(q + row * head_dim, m, head_dim, representatives,
                                                   num_representatives, num_tokens / kBlock, scale);
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
  std::vector<double> representatives = choice.means;
  for (int64_t r = 0; r < pattern.outliers; ++r) {
    for (const std::vector<int32_t>& keys : choice.outliers) {
      const float* key = k + keys[r] * head_dim;
      representatives.insert(representatives.end(), key, key + head_dim);
    }
  }
  return SelectByShare(q, num_tokens, head_dim, representatives, pattern.outliers + 1, scale,
                       pattern.min_share);
}

}  // namespace longfill::oracle
