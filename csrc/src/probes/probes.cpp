// Who runs the probes' loops, and the clock. See probes.h.
#include "penstock/probes.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "penstock/huge_buffer.h"

namespace penstock {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::int64_t slice_alignment = 4096;

const ProbeKernels& probe_kernels(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::amx) return probe_kernels_amx();
    if (isa >= Isa::avx512) return probe_kernels_avx512();
    if (isa == Isa::avx2) return probe_kernels_avx2();
#else
    (void)isa;
#endif
    return probe_kernels_scalar();
}

Burst burst_of(const ProbeKernels& kernels, MultiplyType type) {
    switch (type) {
        case MultiplyType::bf16: return kernels.bf16;
        case MultiplyType::int8: return kernels.int8;
        case MultiplyType::f32: return kernels.f32;
    }
    return nullptr;
}

double seconds_since(Clock::time_point began) {
    return std::chrono::duration<double>(Clock::now() - began).count();
}

}  // namespace

double read_bandwidth(Pool& pool, std::int64_t num_bytes, int passes) {
    const std::int64_t slice = num_bytes / pool.num_threads() / slice_alignment * slice_alignment;
    if (slice < (std::int64_t{1} << 20))
        throw std::invalid_argument("num_bytes must be at least 1 MiB a thread");
    if (passes < 1) throw std::invalid_argument("passes must be 1 or more");
    const HugeBuffer buffer(static_cast<std::size_t>(slice * pool.num_threads()));
    const ProbeKernels& kernels = probe_kernels(supported_isas().back());
    std::vector<std::uint64_t> seen(static_cast<std::size_t>(pool.num_threads()) * 8);  // a cache line each
    double best_s = 1e9;
    pool.run([&](Worker& worker) {
        std::byte* own = buffer.data() + worker.id * slice;
        std::fill_n(own, slice, static_cast<std::byte>(worker.id + 1));  // not the one shared page of zeros
        for (int pass = 0; pass < passes; ++pass) {
            worker.barrier();
            const auto began = Clock::now();
            seen[static_cast<std::size_t>(worker.id) * 8] ^= kernels.read(own, slice);
            worker.barrier();
            if (worker.id == 0) best_s = std::min(best_s, seconds_since(began));
        }
    });
    return static_cast<double>(slice * pool.num_threads()) / best_s;
}

double multiply_peak(Pool& pool, Isa isa, MultiplyType type, double seconds) {
    const Burst burst = burst_of(probe_kernels(isa), type);
    if (isa == Isa::amx_emulated || !burst) {
        throw std::invalid_argument("there is no such multiplication in " + std::string(isa_name(isa)));
    }
    std::vector<double> rates(static_cast<std::size_t>(pool.num_threads()) * 8);
    pool.run([&](Worker& worker) {
        float sink[2] = {1.0f, 1.0f};
        worker.barrier();
        const auto began = Clock::now();
        double operations = 0, elapsed_s = 0;
        while (elapsed_s < seconds) {
            operations += burst(sink);
            elapsed_s = seconds_since(began);
        }
        rates[static_cast<std::size_t>(worker.id) * 8] = operations / elapsed_s;
    });
    double total = 0;
    for (double rate : rates) total += rate;
    return total;
}

}  // namespace penstock
