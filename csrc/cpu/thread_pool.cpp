#include "cpu/thread_pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

namespace fastedit {
namespace {

using Body = void (*)(void*, std::int64_t, int);

class Pool {
  public:
    explicit Pool(pid_t owner) : owner_(owner) {}

    pid_t owner() const { return owner_; }

    // False if the pool is busy with another caller.
    bool run(int threads, std::int64_t tasks, Body body, void* context) {
        std::unique_lock<std::mutex> call(call_mutex_, std::try_to_lock);
        if (!call.owns_lock()) return false;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (workers_ < threads - 1) spawn();
            body_ = body, context_ = context, tasks_ = tasks, wanted_ = threads - 1, running_ = threads - 1;
            error_ = nullptr;
            next_.store(0, std::memory_order_relaxed);
            ++generation_;
        }
        start_.notify_all();
        work(0);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_ == 0; });
        if (error_) std::rethrow_exception(error_);
        return true;
    }

  private:
    void spawn() {
        const int worker = workers_ + 1;
        // Detached: joining threads while the interpreter is torn down is how pools hang at exit.
        std::thread([this, worker, seen = generation_]() mutable {
            for (;;) {
                {
                    std::unique_lock<std::mutex> lock(mutex_);
                    start_.wait(lock, [&] { return generation_ != seen; });
                    seen = generation_;
                    if (worker > wanted_) continue;
                }
                work(worker);
                std::lock_guard<std::mutex> lock(mutex_);
                if (--running_ == 0) done_.notify_one();
            }
        }).detach();
        workers_ = worker;
    }

    void work(int worker) {
        try {
            for (;;) {
                const std::int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
                if (task >= tasks_) return;
                body_(context_, task, worker);
            }
        } catch (...) {
            next_.store(tasks_, std::memory_order_relaxed);
            std::lock_guard<std::mutex> lock(mutex_);
            if (!error_) error_ = std::current_exception();
        }
    }

    const pid_t owner_;
    std::mutex call_mutex_, mutex_;
    std::condition_variable start_, done_;
    std::atomic<std::int64_t> next_{0};
    std::exception_ptr error_;
    Body body_ = nullptr;
    void* context_ = nullptr;
    std::int64_t tasks_ = 0;
    std::uint64_t generation_ = 0;
    int workers_ = 0, wanted_ = 0, running_ = 0;
};

std::atomic<Pool*> current_pool{nullptr};

// Never freed, for the same reason the threads are detached. Threads do not survive a fork: a child gets its
// own pool.
Pool& pool() {
    const pid_t self = getpid();
    Pool* found = current_pool.load();
    while (found == nullptr || found->owner() != self) {
        Pool* fresh = new Pool(self);
        if (current_pool.compare_exchange_strong(found, fresh)) return *fresh;
        delete fresh;
    }
    return *found;
}

}  // namespace

void parallel_for(int threads, std::int64_t tasks, Body body, void* context) {
    threads = static_cast<int>(std::min<std::int64_t>(std::max(threads, 1), tasks));
    if (threads > 1 && pool().run(threads, tasks, body, context)) return;
    for (std::int64_t task = 0; task < tasks; ++task) body(context, task, 0);
}

}  // namespace fastedit
