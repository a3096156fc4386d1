#include "parallel/head_placement.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <utility>

namespace longfill {
namespace {

constexpr int64_t kNodeLimit = 400000;  // of the exact search; 10 heads on 10 ranks have 115,975 placements

using Assignment = std::vector<int>;  // rank of each head

// What is minimised: the maximum load, then the KV copies.
struct Score {
  int64_t max_load = 0;
  int64_t kv_copies = 0;
  // NOLINTNEXTLINE(modernize-use-nullptr): clang-tidy 14 takes the 0 in the generated code for a pointer
  auto operator<=>(const Score&) const = default;
};

class Placer {
 public:
  Placer(std::span<const int64_t> cost, std::span<const int32_t> kv_head, int num_ranks)
      : cost_(cost), num_ranks_(num_ranks), num_heads_(static_cast<int>(cost.size())) {
    std::map<int32_t, int> dense_number;
    for (const int32_t head : kv_head) {
      kv_.push_back(dense_number.emplace(head, static_cast<int>(dense_number.size())).first->second);
    }
    num_kv_ = static_cast<int>(dense_number.size());
    order_.resize(num_heads_);
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [&](int a, int b) {
      return cost_[a] != cost_[b] ? cost_[a] > cost_[b] : kv_[a] < kv_[b];
    });
  }

  Assignment Solve() {
    for (Assignment start : {LongestFirst(), ByKvHead()}) {
      Improve(start);
      Keep(start);
    }
    Search();
    return best_;
  }

  Score ScoreOf(const Assignment& assignment) const {
    std::vector<int64_t> load(num_ranks_);
    std::vector<char> has(static_cast<size_t>(num_ranks_) * num_kv_);
    Score score;
    for (int h = 0; h < num_heads_; ++h) {
      load[assignment[h]] += cost_[h];
      char& present = has[static_cast<size_t>(assignment[h]) * num_kv_ + kv_[h]];
      score.kv_copies += present == 0;
      present = 1;
    }
    score.max_load = *std::max_element(load.begin(), load.end());
    return score;
  }

 private:
  void Keep(const Assignment& candidate) {
    const Score score = ScoreOf(candidate);
    if (best_.empty() || score < best_score_) {
      best_ = candidate;
      best_score_ = score;
    }
  }

  // The next most expensive head to the least loaded rank; among equals, one that has its KV head.
  Assignment LongestFirst() const {
    Assignment assignment(num_heads_);
    std::vector<int64_t> load(num_ranks_);
    std::vector<char> has(static_cast<size_t>(num_ranks_) * num_kv_);
    for (const int h : order_) {
      const auto rank_key = [&](int r) {
        return std::pair(load[r], has[static_cast<size_t>(r) * num_kv_ + kv_[h]] == 0);
      };
      int to = 0;
      for (int r = 1; r < num_ranks_; ++r) {
        if (rank_key(r) < rank_key(to)) to = r;
      }
      assignment[h] = to;
      load[to] += cost_[h];
      has[static_cast<size_t>(to) * num_kv_ + kv_[h]] = 1;
    }
    return assignment;
  }

  // Heads in the order of their KV heads, cut where the running sum passes each rank's share; without any
  // cost, evenly.
  Assignment ByKvHead() const {
    std::vector<int> by_kv(num_heads_);
    std::iota(by_kv.begin(), by_kv.end(), 0);
    std::stable_sort(by_kv.begin(), by_kv.end(), [&](int a, int b) { return kv_[a] < kv_[b]; });
    const int64_t total = std::accumulate(cost_.begin(), cost_.end(), int64_t{0});
    const int64_t share = std::max(int64_t{1}, (total + num_ranks_ - 1) / num_ranks_);
    Assignment assignment(num_heads_);
    int64_t before = 0;
    for (int i = 0; i < num_heads_; ++i) {
      const int64_t cost = cost_[by_kv[i]];
      const int64_t rank = total > 0 ? (before + cost / 2) / share : int64_t{i} * num_ranks_ / num_heads_;
      assignment[by_kv[i]] = static_cast<int>(std::min<int64_t>(num_ranks_ - 1, rank));
      before += cost;
    }
    return assignment;
  }

