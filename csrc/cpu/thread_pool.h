// A small pool of threads: tasks 0..n-1 are handed out one by one. No OpenMP, so nothing to clash with
// torch's.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastedit {

// Calls body(context, task, worker) for every task, on `threads` threads of which the caller is one; worker
// is in [0, threads). Which worker gets a task varies, so results must depend on the task alone. The first
// exception of a task is rethrown here after all threads stopped. Calls from several threads at once and
// calls from inside a task run on the calling thread alone.
void parallel_for(int threads, std::int64_t tasks, void (*body)(void* context, std::int64_t task, int worker),
                  void* context);

template <typename Body>
void parallel_for(int threads, std::int64_t tasks, Body&& body) {
    auto call = [](void* context, std::int64_t task, int worker) {
        (*static_cast<Body*>(context))(task, worker);
    };
    parallel_for(threads, tasks, +call, const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace fastedit
