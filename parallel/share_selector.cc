#include "parallel/share_selector.h"

#include <algorithm>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/piece_layout.h"
#include "parallel/packing.h"

namespace longfill {
namespace {

// Bits of row blocks that are selected and made into lists together: those of a whole head of half a million
// tokens. They would be quadratic in memory if they were of all row blocks.
constexpr int64_t kBitsBytesAtOnce = int64_t{8} << 20;

constexpr char kNoRoomPayload[] = "longfill/block-share-lists-had-no-room";

int64_t WholeBlocksOf(int64_t tokens) { return tokens / kRowBlock; }
int64_t WordsOf(int64_t key_blocks) { return (key_blocks + 63) / 64; }

}  // namespace

ShareSelector::ShareSelector(const KernelSet& kernels, const ShardPlan& plan,
                             const AttentionGeometry& geometry, std::span<const HeadPattern> patterns)
    : kernels_(kernels),
      plan_(plan),
      geometry_(geometry),
      num_row_blocks_(RowBlocksOf(plan.num_tokens())),
      num_key_blocks_(WholeBlocksOf(plan.num_tokens())) {
  for (size_t h = 0; h < patterns.size() && plan.num_tokens() > 0; ++h) {
    const auto* shares = std::get_if<BlockShare>(&patterns[h]);
    if (shares == nullptr) continue;
    const int64_t kv_head = static_cast<int64_t>(h) / geometry.q_per_kv();
    if (groups_.empty() || groups_.back().kv_head != kv_head || groups_.back().outliers != shares->outliers ||
        groups_.back().samples != shares->samples || groups_.back().coarse != shares->coarse ||
        groups_.back().fp8 != shares->fp8) {
      groups_.push_back({.kv_head = kv_head,
                         .outliers = shares->outliers,
                         .samples = shares->samples,
                         .coarse = shares->coarse,
                         .fp8 = shares->fp8,
                         .first_place = num_heads_});
    }
    groups_.back().heads.push_back(static_cast<int32_t>(h));
    groups_.back().min_share.push_back(static_cast<float>(shares->min_share));
    ++num_heads_;
    most_heads_ = std::max(most_heads_, static_cast<int64_t>(groups_.back().heads.size()));
  }
}

int64_t ShareSelector::RowBytes() const {
  return WordsOf(num_row_blocks_) * static_cast<int64_t>(sizeof(uint64_t));
}

int64_t ShareSelector::HeadsAtOnce() const {
  return std::clamp<int64_t>(kBitsBytesAtOnce / (num_row_blocks_ * RowBytes()), 1, most_heads_);
}

int64_t ShareSelector::RowBlocksAtOnce() const {
  const int64_t deal = plan_.deal_block() / kRowBlock * plan_.mesh().size();  // one block for each rank
  const int64_t fitting = std::max<int64_t>(1, kBitsBytesAtOnce / RowBytes() / deal) * deal;
  return std::min(num_row_blocks_, fitting);
}

int64_t ShareSelector::OwnRowBlocks(int64_t local_tokens) const {
  if (RowBlocksAtOnce() == num_row_blocks_) return RowBlocksOf(local_tokens);
  return std::min(RowBlocksOf(local_tokens), RowBlocksAtOnce() / plan_.mesh().size());
}

ShareSelector::Scratch ShareSelector::ScratchFor(int64_t local_tokens) const {
  Scratch at;
  if (groups_.empty()) return at;
  const int64_t key_bytes = geometry_.head_dim * DTypeBytes(kernels_.compute_dtype());
  const auto most = [this](const auto& of) {
    int64_t largest = 0;
    for (const Group& group : groups_) largest = std::max<int64_t>(largest, of(group));
    return largest;
  };
  const int64_t representatives = most([](const Group& group) { return group.num_representatives(); });
  const int64_t coarse_rows = most([](const Group& group) {
    return group.coarse == 0 ? 0 : NumRepresentatives(group.samples, group.coarse);
  });
  const int64_t own_rows = OwnRowBlocks(local_tokens);
  const int64_t bits_bytes = HeadsAtOnce() * RowBytes();  // of a row block
  PieceLayout pieces;
  at.representatives = pieces.Add(representatives * num_key_blocks_ * key_bytes);
  at.coarse = pieces.Add(coarse_rows * (num_key_blocks_ / kCoarseBlocks) * key_bytes);
  at.bits = pieces.Add(RowBlocksAtOnce() * bits_bytes);
  if (plan_.mesh().size() > 1) {
    at.own = pieces.Add(
        std::max(representatives * WholeBlocksOf(local_tokens) * key_bytes, own_rows * bits_bytes));
    at.gathered =
        pieces.Add(std::max(representatives * num_key_blocks_ * key_bytes, RowBlocksAtOnce() * bits_bytes));
  }
  at.workspace_bytes = std::max({kernels_.ShareSelectionWorkspaceBytes(
                                     {.num_heads = HeadsAtOnce(),
                                      .num_rows = own_rows * kRowBlock,
                                      .num_representatives = representatives,
                                      .num_key_blocks = num_key_blocks_,
                                      .head_dim = geometry_.head_dim,
                                      .num_coarse = most([](const Group& group) { return group.coarse; }),
                                      .num_samples = most([](const Group& group) { return group.samples; }),
                                      .fp8 = most([](const Group& group) { return group.fp8; }) > 0}),
                                 kernels_.BuildBlockListsWorkspaceBytes(HeadsAtOnce(), RowBlocksAtOnce()),
                                 kernels_.CountPairsWorkspaceBytes(1, plan_.num_tokens())});
  at.workspace = pieces.Add(at.workspace_bytes);
  at.total_bytes = pieces.total_bytes();
  return at;
}

int64_t ShareSelector::ScratchBytes(int rank) const { return ScratchFor(plan_.NumTokens(rank)).total_bytes; }

// The block-share heads of a layer, on one rank.
class ShareSelector::Selection {
 public:
  Selection(const ShareSelector& selector, const SelectionContext& context)
      : selector_(selector),
        context_(context),
        kernels_(context.kernels()),
        stream_(context.stream()),
        world_(context.world),
        plan_(selector.plan_),
        several_ranks_(context.world.size() > 1),
        local_tokens_(plan_.NumTokens(world_.rank())),
        key_bytes_(selector.geometry_.head_dim * DTypeBytes(kernels_.compute_dtype())),
        at_(selector.ScratchFor(local_tokens_)) {}

