#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>
#include <vector>

#include "check.h"
#include "core/parallel.h"

using realm_fast::parallel_for;

TEST(parallel_for_runs_every_task_once) {
  for (const int threads : {1, 2, 5}) {
    for (const int tasks : {0, 1, 3, 1000}) {
      std::vector<std::atomic<int>> counts(tasks);
      std::atomic<bool> worker_ok{true};
      CHECK(parallel_for(tasks, threads, [&](int64_t task, int worker) {
        counts[task].fetch_add(1);
        if (worker < 0 || worker >= threads) worker_ok = false;
      }));
      CHECK(worker_ok);
      for (const auto& count : counts) CHECK(count.load() == 1);
    }
  }
}

TEST(parallel_for_stops_when_the_poll_says_so) {
  constexpr int64_t kTasks = 1 << 30;  // so many that a busy machine asks the poll before they are done
  std::atomic<int64_t> done{0};
  const bool completed =
      parallel_for(kTasks, 3, [&](int64_t, int) { done.fetch_add(1); }, [&] { return done.load() < 50; });
  CHECK(!completed);
  CHECK(done.load() < kTasks);
}

TEST(parallel_for_from_several_threads_at_once) {
  std::vector<std::thread> callers;
  std::atomic<int64_t> sum{0};
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 50; ++repeat) {
        parallel_for(100, 3, [&](int64_t task, int) { sum.fetch_add(task); });
      }
    });
  }
  for (auto& caller : callers) caller.join();
  CHECK(sum.load() == 4 * 50 * 4950);
}

#if !defined(__SANITIZE_THREAD__)  // the thread sanitizer does not follow threads started after a fork
TEST(parallel_for_works_in_a_forked_child) {
  std::atomic<int> before{0};
  parallel_for(10, 3, [&](int64_t, int) { before.fetch_add(1); });
  const pid_t child = fork();
  if (child == 0) {
    std::atomic<int> done{0};
    parallel_for(100, 3, [&](int64_t, int) { done.fetch_add(1); });
    _exit(done.load() == 100 ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
#endif
