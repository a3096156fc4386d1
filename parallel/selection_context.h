#ifndef LONGFILL_PARALLEL_SELECTION_CONTEXT_H_
#define LONGFILL_PARALLEL_SELECTION_CONTEXT_H_

#include <algorithm>
#include <cstdint>
#include <functional>

#include "kernels/api/backend.h"
#include "parallel/communicator.h"
#include "parallel/dual_chunk.h"
#include "parallel/index_storage.h"

namespace longfill {

// Which queries select, over which keys: a whole prompt, or one of the dual chunks that split it. Keys are
// [0, last_query() + 1).
struct SelectionScope {
  int64_t first_query = 0;  // position
  int64_t num_queries = 0;  // at most 64, consecutive
  bool split = false;       // queries are of one of several dual chunks, and come unrotated
  int64_t chunk = 0;
  int64_t first_row = 0;  // position; the index is for the queries from here to the last
  int64_t last_query() const { return first_query + num_queries - 1; }
  int64_t num_keys() const { return first_query + num_queries; }

  // The last queries of a chunk select for all of it; the prompt is one chunk where it is not split.
  static SelectionScope LastQueriesOf(const DualChunk& dual_chunk, int64_t chunk, int64_t num_tokens) {
    const TokenRange tokens = dual_chunk.Tokens(chunk, num_tokens);
    const int64_t count = std::min(tokens.end - tokens.begin, kMaxSelectingQueries);
    return {tokens.end - count, count, dual_chunk.Splits(num_tokens), chunk, tokens.begin};
  }
};

// What selectors work with during one Build; their work goes to the backend's main stream.
struct SelectionContext {
  Backend& backend;
  Communicator& world;
  Coverage coverage;
  void* scratch;  // of the selector's ScratchBytes, in the backend's memory
  const IndexStorage& storage;
  IndexReport& report;
  const RotaryParams& query_rotary;  // of queries that come unrotated
  const std::function<bool()>& should_stop;

  KernelSet& kernels() const { return backend.kernels(); }
  Stream& stream() const { return backend.stream(); }
};

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_SELECTION_CONTEXT_H_