  // Moves and swaps while one of them is better; each round takes the first that is.
  void Improve(Assignment& assignment) const {
    Score score = ScoreOf(assignment);
    bool improved = true;
    const auto try_change = [&](Assignment& changed) {
      const Score next = ScoreOf(changed);
      if (!(next < score)) return false;
      score = next;
      return true;
    };
    for (int round = 0; improved && round < 4 * num_heads_; ++round) {
      improved = false;
      for (int a = 0; a < num_heads_ && !improved; ++a) {
        const int home = assignment[a];
        for (int r = 0; r < num_ranks_ && !improved; ++r) {
          if (r == home) continue;
          assignment[a] = r;
          improved = try_change(assignment);
          if (!improved) assignment[a] = home;
        }
        for (int b = a + 1; b < num_heads_ && !improved; ++b) {
          if (assignment[a] == assignment[b]) continue;
          std::swap(assignment[a], assignment[b]);
          improved = try_change(assignment);
          if (!improved) std::swap(assignment[a], assignment[b]);
        }
      }
    }
  }

  // Depth-first over `order_` with bounds; ranks without a head are interchangeable, so only the first is
  // tried.
  void Search() {
    load_.assign(num_ranks_, 0);
    copies_.assign(static_cast<size_t>(num_ranks_) * num_kv_, 0);
    placed_.assign(num_kv_, 0);
    current_.assign(num_heads_, 0);
    const int64_t total = std::accumulate(cost_.begin(), cost_.end(), int64_t{0});
    least_load_ = std::max(cost_[order_[0]], (total + num_ranks_ - 1) / num_ranks_);
    Descend(0, 0, num_kv_, {});
  }

  // `missing_kv`: KV heads that no rank has yet; each will cost one copy at least.
  void Descend(int depth, int used_ranks, int missing_kv, Score score) {
    if (!(Score{std::max(score.max_load, least_load_), score.kv_copies + missing_kv} < best_score_)) return;
    if (depth == num_heads_) {
      best_score_ = score;
      best_ = current_;
      return;
    }
    if (++nodes_ > kNodeLimit) return;
    const int h = order_[depth];
    for (int r = 0; r < std::min(used_ranks + 1, num_ranks_); ++r) {
      int& copies = copies_[static_cast<size_t>(r) * num_kv_ + kv_[h]];
      const Score next{std::max(score.max_load, load_[r] + cost_[h]), score.kv_copies + (copies == 0)};
      load_[r] += cost_[h];
      ++copies;
      const bool first_anywhere = placed_[kv_[h]]++ == 0;
      current_[h] = r;
      Descend(depth + 1, std::max(used_ranks, r + 1), missing_kv - first_anywhere, next);
      --placed_[kv_[h]];
      --copies;
      load_[r] -= cost_[h];
    }
  }

  const std::span<const int64_t> cost_;
  const int num_ranks_;
  const int num_heads_;
  std::vector<int> kv_;  // 0, 1, ... in the order of appearance
  int num_kv_ = 0;
  std::vector<int> order_;  // by falling cost
  Assignment best_;
  Score best_score_;
  // Of the search.
  std::vector<int64_t> load_;
  std::vector<int> copies_;  // heads of each (rank, KV head)
  std::vector<int> placed_;  // heads of each KV head
  Assignment current_;
  int64_t least_load_ = 0;  // of any placement's busiest rank
  int64_t nodes_ = 0;
};

}  // namespace

HeadPlacement PlaceHeads(std::span<const int64_t> cost, std::span<const int32_t> kv_head, int num_ranks) {
  HeadPlacement placement;
  placement.heads.resize(num_ranks);
  if (cost.empty()) return placement;
  Placer placer(cost, kv_head, num_ranks);
  const Assignment assignment = placer.Solve();
  const auto score = placer.ScoreOf(assignment);
  placement.max_load = score.max_load;
  placement.kv_copies = score.kv_copies;
  for (size_t h = 0; h < assignment.size(); ++h)
    placement.heads[assignment[h]].push_back(static_cast<int32_t>(h));
  return placement;
}

}  // namespace longfill
