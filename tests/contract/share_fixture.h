#ifndef LONGFILL_TESTS_CONTRACT_SHARE_FIXTURE_H_
#define LONGFILL_TESTS_CONTRACT_SHARE_FIXTURE_H_

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "kernels/cpu/oracle/oracle.h"
#include "tests/contract/backend_fixture.h"

namespace longfill {

inline bool IsSet(const std::vector<uint64_t>& bits, int64_t n) {
  return (bits[n / 64] >> (n % 64) & 1) != 0;
}

// Selection by share (head_pattern.h, BlockShare) on a backend: what stands for key blocks, and the bits.
class ShareFixture : public BackendTest {
 protected:
  // [heads, NumRepresentatives(samples, outliers), keys / 64, dim]
  Buffer Represent(const std::vector<float>& k, int64_t heads, int64_t keys, int64_t dim, int64_t outliers,
                   int64_t samples = 0) {
    const Buffer on_backend = UploadCompute(k);
    Buffer out = ComputeArray(heads * NumRepresentatives(samples, outliers) * (keys / kRowBlock) * dim);
    RepresentativesParams params;
    params.k = {on_backend.data(), keys * dim, dim};
    params.num_heads = heads;
    params.num_keys = keys;
    params.head_dim = dim;
    params.num_outliers = outliers;
    params.num_samples = samples;
    params.out = out.data();
    LF_EXPECT_OK(kernels().Representatives(params, stream()));
    LF_EXPECT_OK(stream().Sync());
    return out;
  }

  // Of one KV head: [NumRepresentatives(num_samples, num_coarse), num_key_blocks / kCoarseBlocks, dim].
  Buffer RepresentCoarse(const Buffer& representatives, int64_t num_representatives, int64_t num_key_blocks,
                         int64_t dim, int64_t num_coarse, int64_t num_samples = 0) {
    Buffer out =
        ComputeArray(NumRepresentatives(num_samples, num_coarse) * (num_key_blocks / kCoarseBlocks) * dim);
    CoarseRepresentativesParams params;
    params.representatives = representatives.data();
    params.num_representatives = num_representatives;
    params.num_samples = num_samples;
    params.num_key_blocks = num_key_blocks;
    params.head_dim = dim;
    params.num_coarse = num_coarse;
    params.out = out.data();
    LF_EXPECT_OK(kernels().CoarseRepresentatives(params, stream()));
    LF_EXPECT_OK(stream().Sync());
    return out;
  }