  absl::Status Run(const Group& group, HeadsView<const void> q, HeadsView<const void> k) {
    LF_RETURN_IF_ERROR(MakeRepresentatives(group, k));
    const auto num_heads = static_cast<int64_t>(group.heads.size());
    for (int64_t head = 0; head < num_heads;) {
      const int64_t heads = Neighbours(group, head);
      for (int64_t row = 0; row < selector_.num_row_blocks_; row += selector_.RowBlocksAtOnce()) {
        const int64_t end = std::min(selector_.num_row_blocks_, row + selector_.RowBlocksAtOnce());
        LF_RETURN_IF_ERROR(SelectPart({group, head, heads, row, end}, q, k));
      }
      head += heads;
    }
    for (int64_t head = 0; head < num_heads; ++head) {
      LF_RETURN_IF_ERROR(CountPairs(group.first_place + head, group.heads[head]));
    }
    return absl::OkStatus();
  }

 private:
  // Heads of the group from its `first` on that lie side by side in Q, as many as are selected at once.
  int64_t Neighbours(const Group& group, int64_t first) const {
    const auto num_heads = static_cast<int64_t>(group.heads.size());
    int64_t count = 1;
    while (count < selector_.HeadsAtOnce() && first + count < num_heads &&
           group.heads[first + count] == group.heads[first] + count) {
      ++count;
    }
    return count;
  }

  // Heads of a group that are neighbours, and the row blocks [begin, end) of the prompt.
  struct Part {
    const Group& group;
    int64_t first_head = 0;
    int64_t num_heads = 0;
    int64_t begin = 0;
    int64_t end = 0;
    int64_t words_per_row() const { return WordsOf(end); }
  };

  template <typename T>
  T* Piece(int64_t offset) const {
    return PieceAt<T>(context_.scratch, offset);
  }
  Workspace workspace() const { return {Piece<char>(at_.workspace), at_.workspace_bytes}; }

