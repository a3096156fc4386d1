#ifndef LONGFILL_TESTS_CONTRACT_ATTENTION_FIXTURE_H_
#define LONGFILL_TESTS_CONTRACT_ATTENTION_FIXTURE_H_

// Runs attention over parts of a prompt, in memory that is laid out to show every stray access.

#include <gtest/gtest.h>

#include <bit>
#include <optional>
#include <utility>

#include "tests/contract/attention_problem.h"
#include "tests/contract/backend_fixture.h"

namespace longfill {

inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Rows of heads with gaps between them, head-major or token-major. Gaps and spare rows hold NaN.
struct Strided {
  Strided(int64_t heads, int64_t rows, int64_t dim, bool token_major, int64_t gap)
      : head_stride(token_major ? dim + gap : rows * (dim + gap) + 2 * gap),
        row_stride(token_major ? heads * (dim + gap) + gap : dim + gap),
        values(static_cast<size_t>(heads * head_stride + rows * row_stride), kNaN) {}
  float* Row(int64_t head, int64_t row) { return values.data() + head * head_stride + row * row_stride; }

  int64_t head_stride, row_stride;
  std::vector<float> values;
};

struct Result {
  std::vector<float> out;  // [num_q_heads, rows, head_dim]
  std::vector<float> lse;  // [num_q_heads, rows]
  int64_t covered = 0, computed = 0;
};

// Part of a prompt: the query rows of a map over a range of keys.
struct Piece {
  PositionMap map = PositionMap::Contiguous(0);
  int64_t rows = 0;
  int64_t key_begin = 0, key_end = 0;
  std::optional<Result> earlier;  // merged with
  bool want_lse = true;
  bool token_major = false;
  int64_t gap = 8;
  int cta_limit = 0;
};

inline Piece Whole(const Prompt& prompt) { return {.rows = prompt.num_tokens, .key_end = prompt.num_tokens}; }

inline std::vector<int64_t> PositionsOf(const Piece& piece) {
  std::vector<int64_t> positions;
  for (int64_t row = 0; row < piece.rows; ++row) positions.push_back(piece.map.Position(row));
  return positions;
}

template <typename T>
::testing::AssertionResult Near(const std::vector<float>& got, const std::vector<T>& want, double tolerance) {
  if (got.size() != want.size()) {
    return ::testing::AssertionFailure() << "sizes " << got.size() << " and " << want.size();
  }
  size_t worst = 0;
  double worst_error = -1;
  for (size_t i = 0; i < got.size(); ++i) {
    if (double{got[i]} == double{want[i]}) continue;
    double error = std::abs(double{got[i]} - double{want[i]});
    if (std::isnan(error)) error = std::numeric_limits<double>::infinity();
    if (error > worst_error) {
      worst_error = error;
      worst = i;
    }
  }
  if (worst_error <= tolerance) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure()
         << "at " << worst << " of " << got.size() << ": " << got[worst] << " instead of " << want[worst]
         << ", error " << worst_error << " above " << tolerance;
}

inline ::testing::AssertionResult SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) {
    return ::testing::AssertionFailure() << "sizes " << a.size() << " and " << b.size();
  }
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::bit_cast<uint32_t>(a[i]) != std::bit_cast<uint32_t>(b[i])) {
      return ::testing::AssertionFailure() << "at " << i << ": " << a[i] << " and " << b[i];
    }
  }
  return ::testing::AssertionSuccess();
}