  struct Case {
    int64_t rows = 0;
    PositionMap positions = PositionMap::Contiguous(0);
    int64_t dim = 64;
    int64_t num_representatives = 1;
    int64_t num_key_blocks = 0;
    float scale = 1;
    std::vector<float> min_share;  // of each head
    int64_t num_samples = 0;
    std::vector<float> own_k = {};   // [rows, own_k_row_stride], where there are samples
    int64_t own_k_row_stride = 0;    // 0: dim
    const Buffer* coarse = nullptr;  // where there are two levels
    int64_t num_coarse = 0;
    bool fp8 = false;
  };
  // [heads][row blocks][words]; q [heads, rows, dim]
  using Bits = std::vector<std::vector<std::vector<uint64_t>>>;
  Bits Select(const std::vector<float>& q, const Buffer& representatives, const Case& c) {
    const Buffer on_backend = UploadCompute(q);
    const Buffer own_k = UploadCompute(c.own_k);
    const auto heads = std::ssize(c.min_share);
    const int64_t row_blocks = RowBlocksOf(c.rows);
    const int64_t words = c.num_key_blocks / 64 + 2;  // more than needed
    const Buffer bits = Bytes(heads * row_blocks * words * 8);
    ShareSelectionParams params;
    params.q = {on_backend.data(), c.rows * c.dim, c.dim};
    params.num_heads = heads;
    params.num_rows = c.rows;
    params.positions = c.positions;
    params.representatives = representatives.data();
    params.num_representatives = c.num_representatives;
    params.num_samples = c.num_samples;
    params.own_k = own_k.data();
    params.own_k_row_stride = c.own_k_row_stride == 0 ? c.dim : c.own_k_row_stride;
    params.num_key_blocks = c.num_key_blocks;
    params.coarse = c.coarse == nullptr ? nullptr : c.coarse->data();
    params.num_coarse = c.num_coarse;
    params.fp8 = c.fp8;
    params.head_dim = c.dim;
    params.scale = c.scale;
    params.min_share = c.min_share;
    params.bits = bits.as<uint64_t>();
    params.words_per_row = words;
    const Workspace workspace = NewWorkspace(kernels().ShareSelectionWorkspaceBytes(BoundsOf(params)));
    LF_EXPECT_OK(kernels().SelectByShare(params, workspace, stream()));
    const std::vector<uint64_t> flat = Download<uint64_t>(bits.data(), heads * row_blocks * words);
    Bits result(static_cast<size_t>(heads));
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t m = 0; m < row_blocks; ++m) {
        const auto from = flat.begin() + (h * row_blocks + m) * words;
        result[h].emplace_back(from, from + words);
      }
    }
    return result;
  }

  // What represents blocks, and in which precision.
  struct Kind {
    int64_t outliers = 0, samples = 0, coarse = 0;
    bool fp8 = false;
    int64_t num_representatives() const { return NumRepresentatives(samples, outliers); }
  };
  // Nothing with one level.
  Buffer RepresentCoarse(const Buffer& representatives, const Kind& kind, int64_t num_key_blocks,
                         int64_t dim) {
    if (kind.coarse == 0) return {};
    return RepresentCoarse(representatives, kind.num_representatives(), num_key_blocks, dim, kind.coarse,
                           kind.samples);
  }
  // Blocks that shares decide, beyond rounding.
  struct Decisions {
    int64_t kept = 0, dropped = 0;
    int64_t closed = 0;  // dropped as well, whatever their shares would be
  };
  // Four query heads of one KV head.
  void CompareWithOracle(int64_t tokens, int64_t dim, int64_t samples, Decisions* decisions,
                         bool fp8 = false) {
    const int64_t outliers = tokens % 3 == 0 || samples == 16 ? 0 : tokens % 3 == 1 ? 4 : 7;
    const std::vector<float> min_share = {0.02F, 0.1F, 0.3F, 1.0F};
    const std::vector<float> q = Rounded(NormalFloats(std::ssize(min_share) * tokens * dim, 22));
    const std::vector<float> k = Rounded(NormalFloats(tokens * dim, 23));
    const float scale = 2.5F / std::sqrt(static_cast<float>(dim));  // some rows lean on few blocks
    CompareWithOracle(q, k, tokens, dim, {.outliers = outliers, .samples = samples, .fp8 = fp8}, scale,
                      min_share, decisions);
  }
  // [heads, tokens, dim]: the rows of a row block want much the same, so that coarse blocks stay closed.
  std::vector<float> AgreeingQueries(int64_t heads, int64_t tokens, int64_t dim, uint32_t seed) {
    std::vector<float> q = NormalFloats(heads * tokens * dim, seed, 0.2F);
    const std::vector<float> wanted = NormalFloats(heads * RowBlocksOf(tokens) * dim, seed + 1);
    for (int64_t i = 0; i < std::ssize(q); ++i) {
      const int64_t head = i / (tokens * dim), row = i / dim % tokens;
      q[i] += wanted[(head * RowBlocksOf(tokens) + row / kRowBlock) * dim + i % dim];
    }
    return q;
  }
  void CompareTwoLevelsWithOracle(int64_t tokens, int64_t dim, const Kind& kind, Decisions* decisions) {
    const std::vector<float> min_share = {0.02F, 0.1F, 0.3F, 1.0F};
    const std::vector<float> q = Rounded(AgreeingQueries(std::ssize(min_share), tokens, dim, 60));
    const std::vector<float> k = Rounded(NormalFloats(tokens * dim, 62));
    const float scale = 2.5F / std::sqrt(static_cast<float>(dim));
    CompareWithOracle(q, k, tokens, dim, kind, scale, min_share, decisions);
  }
  // q [heads, tokens, dim] and k [tokens, dim] as the backend rounds them.
  void CompareWithOracle(const std::vector<float>& q, const std::vector<float>& k, int64_t tokens,
                         int64_t dim, const Kind& kind, float scale, const std::vector<float>& min_share,
                         Decisions* decisions) {
    const int64_t num_representatives = kind.num_representatives();
    const auto heads = std::ssize(min_share);
    const int64_t blocks = tokens / kRowBlock;
    const Buffer representatives = Represent(k, 1, tokens, dim, kind.outliers, kind.samples);
    const std::vector<float> planes =
        DownloadCompute(representatives.data(), num_representatives * blocks * dim);
    oracle::Representatives in_fp64 = {.rows = {planes.begin(), planes.end()},
                                       .count = num_representatives,
                                       .num_samples = kind.samples,
                                       .num_coarse = kind.coarse,
                                       .fp8 = kind.fp8};
    const Buffer coarse = RepresentCoarse(representatives, kind, blocks, dim);
    if (kind.coarse > 0) {
      const std::vector<float> rows = DownloadCompute(
          coarse.data(), NumRepresentatives(kind.samples, kind.coarse) * (blocks / kCoarseBlocks) * dim);
      in_fp64.coarse = {rows.begin(), rows.end()};
    }
    const Bits got = Select(q, representatives,
                            {.rows = tokens,
                             .dim = dim,
                             .num_representatives = num_representatives,
                             .num_key_blocks = blocks,
                             .scale = scale,
                             .min_share = min_share,
                             .num_samples = kind.samples,
                             .own_k = k,
                             .coarse = &coarse,
                             .num_coarse = kind.coarse,
                             .fp8 = kind.fp8});
    const double tolerance = Tolerance(kind.fp8);
    for (int64_t h = 0; h < heads; ++h) {
      const auto want = oracle::SelectByShare(q.data() + h * tokens * dim, k.data(), tokens, dim, in_fp64,
                                              scale, min_share[h]);
      const double open_share = kOpenFactor * min_share[h];
      for (int64_t m = 0; m < std::ssize(want.blocks); ++m) {
        const std::vector<double>& coarse_shares = want.coarse_shares[m];
        const bool decided = std::ranges::none_of(coarse_shares, [&](double share) {
          return std::abs(share - open_share) <= open_share * tolerance;  // all sums may differ
        });
        for (int64_t n = 0; n < std::ssize(got[h][m]) * 64; ++n) {
          const bool selected = IsSet(got[h][m], n);
          const std::string where =
              testing::PrintToString(std::vector<int64_t>{tokens, dim, kind.outliers, kind.samples,
                                                          kind.coarse, kind.fp8, h, m, n}) +
              " tokens, dim, outliers, samples, coarse, fp8, head, row, block";
          if (n > m) {
            ASSERT_FALSE(selected) << where;
          } else if (n == 0 || m - n < kForcedNearestBlocks) {
            ASSERT_TRUE(selected) << where;
          } else if (!decided) {
            continue;
          } else if (n / kCoarseBlocks < std::ssize(coarse_shares) &&
                     coarse_shares[n / kCoarseBlocks] < open_share) {
            ASSERT_FALSE(selected) << where << ", coarse share " << coarse_shares[n / kCoarseBlocks];
            ++decisions->closed;
          } else if (want.shares[m][n] > min_share[h] * (1 + tolerance)) {
            ASSERT_TRUE(selected) << where << ", share " << want.shares[m][n];
            ++decisions->kept;
          } else if (want.shares[m][n] < min_share[h] * (1 - tolerance)) {
            ASSERT_FALSE(selected) << where << ", share " << want.shares[m][n];
            ++decisions->dropped;
          }
        }
      }
    }
  }

  // How far sums of products may move a share, as a part of it. They are of fp32, but tensor cores of sm_90
  // add products of fp8 with about 13 bits, and an error of a score is one of the logarithm of a share.
  double Tolerance(bool fp8) {
    if (!on_gpu()) return 1e-4;
    return fp8 ? 0.05 : 2e-3;
  }
};

}  // namespace longfill

#endif  // LONGFILL_TESTS_CONTRACT_SHARE_FIXTURE_H_
