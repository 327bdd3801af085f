// The probes for AVX2: int8 by the pair of instructions that AVX2 has for it (products of bytes to int16,
// then int32).
#include "read.inl"

namespace penstock {
namespace {

double burst_int8(float* sink) {
    __m256i sums[chains];
    for_each_chain([&](auto i) { sums[i] = _mm256_setzero_si256(); });
    const __m256i a = _mm256_set1_epi32(static_cast<int>(sink[0])),
                  b = _mm256_set1_epi32(static_cast<int>(sink[1]));
    const __m256i ones = _mm256_set1_epi16(1);
    for (int round = 0; round < burst_rounds; ++round) {
        for_each_chain([&](auto i) {
            __m256i pairs;
            asm volatile("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
                         : "+x"(sums[i]), "=&x"(pairs)
                         : "x"(a), "x"(b), "x"(ones));
        });
    }
    I32 total{};
    for_each_chain([&](auto i) { total ^= (I32)sums[i]; });
    sink[0] = static_cast<float>(total[0]) * 0.0f;
    return 2.0 * 32 * chains * burst_rounds;
}

}  // namespace

const ProbeKernels& probe_kernels_avx2() {
    static constexpr ProbeKernels kernels{read_streamwise, nullptr, burst_int8, burst_f32};
    return kernels;
}

}  // namespace penstock
