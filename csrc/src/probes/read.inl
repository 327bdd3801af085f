// Reading memory as fast as the cores ask for it; included once for each instruction set.
#include <utility>

#include "kernels.h"
#include "penstock/simd.h"

namespace penstock {
namespace {

// Streams a thread: the hardware prefetcher follows each of them on its own.
constexpr int read_streams = 8;
constexpr int read_unroll = 8;

std::uint64_t read_streamwise(const std::byte* data, std::int64_t num_bytes) {
    constexpr std::int64_t step = read_unroll * sizeof(I32);
    const std::int64_t part = num_bytes / read_streams / step * step;
    I32 seen[read_unroll] = {};
    for (std::int64_t at = 0; at < part; at += step) {
        for (int s = 0; s < read_streams; ++s) {
            const std::byte* from = data + s * part + at;
            for (int i = 0; i < read_unroll; ++i) {
                I32 v;
                std::memcpy(&v, from + i * sizeof(I32), sizeof v);
                seen[i] ^= v;
            }
        }
    }
    for (int i = 1; i < read_unroll; ++i) seen[0] ^= seen[i];
    std::uint64_t result = 0;
    for (int i = 0; i < lanes; ++i) result = result * 31 + static_cast<std::uint32_t>(seen[0][i]);
    return result;
}

// Rounds in one burst, some tens of microseconds.
constexpr int burst_rounds = 20000;

// Independent chains that hide the latency of a multiply-add: latency (4 or 5 cycles) times units (2), and
// some more; all of them fit into 16 registers (12) or 32 (24).
#if defined(__AVX512F__)
constexpr int chains = 24;
#else
constexpr int chains = 12;
#endif

// f(0), f(1) ... f(chains - 1) with constants: an array that nothing else indexes stays in registers.
template <class Function>
PENSTOCK_INLINE void for_each_chain(Function f) {
    [&]<int... Index>(std::integer_sequence<int, Index...>) __attribute__((always_inline)) {
        (f(std::integral_constant<int, Index>{}), ...);
    }(std::make_integer_sequence<int, chains>{});
}

// The instruction itself: written as arithmetic, the compiler folds the rounds or moves the sums about.
PENSTOCK_INLINE void multiply_add(F32& sum, F32 a, F32 b) {
#if defined(__AVX2__)
    asm volatile("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#elif defined(__x86_64__)
    asm volatile("mulps %2, %1\n\taddps %1, %0" : "+x"(sum), "+x"(a) : "x"(b));
#else
    sum += a * b;
    asm volatile("" : "+w"(sum));
#endif
}

double burst_f32(float* sink) {
    F32 sums[chains];
    for_each_chain([&](auto i) { sums[i] = F32{}; });
    const F32 a = splat(sink[0]), b = splat(sink[1]);
    for (int round = 0; round < burst_rounds; ++round) {
        for_each_chain([&](auto i) { multiply_add(sums[i], a, b); });
    }
    F32 total{};
    for_each_chain([&](auto i) { total += sums[i]; });
    sink[0] = sum_of(total) * 0.0f;
    return 2.0 * lanes * chains * burst_rounds;
}

}  // namespace
}  // namespace penstock
