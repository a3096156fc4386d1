#include "kernels/base/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace longfill {

struct ThreadPool::Impl {
  std::mutex mutex;
  std::condition_variable work_arrived;
  std::condition_variable work_done;
  std::atomic<bool> in_use{false};  // set by the ParallelFor that owns the workers
  const std::function<void(int64_t, int)>* body = nullptr;
  int64_t num_tasks = 0;
  std::atomic<int64_t> next_task{0};
  uint64_t generation = 0;
  int num_busy = 0;
  bool stopping = false;
  std::vector<std::thread> threads;

  void RunTasks(int worker) {
    for (int64_t task = next_task.fetch_add(1); task < num_tasks; task = next_task.fetch_add(1)) {
      (*body)(task, worker);
    }
  }

  void WorkerLoop(int worker) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
      work_arrived.wait(lock, [&] { return stopping || generation != seen; });
      if (stopping) return;
      seen = generation;
      lock.unlock();
      RunTasks(worker);
      lock.lock();
      if (--num_busy == 0) work_done.notify_one();
    }
  }
};

ThreadPool::ThreadPool(int num_threads) : impl_(std::make_unique<Impl>()) {
  for (int worker = 1; worker < num_threads; ++worker) {
    impl_->threads.emplace_back([impl = impl_.get(), worker] { impl->WorkerLoop(worker); });
  }
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(impl_->mutex);
    impl_->stopping = true;
  }
  impl_->work_arrived.notify_all();
  for (std::thread& thread : impl_->threads) thread.join();
}

int ThreadPool::num_threads() const { return static_cast<int>(impl_->threads.size()) + 1; }

void ThreadPool::ParallelFor(int64_t num_tasks, const std::function<void(int64_t task, int worker)>& body) {
  if (impl_->threads.empty() || num_tasks <= 1 || impl_->in_use.exchange(true)) {
    for (int64_t task = 0; task < num_tasks; ++task) body(task, 0);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(impl_->mutex);
    impl_->body = &body;
    impl_->num_tasks = num_tasks;
    impl_->next_task.store(0);
    impl_->num_busy = static_cast<int>(impl_->threads.size());
    ++impl_->generation;
  }
  impl_->work_arrived.notify_all();
  impl_->RunTasks(0);
  std::unique_lock<std::mutex> lock(impl_->mutex);
  impl_->work_done.wait(lock, [&] { return impl_->num_busy == 0; });
  lock.unlock();
  impl_->in_use.store(false);
}

}  // namespace longfill
