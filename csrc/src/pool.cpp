// See pool.h.
#include "penstock/pool.h"

#include <chrono>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace penstock {

namespace {

// About 15 us of polite spinning: longer than the usual imbalance of an operation. Whoever waits longer waits
// for a thread that was preempted; asleep it leaves its core to that thread or to whatever preempted it.
// (Yielding in a loop instead kept the core busy, and 64 streams over HTTP ran at half the speed.)
constexpr int spins_before_sleep = 1000;

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

void pin_this_thread(const std::vector<int>& cpus, int id) {
#if defined(__linux__)
    if (cpus.empty()) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpus[static_cast<std::size_t>(id) % cpus.size()], &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
#else
    (void)cpus;
    (void)id;
#endif
}

}  // namespace

void Worker::barrier(const std::vector<Memory>* reads) {
    if (count == 1) return;
    ahead_.aim(reads);
    Pool& pool = pool_;
    const std::uint32_t phase = pool.phase_.load(std::memory_order_acquire);
    if (pool.arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
        pool.arrived_.store(0, std::memory_order_relaxed);
        pool.next_task_.store(0, std::memory_order_relaxed);
        pool.phase_.store(phase + 1, std::memory_order_release);
        pool.phase_.notify_all();
        return;
    }
    for (int spins = 0; pool.phase_.load(std::memory_order_acquire) == phase; ++spins) {
        if (ahead_.ask()) {
            continue;
        } else if (spins < spins_before_sleep) {
            pause();
        } else {
            pool.phase_.wait(phase, std::memory_order_acquire);
        }
    }
}

Pool::Pool(int threads, std::vector<int> cpus, int linger_us)
    : cpus_(std::move(cpus)), linger_us_(linger_us) {
    for (int id = 0; id < threads; ++id) workers_.push_back(std::make_unique<Worker>(*this, id, threads));
    for (int id = 1; id < threads; ++id) threads_.emplace_back([this, id] { serve(id); });
}

Pool::~Pool() {
    is_stopping_.store(true, std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

void Pool::run(const std::function<void(Worker&)>& job) {
    if (!is_caller_pinned_) {
        pin_this_thread(cpus_, 0);
        is_caller_pinned_ = true;
    }
    job_ = &job;
    next_task_.store(0, std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    if (!threads_.empty()) epoch_.notify_all();
    job(*workers_[0]);
    workers_[0]->barrier();  // nobody leaves a job while another is still in it
}

void Pool::reserve_scratch(std::size_t bytes) {
    for (const auto& worker : workers_) {
        if (worker->scratch_.size() < bytes) worker->scratch_ = HugeBuffer(bytes);
    }
}

void Pool::read_between_jobs(std::shared_ptr<SharedReads> reads) {
    if (reads) reads->restart();
    reads_ = std::move(reads);
}

void Pool::serve(int id) {
    pin_this_thread(cpus_, id);
    std::uint32_t seen = 0;
    std::shared_ptr<SharedReads> reads;
    while (wait_for_job(seen, reads.get())) {
        ++seen;
        (*job_)(*workers_[static_cast<std::size_t>(id)]);
        reads = reads_;  // before the barrier, behind which the caller may change it
        workers_[static_cast<std::size_t>(id)]->barrier();
    }
}

// True when the job after number `seen` is there, false to stop.
bool Pool::wait_for_job(std::uint32_t seen, SharedReads* reads) {
    using Clock = std::chrono::steady_clock;
    while (reads && epoch_.load(std::memory_order_acquire) == seen && reads->ask()) {
    }
    const auto until = Clock::now() + std::chrono::microseconds(linger_us_);
    while (epoch_.load(std::memory_order_acquire) == seen) {
        if (Clock::now() < until) {
            for (int i = 0; i < 16; ++i) pause();
        } else {
            epoch_.wait(seen, std::memory_order_acquire);
        }
    }
    return !is_stopping_.load(std::memory_order_relaxed);
}

}  // namespace penstock
