#ifndef LONGFILL_PARALLEL_MESH_H_
#define LONGFILL_PARALLEL_MESH_H_

// Who owns which tokens. Pure arithmetic, no communication.
//
// P = sequence * head ranks; rank = s * head + h, so that the ranks of a head group (equal s) are neighbours,
// on one node by default. Tokens are dealt in blocks, there and back over the head groups (0 1 2 2 1 0 0 1
// ...), and in turn over the members of a group:
//   attention       the head group s jointly holds the blocks that it is dealt, one of every `sequence`, and
//                   each member computes some heads for all of them, over K and V of the whole prompt
//   linear layers   of the blocks of its group, rank (s, h) holds number h, h + head, ...
// so causal triangles, columns and diagonals balance in both directions.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/status.h"
#include "kernels/sparse/position_map.h"

namespace longfill {

inline constexpr int64_t kTokenBlock = 128;  // a multiple of the query row block and of the KV page
// That hold `tokens` tokens, the last one maybe in part.
constexpr int64_t TokenBlocksOf(int64_t tokens) { return (tokens + kTokenBlock - 1) / kTokenBlock; }
// Blocks that are dealt: a multiple of kTokenBlock. Rows that lie side by side read the same keys, so that
// attention finds more of them in a GPU's cache the longer the blocks are (4 H200, 1M tokens: on average it
// takes 7.4 % more than on one of them with blocks of 1,024 tokens, 5.1 % with 4,096, 2.8 % with 16,384); and
// every rank has so many of them that what rows there and back differ in is small beside its share (8 ranks,
// 1M tokens: the slowest takes 2.5 % more than the mean with 32 blocks, 3.9 % with 16).
inline constexpr int64_t kMaxDealBlock = 16384;
inline constexpr int64_t kMinDealtBlocks = 32;
// Of the mean that a rank may have more tokens than, if there are blocks for which none has.
inline constexpr double kMaxExcess = 0.01;

struct Mesh {
  int sequence = 1;
  int head = 1;
  int size() const { return sequence * head; }
  friend bool operator==(const Mesh&, const Mesh&) = default;
};

// "sequence=S,head=H" in either order; a part left out is 1. InvalidArgument names what is wrong.
absl::StatusOr<Mesh> ParseMesh(std::string_view text);
std::string ToString(const Mesh& mesh);

struct TokenRange {
  int64_t begin = 0;
  int64_t end = 0;
  friend bool operator==(const TokenRange&, const TokenRange&) = default;
};

// The deal of one prompt of num_tokens over a mesh.
class ShardPlan {
 public:
  // num_tokens >= 0; mesh sizes >= 1. The longest blocks that leave every rank kMinDealtBlocks of them and
  // none kMaxExcess more than the mean; else those of kTokenBlock.
  ShardPlan(Mesh mesh, int64_t num_tokens);
  // With blocks of so many tokens, a multiple of kTokenBlock.
  ShardPlan(Mesh mesh, int64_t num_tokens, int64_t deal_block)
      : mesh_(mesh), num_tokens_(num_tokens), deal_block_(deal_block) {}
  // The same deal of a prompt that ends after its first num_tokens.
  ShardPlan Prefix(int64_t num_tokens) const { return {mesh_, num_tokens, deal_block_}; }

  const Mesh& mesh() const { return mesh_; }
  int64_t num_tokens() const { return num_tokens_; }
  int64_t deal_block() const { return deal_block_; }
  // Dealt blocks that hold so many rows of a rank or a group, the last one maybe in part.
  int64_t DealtBlocks(int64_t rows) const { return (rows + deal_block_ - 1) / deal_block_; }
  int SequenceIndex(int rank) const { return rank / mesh_.head; }
  int HeadIndex(int rank) const { return rank % mesh_.head; }

  friend bool operator==(const ShardPlan&, const ShardPlan&) = default;

  // Linear layers.
  PositionMap TokenPositions(int rank) const;
  int64_t NumTokens(int rank) const;
  int64_t MostTokens() const;                           // of a rank
  std::vector<TokenRange> TokenRanges(int rank) const;  // ascending, neighbours joined
  int RankOfToken(int64_t position) const;

  // Attention: the rows of a head group, in ascending position.
  PositionMap GroupPositions(int sequence_index) const;
  int64_t GroupNumTokens(int sequence_index) const;
  int64_t MostGroupTokens() const;  // of a group

 private:
  Mesh mesh_;
  int64_t num_tokens_;
  int64_t deal_block_;
};

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_MESH_H_
