#include "core/parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace realm_fast {
namespace {

struct Job {
  const std::function<void(int64_t, int)>* body;
  int64_t num_tasks;
  int num_workers;
  std::atomic<int64_t> next_task{0};
  std::atomic<bool> stopped{false};

  void work(int worker, const std::function<bool()>* poll) {
    while (!stopped.load(std::memory_order_relaxed)) {
      const int64_t task = next_task.fetch_add(1, std::memory_order_relaxed);
      if (task >= num_tasks) return;
      (*body)(task, worker);
      if (poll != nullptr && *poll && !(*poll)()) stopped.store(true, std::memory_order_relaxed);
    }
  }
};

class Pool {
 public:
  // Grows to the largest size asked for; idle threads sleep on a condition variable.
  void run(Job& job, const std::function<bool()>& poll) {
    {
      const std::lock_guard lock(mutex_);
      while (static_cast<int>(threads_.size()) < job.num_workers - 1) {
        const int worker = static_cast<int>(threads_.size()) + 1;
        threads_.emplace_back([this, worker] { loop(worker); });
      }
      job_ = &job;
      ++generation_;
      running_ = job.num_workers - 1;
    }
    wake_.notify_all();
    job.work(0, &poll);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    job_ = nullptr;
  }

  std::mutex busy;  // held by the call that uses the pool

 private:
  void loop(int worker) {
    uint64_t seen = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      Job* job = job_;
      if (job == nullptr || worker >= job->num_workers) continue;
      lock.unlock();
      job->work(worker, nullptr);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  Job* job_ = nullptr;
  uint64_t generation_ = 0;
  int running_ = 0;
};

// Never destroyed: the threads must not outlive the pool, and at exit there is nobody left to join them.
Pool* pool = nullptr;

Pool& the_pool() {
  static const bool registered = [] {
    pool = new Pool;
    // The child of a fork has none of the parent's threads: it gets a fresh pool (the old one is leaked).
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    return true;
  }();
  (void)registered;
  return *pool;
}

}  // namespace

bool parallel_for(int64_t num_tasks, int num_threads, const std::function<void(int64_t, int)>& body,
                  const std::function<bool()>& poll) {
  Job job{.body = &body, .num_tasks = num_tasks, .num_workers = 1};
  job.num_workers = static_cast<int>(std::clamp<int64_t>(num_tasks, 1, std::max(num_threads, 1)));
  if (job.num_workers > 1) {
    Pool& shared = the_pool();
    const std::unique_lock lock(shared.busy, std::try_to_lock);
    if (lock.owns_lock()) {
      shared.run(job, poll);
      return !job.stopped.load();
    }
    job.num_workers = 1;
  }
  job.work(0, &poll);
  return !job.stopped.load();
}

}  // namespace realm_fast
