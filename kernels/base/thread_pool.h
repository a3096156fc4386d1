#ifndef LONGFILL_KERNELS_BASE_THREAD_POOL_H_
#define LONGFILL_KERNELS_BASE_THREAD_POOL_H_

#include <cstdint>
#include <functional>
#include <memory>

namespace longfill {

// A fixed set of threads that run loops. The caller's thread is worker 0 and takes part, so a pool of one
// starts no thread. One ParallelFor at a time uses the workers; a nested or concurrent call runs on its
// calling thread alone, as worker 0, so scratch indexed by worker must belong to the call, not to the pool.
class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const;

  // Calls body(task, worker) once for every task in [0, num_tasks), worker in [0, num_threads()); tasks are
  // taken in ascending order, longest-first order is up to the caller. Returns when all have run. `body` must
  // not throw.
  void ParallelFor(int64_t num_tasks, const std::function<void(int64_t task, int worker)>& body);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace longfill

#endif  // LONGFILL_KERNELS_BASE_THREAD_POOL_H_