  // Of one KV head, of all whole blocks in order, on all ranks.
  absl::Status MakeRepresentatives(const Group& group, HeadsView<const void> k) {
    RepresentativesParams params;
    params.k = {Advance(k.data, group.kv_head * k.head_stride, kernels_.compute_dtype()), k.head_stride,
                k.row_stride};
    params.num_heads = 1;
    params.num_keys = local_tokens_;
    params.head_dim = selector_.geometry_.head_dim;
    params.num_outliers = group.outliers;
    params.num_samples = group.samples;
    params.out = Piece<void>(several_ranks_ ? at_.own : at_.representatives);
    LF_RETURN_IF_ERROR(kernels_.Representatives(params, stream_));
    if (several_ranks_) LF_RETURN_IF_ERROR(GatherRepresentatives(group));
    if (group.coarse == 0) return absl::OkStatus();
    return kernels_.CoarseRepresentatives({.representatives = Piece<void>(at_.representatives),
                                           .num_representatives = group.num_representatives(),
                                           .num_samples = group.samples,
                                           .num_key_blocks = selector_.num_key_blocks_,
                                           .head_dim = selector_.geometry_.head_dim,
                                           .num_coarse = group.coarse,
                                           .out = Piece<void>(at_.coarse)},
                                          stream_);
  }

  absl::Status GatherRepresentatives(const Group& group) {
    return GatherPlanes(
        {.num_planes = group.num_representatives(),
         .row_bytes = key_bytes_,
         .num_rows = selector_.num_key_blocks_},
        [this](int rank) {
          return OwnRows{WholeBlocksOf(plan_.NumTokens(rank)),
                         plan_.TokenPositions(rank).OfBlocks(kRowBlock)};
        },
        Piece<char>(at_.representatives));
  }

  // Rows of the rank that lie before row block `row_block` of the prompt.
  int64_t LocalRowsBefore(int rank, int64_t row_block) const {
    const PositionMap positions = plan_.TokenPositions(rank);
    return std::min(positions.RowsBelow(row_block * kRowBlock), plan_.NumTokens(rank));
  }

  absl::Status SelectPart(const Part& part, HeadsView<const void> q, HeadsView<const void> k) {
    const int64_t first_row = LocalRowsBefore(world_.rank(), part.begin);
    ShareSelectionParams params;
    params.q = {Advance(q.data, part.group.heads[part.first_head] * q.head_stride + first_row * q.row_stride,
                        kernels_.compute_dtype()),
                q.head_stride, q.row_stride};
    params.num_heads = part.num_heads;
    params.num_rows = LocalRowsBefore(world_.rank(), part.end) - first_row;
    params.positions = plan_.TokenPositions(world_.rank()).From(first_row);
    params.representatives = Piece<void>(at_.representatives);
    params.num_representatives = part.group.num_representatives();
    params.num_samples = part.group.samples;
    params.own_k = Advance(k.data, part.group.kv_head * k.head_stride + first_row * k.row_stride,
                           kernels_.compute_dtype());
    params.own_k_row_stride = k.row_stride;
    params.num_key_blocks = selector_.num_key_blocks_;
    params.coarse = Piece<void>(at_.coarse);
    params.num_coarse = part.group.coarse;
    params.fp8 = part.group.fp8;
    params.head_dim = selector_.geometry_.head_dim;
    params.scale = selector_.geometry_.scale;
    params.min_share = std::span(part.group.min_share).subspan(part.first_head, part.num_heads);
    params.bits = Piece<uint64_t>(several_ranks_ ? at_.own : at_.bits);
    params.words_per_row = part.words_per_row();
    if (!stopped_ && context_.should_stop && context_.should_stop()) stopped_ = true;
    LF_RETURN_IF_ERROR(stopped_ ? SelectNothing(params)
                                : kernels_.SelectByShare(params, workspace(), stream_));
    if (several_ranks_) {
      LF_RETURN_IF_ERROR(GatherPlanes(
          {.num_planes = part.num_heads,
           .row_bytes = part.words_per_row() * static_cast<int64_t>(sizeof(uint64_t)),
           .num_rows = part.end - part.begin},
          [&](int rank) {
            const int64_t first = LocalRowsBefore(rank, part.begin);
            PositionMap places = plan_.TokenPositions(rank).From(first).OfBlocks(kRowBlock);
            places.first -= part.begin;
            return OwnRows{RowBlocksOf(LocalRowsBefore(rank, part.end) - first), places};
          },
          Piece<char>(at_.bits)));
    }
    return MakeLists(part);
  }

  absl::Status SelectNothing(const ShareSelectionParams& params) {
    const int64_t words = params.num_heads * RowBlocksOf(params.num_rows) * params.words_per_row;
    return kernels_.Zero(params.bits, words * static_cast<int64_t>(sizeof(uint64_t)), stream_);
  }

