// A small pool of native threads, so that kernels need neither OpenMP (a second runtime beside torch's
// oversubscribes the machine) nor a thread start per call.
#pragma once

#include <cstdint>
#include <functional>

namespace realm_fast {

// Runs body(task, worker) for every task in [0, num_tasks), handing tasks out dynamically to at most
// num_threads workers (the calling thread is worker 0). body must not throw. Returns when all are done.
// Calls from several threads at once are safe: while one call holds the pool the others run on their
// own thread alone. After fork() the child starts a pool of its own.
//
// poll, when given, is called by the calling thread between its tasks; when it returns false no further
// tasks are handed out and parallel_for returns false (a Ctrl-C that Python wants to see).
bool parallel_for(int64_t num_tasks, int num_threads,
                  const std::function<void(int64_t task, int worker)>& body,
                  const std::function<bool()>& poll = {});

}  // namespace realm_fast
