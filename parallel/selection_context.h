#ifndef LONGFILL_PARALLEL_SELECTION_CONTEXT_H_
#define LONGFILL_PARALLEL_SELECTION_CONTEXT_H_

#include <cstdint>

#include "kernels/api/backend.h"
#include "parallel/communicator.h"
#include "parallel/index_storage.h"

namespace longfill {

// Which queries select, over which keys: a whole prompt, or one chunk of it. Keys are [0, last_query() + 1).
struct SelectionScope {
  int64_t first_query = 0;  // position
  int64_t num_queries = 0;  // at most 64, consecutive
  int64_t last_query() const { return first_query + num_queries - 1; }
  int64_t num_keys() const { return first_query + num_queries; }

  static SelectionScope LastQueriesOf(int64_t num_tokens) {
    const int64_t count = num_tokens < kMaxSelectingQueries ? num_tokens : kMaxSelectingQueries;
    return {num_tokens - count, count};
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

  KernelSet& kernels() const { return backend.kernels(); }
  Stream& stream() const { return backend.stream(); }
};

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_SELECTION_CONTEXT_H_