  absl::Status MakeLists(const Part& part) {
    const ShareLists& lists = context_.storage.share_lists();
    BuildBlockListsParams params;
    params.bits = Piece<uint64_t>(at_.bits);
    params.words_per_row = part.words_per_row();
    params.num_heads = part.num_heads;
    params.num_row_blocks = part.end - part.begin;
    params.row_offsets_stride = selector_.num_row_blocks_ + 1;
    params.row_offsets = lists.row_offsets +
                         (part.group.first_place + part.first_head) * params.row_offsets_stride + part.begin;
    params.key_blocks = lists.key_blocks;
    params.capacity = lists.capacity;
    params.num_entries = lists.num_entries;
    return kernels_.BuildBlockLists(params, workspace(), stream_);
  }

  // Planes of one row for each 64-row block.
  struct Planes {
    int64_t num_planes = 0;
    int64_t row_bytes = 0;
    int64_t num_rows = 0;  // of all ranks
  };
  // A rank's part of a plane.
  struct OwnRows {
    int64_t num_rows = 0;
    PositionMap places;  // in the plane
  };
  // This rank's planes in at_.own, one after the other, to planes of all ranks' rows at `to`. own_rows(rank)
  // gives OwnRows.
  template <typename OwnRowsOf>
  absl::Status GatherPlanes(const Planes& planes, const OwnRowsOf& own_rows, char* to) {
    const int size = world_.size();
    std::vector<int64_t> counts_bytes(size);
    for (int r = 0; r < size; ++r) {
      counts_bytes[r] = planes.num_planes * own_rows(r).num_rows * planes.row_bytes;
    }
    LF_RETURN_IF_ERROR(
        world_.AllGather(Piece<void>(at_.own), Piece<void>(at_.gathered), counts_bytes, stream_));
    const char* from = Piece<char>(at_.gathered);
    for (int r = 0; r < size; ++r) {
      const OwnRows rows = own_rows(r);
      const int64_t bytes = rows.num_rows * planes.row_bytes;  // of a plane
      LF_RETURN_IF_ERROR(CopyToPlaces(
          kernels_, to, rows.places, from, planes.row_bytes, bytes, stream_,
          {.count = planes.num_planes, .to_pitch = planes.num_rows * planes.row_bytes, .from_pitch = bytes}));
      from += planes.num_planes * bytes;
    }
    return absl::OkStatus();
  }

  // Each head is counted by one rank.
  absl::Status CountPairs(int64_t place, int32_t head) {
    if (static_cast<int>(place % world_.size()) != world_.rank()) return absl::OkStatus();
    return kernels_.CountPairs({.indices = {&context_.storage.views()[head], 1},
                                .num_tokens = plan_.num_tokens(),
                                .counts = context_.storage.covered() + head},
                               workspace(), stream_);
  }

  const ShareSelector& selector_;
  const SelectionContext& context_;
  KernelSet& kernels_;
  Stream& stream_;
  Communicator& world_;
  const ShardPlan& plan_;
  const bool several_ranks_;
  const int64_t local_tokens_;
  const int64_t key_bytes_;
  const ShareSelector::Scratch at_;
  bool stopped_ = false;
};

absl::Status ShareSelector::Select(const SelectionContext& context, HeadsView<const void> q,
                                   HeadsView<const void> k) const {
  Selection selection(*this, context);
  for (const Group& group : groups_) LF_RETURN_IF_ERROR(selection.Run(group, q, k));
  return absl::OkStatus();
}

absl::Status ShareSelector::Check(const IndexReport& report) const {
  const int64_t capacity = ShareListCapacity(plan_.num_tokens(), num_heads_);
  if (report.share_entries() <= capacity) return absl::OkStatus();
  absl::Status status = absl::ResourceExhaustedError(
      absl::StrCat("block-share: the lists of a layer's ", num_heads_, " heads have ", report.share_entries(),
                   " key blocks and there is room for ", capacity, ", ", kMeanShareListBlocks,
                   " for each 64 rows of a head in the mean; a larger TAU selects fewer"));
  status.SetPayload(kNoRoomPayload, absl::Cord());
  return status;
}

bool ShareSelector::HadNoRoom(const absl::Status& status) {
  return status.GetPayload(kNoRoomPayload).has_value();
}

}  // namespace longfill
