// The one pool of threads that computes: the caller and `threads - 1` others, which do every operation of a
// step together, with a barrier between operations.
//
// ```
// caller   run(job) ---- job(worker 0) --- barrier --- ... --- return
// thread 1   asleep ---- job(worker 1) --- barrier --- ... --- lingers, then sleeps
// ```
//
// Threads spin only while a job runs and for `linger_us` after it (a step is a few jobs in a row); else they
// sleep on a futex. A thread that waits long inside a job (its neighbour was preempted) sleeps too and leaves
// its core.
//
// Memory need not rest while threads wait: at a barrier and between jobs they ask for what is read next
// (`ReadAhead`).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "penstock/huge_buffer.h"

namespace penstock {

inline constexpr std::size_t cache_line = 64;

class Pool;

struct Memory {
    const std::byte* data;
    std::size_t bytes;
};

// Walks through memory that will be read soon and asks for it, some lines at a time. Only prefetches: what it
// names need not be there any more.
class ReadAhead {
public:
    // Start at the first of `reads`, which must outlive the walk; the same list again goes on where it stood.
    void aim(const std::vector<Memory>* reads) {
        if (reads == reads_) return;
        reads_ = reads;
        index_ = offset_ = 0;
    }

    // Ask for the next lines; false where none are left.
    bool ask() {
        if (!reads_ || index_ == reads_->size()) return false;
        const Memory& memory = (*reads_)[index_];
        const std::size_t end = std::min(memory.bytes, offset_ + bytes_at_once);
        for (; offset_ < end; offset_ += cache_line) __builtin_prefetch(memory.data + offset_);
        if (offset_ >= memory.bytes) {
            ++index_;
            offset_ = 0;
        }
        return true;
    }

private:
    static constexpr std::size_t bytes_at_once = 1024;  // some 25 ns: a waiting thread is that late at most
    const std::vector<Memory>* reads_ = nullptr;
    std::size_t index_ = 0, offset_ = 0;
};

// Pieces of memory that all idle threads walk through together.
class SharedReads {
public:
    explicit SharedReads(std::vector<Memory> pieces) : pieces_(std::move(pieces)) {}
    void restart() { next_.store(0, std::memory_order_relaxed); }
    // Ask for the next piece; false where none is left.
    bool ask() {
        const std::size_t i = next_.load(std::memory_order_relaxed);
        if (i >= pieces_.size() || next_.fetch_add(1, std::memory_order_relaxed) != i)
            return i < pieces_.size();
        const Memory& memory = pieces_[i];
        for (std::size_t at = 0; at < memory.bytes; at += cache_line) __builtin_prefetch(memory.data + at);
        return true;
    }

private:
    const std::vector<Memory> pieces_;
    std::atomic<std::size_t> next_{0};
};

// One thread's view of a job.
class Worker {
public:
    Worker(Pool& pool, int id, int count) : id(id), count(count), pool_(pool) {}
    Worker(const Worker&) = delete;
    Worker& operator=(const Worker&) = delete;

    const int id;     // 0 to count - 1; 0 is the caller
    const int count;  // threads in the job

    // Wait for all threads of the job. Also makes the next `share` start at 0. `reads` (or null) is asked for
    // meanwhile.
    void barrier(const std::vector<Memory>* reads = nullptr);

    // Call task(i) for i in [0, num_tasks), each once: the first by the thread of that number, the others by
    // whichever thread is free, in rising order. At most one `share` between two barriers, and the same
    // num_tasks in all threads.
    template <class Task>
    void share(std::int64_t num_tasks, Task&& task);

    // This thread's memory, 64-byte aligned and as long as `Pool::reserve_scratch` made it. One use at a
    // time.
    std::byte* scratch() const { return scratch_.data(); }

private:
    friend class Pool;
    Pool& pool_;
    HugeBuffer scratch_;
    ReadAhead ahead_;
};

class Pool {
public:
    // Args:
    //   threads: 1 or more, the caller included.
    //   cpus: where thread i is pinned, `cpus[i % size]`; empty leaves the placement to the kernel. The caller's own
    //     thread is pinned at its first `run`.
    explicit Pool(int threads, std::vector<int> cpus = {}, int linger_us = 50);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int num_threads() const { return static_cast<int>(workers_.size()); }

    // Run the job on all threads and wait. Not reentrant, one caller at a time; the job must not throw.
    void run(const std::function<void(Worker&)>& job);

    // Every thread's scratch is at least so long from now on; where it grows its contents are lost. Not while
    // a job runs, in which nothing may be allocated: there is nobody to tell that there is no memory.
    void reserve_scratch(std::size_t bytes);

    // What threads ask for after the next job and those that follow, until they have been through or other
    // reads are given; null for nothing. Not while a job runs.
    void read_between_jobs(std::shared_ptr<SharedReads> reads);

private:
    friend class Worker;
    void serve(int id);
    bool wait_for_job(std::uint32_t seen, SharedReads* reads);

    alignas(cache_line) std::atomic<std::int64_t> next_task_{0};
    alignas(cache_line) std::atomic<int> arrived_{0};
    alignas(cache_line) std::atomic<std::uint32_t> phase_{0};
    alignas(cache_line) std::atomic<std::uint32_t> epoch_{0};  // rises with every job, and once to stop
    std::atomic<bool> is_stopping_{false};
    const std::function<void(Worker&)>* job_ = nullptr;
    std::vector<std::unique_ptr<Worker>> workers_;
    std::vector<std::thread> threads_;
    std::shared_ptr<SharedReads> reads_;  // written between jobs, read in them
    std::vector<int> cpus_;
    int linger_us_;
    bool is_caller_pinned_ = false;
};

template <class Task>
void Worker::share(std::int64_t num_tasks, Task&& task) {
    if (count == 1) {
        for (std::int64_t i = 0; i < num_tasks; ++i) task(i);
        return;
    }
    if (id < num_tasks) task(id);
    for (;;) {
        const std::int64_t i = count + pool_.next_task_.fetch_add(1, std::memory_order_relaxed);
        if (i >= num_tasks) return;
        task(i);
    }
}

}  // namespace penstock
