// The probes for AVX-512 with BF16 and VNNI.
#include "read.inl"

namespace penstock {
namespace {

// The instructions are spelled out: through intrinsics GCC 12 copies the sums to the stack and back.
double burst_bf16(float* sink) {
    __m512 sums[chains];
    for_each_chain([&](auto i) { sums[i] = _mm512_setzero_ps(); });
    const __m512 a = _mm512_set1_ps(sink[0]), b = _mm512_set1_ps(sink[1]);
    for (int round = 0; round < burst_rounds; ++round) {
        for_each_chain([&](auto i) {
            asm volatile("vdpbf16ps %2, %1, %0" : "+v"(sums[i]) : "v"(a), "v"(b));
        });
    }
    F32 total{};
    for_each_chain([&](auto i) { total += (F32)sums[i]; });
    sink[0] = sum_of(total) * 0.0f;
    return 2.0 * 32 * chains * burst_rounds;
}

double burst_int8(float* sink) {
    __m512i sums[chains];
    for_each_chain([&](auto i) { sums[i] = _mm512_setzero_si512(); });
    const __m512i a = _mm512_set1_epi32(static_cast<int>(sink[0])),
                  b = _mm512_set1_epi32(static_cast<int>(sink[1]));
    for (int round = 0; round < burst_rounds; ++round) {
        for_each_chain([&](auto i) { asm volatile("vpdpbusd %2, %1, %0" : "+v"(sums[i]) : "v"(a), "v"(b)); });
    }
    I32 total{};
    for_each_chain([&](auto i) { total ^= (I32)sums[i]; });
    sink[0] = static_cast<float>(total[0]) * 0.0f;
    return 2.0 * 64 * chains * burst_rounds;
}

}  // namespace

const ProbeKernels& probe_kernels_avx512() {
    static constexpr ProbeKernels kernels{read_streamwise, burst_bf16, burst_int8, burst_f32};
    return kernels;
}

}  // namespace penstock