class AttentionTest : public BackendTest {
 protected:
  // kv_head empty: heads divide evenly.
  Prompt NewPrompt(int64_t n, int64_t num_kv_heads, int64_t dim, std::vector<Head> heads, uint32_t seed,
                   std::vector<int32_t> kv_head = {}) {
    Prompt prompt;
    prompt.num_tokens = n;
    prompt.num_q_heads = static_cast<int64_t>(heads.size());
    prompt.num_kv_heads = num_kv_heads;
    prompt.head_dim = dim;
    prompt.heads = std::move(heads);
    prompt.kv_head = std::move(kv_head);
    for (int64_t head = 0; prompt.kv_head.size() < prompt.heads.size(); ++head) {
      prompt.kv_head.push_back(static_cast<int32_t>(head / (prompt.num_q_heads / num_kv_heads)));
    }
    prompt.q = Rounded(NormalFloats(prompt.num_q_heads * n * dim, seed));
    prompt.k = Rounded(NormalFloats(num_kv_heads * n * dim, seed + 1));
    prompt.v = Rounded(NormalFloats(num_kv_heads * n * dim, seed + 2));
    prompt.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(dim)));
    return prompt;
  }

  std::vector<IndexView> UploadHeads(const std::vector<Head>& heads) {
    std::vector<SparseIndex> indices;
    for (const Head& head : heads) indices.push_back(head.index);
    std::vector<IndexView> views = UploadIndices(indices);
    for (size_t i = 0; i < heads.size(); ++i) {
      if (heads[i].padded_row_length == 0) continue;
      // Rows of the same length; what a short row does not use is no block.
      const auto& list = std::get<BlockListIndex>(heads[i].index);
      const size_t row_length = static_cast<size_t>(heads[i].padded_row_length);
      std::vector<int32_t> padded((list.row_offsets.size() - 1) * row_length, 1 << 24);
      for (size_t m = 0; m + 1 < list.row_offsets.size(); ++m) {
        std::copy(list.key_blocks.begin() + list.row_offsets[m],
                  list.key_blocks.begin() + list.row_offsets[m + 1], padded.begin() + m * row_length);
      }
      lists_.push_back(Upload(padded));
      views[i].row_offsets = nullptr;
      views[i].key_blocks = lists_.back().as<int32_t>();
      views[i].row_length = heads[i].padded_row_length;
    }
    return views;
  }

  AttentionParams ParamsOf(const Prompt& prompt) {
    AttentionParams params;
    params.num_q_heads = prompt.num_q_heads;
    params.num_kv_heads = prompt.num_kv_heads;
    params.kv_head = prompt.kv_head;
    params.head_dim = prompt.head_dim;
    params.scale = prompt.scale;
    return params;
  }

  absl::Status Attention(const AttentionParams& params) {
    AttentionBounds bounds{.num_sequences = static_cast<int64_t>(params.sequences.size()),
                           .num_q_heads = params.num_q_heads,
                           .head_dim = params.head_dim};
    for (const AttentionSequence& sequence : params.sequences) {
      bounds.num_q_rows += sequence.q_end - sequence.q_begin;
    }
    return kernels().Attention(params, NewWorkspace(kernels().AttentionWorkspaceBytes(bounds)), stream());
  }

  // Rows before and after those of the piece hold NaN, as do keys outside of its range; so do gaps, which
  // must stay what they are.
  Result Run(const Prompt& prompt, const Piece& piece) {
    constexpr int64_t kRowsBefore = 2;
    constexpr int64_t kKeysBefore = 3;
    const int64_t dim = prompt.head_dim;
    const int64_t spare_rows = piece.rows + 2 * kRowsBefore;
    Strided q(prompt.num_q_heads, spare_rows, dim, piece.token_major, piece.gap);
    Strided out(prompt.num_q_heads, spare_rows, dim, piece.token_major, 2 * piece.gap);
    std::vector<float> lse(static_cast<size_t>(prompt.num_q_heads * spare_rows), kNaN);
    for (int64_t head = 0; head < prompt.num_q_heads; ++head) {
      for (int64_t row = 0; row < piece.rows; ++row) {
        std::copy_n(prompt.q.data() + (head * prompt.num_tokens + piece.map.Position(row)) * dim, dim,
                    q.Row(head, kRowsBefore + row));
        if (!piece.earlier) continue;
        const int64_t at = head * piece.rows + row;
        std::copy_n(piece.earlier->out.data() + at * dim, dim, out.Row(head, kRowsBefore + row));
        lse[head * spare_rows + kRowsBefore + row] = piece.earlier->lse[at];
      }
    }
    // The keys given start before the range; those given start at row kKeysBefore.
    const int64_t key_first = std::max<int64_t>(0, piece.key_begin - 2);
    const int64_t num_keys = piece.key_end + 1 - key_first;
    Strided k(prompt.num_kv_heads, kKeysBefore + num_keys + 2, dim, piece.token_major, piece.gap);
    Strided v(prompt.num_kv_heads, kKeysBefore + num_keys + 2, dim, piece.token_major, 3 * piece.gap);
    for (int64_t head = 0; head < prompt.num_kv_heads; ++head) {
      for (int64_t key = piece.key_begin; key < piece.key_end; ++key) {
        const int64_t from = (head * prompt.num_tokens + key) * dim;
        std::copy_n(prompt.k.data() + from, dim, k.Row(head, kKeysBefore + key - key_first));
        std::copy_n(prompt.v.data() + from, dim, v.Row(head, kKeysBefore + key - key_first));
      }
    }

    const Buffer q_memory = UploadCompute(q.values), k_memory = UploadCompute(k.values);
    const Buffer v_memory = UploadCompute(v.values), out_memory = UploadCompute(out.values);
    const Buffer lse_memory = Upload(lse);
    const Buffer pairs = Upload(std::vector<int64_t>{1000, 2000});  // counts are added to what is there
    const std::vector<IndexView> indices = UploadHeads(prompt.heads);
    const AttentionSequence sequence{.q_begin = kRowsBefore,
                                     .q_end = kRowsBefore + piece.rows,
                                     .k_begin = kKeysBefore,
                                     .k_end = kKeysBefore + num_keys,
                                     .key_first = key_first,
                                     .q_positions = piece.map,
                                     .num_tokens = prompt.num_tokens,
                                     .key_range_begin = piece.key_begin,
                                     .key_range_end = piece.key_end,
                                     .indices = indices};
    AttentionParams params = ParamsOf(prompt);
    params.q = {q_memory.data(), q.head_stride, q.row_stride};
    params.k = {k_memory.data(), k.head_stride, k.row_stride};
    params.v = {v_memory.data(), v.head_stride, v.row_stride};
    params.out = {out_memory.data(), out.head_stride, out.row_stride};
    params.lse = piece.want_lse ? lse_memory.as<float>() : nullptr;
    params.lse_head_stride = spare_rows;
    params.merge = piece.earlier.has_value();
    params.sequences = {&sequence, 1};
    params.cta_limit = piece.cta_limit;
    params.covered_pairs = pairs.as<int64_t>();
    params.computed_pairs = pairs.as<int64_t>() + 1;
    LF_EXPECT_OK(Attention(params));

    Result result;
    out.values = DownloadCompute(out_memory.data(), static_cast<int64_t>(out.values.size()));
    lse = Download<float>(lse_memory.data(), static_cast<int64_t>(lse.size()));
    for (int64_t head = 0; head < prompt.num_q_heads; ++head) {
      for (int64_t row = kRowsBefore; row < kRowsBefore + piece.rows; ++row) {
        result.out.insert(result.out.end(), out.Row(head, row), out.Row(head, row) + dim);
        std::fill_n(out.Row(head, row), dim, kNaN);
        result.lse.push_back(std::exchange(lse[head * spare_rows + row], kNaN));
      }
    }
    const auto is_nan = [](float value) { return std::isnan(value); };
    EXPECT_TRUE(std::all_of(out.values.begin(), out.values.end(), is_nan)) << "out was written elsewhere";
    EXPECT_TRUE(std::all_of(lse.begin(), lse.end(), is_nan)) << "lse was written elsewhere";
    const std::vector<int64_t> counts = Download<int64_t>(pairs.data(), 2);
    result.covered = counts[0] - 1000;
    result.computed = counts[1] - 2000;
    return result;
  }

  Expected Expect(const Prompt& prompt, const Piece& piece, const std::vector<int64_t>& positions) {
    return ExpectedOf(prompt, positions, piece.key_begin, piece.key_end,
                      [this](const std::vector<float>& values) { return Rounded(values); });
  }

  void ExpectRight(const Prompt& prompt, const Piece& piece) {
    const Result got = Run(prompt, piece);
    const Expected expected = Expect(prompt, piece, PositionsOf(piece));
    EXPECT_TRUE(Near(got.out, expected.want.out, expected.tolerance));
    EXPECT_TRUE(Near(got.lse, expected.want.lse, expected.lse_tolerance));
    EXPECT_EQ(got.covered, expected.covered_pairs);
    EXPECT_GE(got.computed, got.covered);
  }

 private:
  std::vector<Buffer> lists_;
};

}  // namespace longfill

#endif  // LONGFILL_TESTS_CONTRACT_ATTENTION_FIXTURE_H_
