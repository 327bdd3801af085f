// Vectors of float32 as wide as the registers of the instruction set that the including file is compiled for:
// 16, 8 or 4 lanes; and the few functions of them that the kernels need.
//
// Plain GCC/Clang vectors: one source, lowered by the compiler; intrinsics only where it cannot know (bf16
// rounding, masked loads). Everything lies in an anonymous namespace: each file gets its own, in its own
// instruction set.
//
// | function         | error against exact                                     |
// |------------------|---------------------------------------------------------|
// | exp_of           | relative 1e-7; 0 below -87.3, inf above 88.7            |
// | exp_of_nonpositive | the same, for arguments up to 0                      |
// | sigmoid_of       | relative 2e-7                                           |
// | tanh_of          | relative 2e-7                                           |
// | normal_cdf_of    | absolute 2e-7, and relative 2e-5 down to -12             |
//
// NaN gives NaN in each of them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace penstock {
namespace {

#if defined(__AVX512F__)
#define PENSTOCK_LANES 16
#elif defined(__AVX2__)
#define PENSTOCK_LANES 8
#else
#define PENSTOCK_LANES 4
#endif

constexpr int lanes = PENSTOCK_LANES;

typedef float F32 __attribute__((vector_size(PENSTOCK_LANES * 4)));
typedef std::int32_t I32 __attribute__((vector_size(PENSTOCK_LANES * 4)));
typedef std::uint32_t U32 __attribute__((vector_size(PENSTOCK_LANES * 4)));
typedef std::uint16_t U16 __attribute__((vector_size(PENSTOCK_LANES * 2)));
typedef std::int8_t I8 __attribute__((vector_size(PENSTOCK_LANES)));

#define PENSTOCK_INLINE [[gnu::always_inline, maybe_unused]] inline

PENSTOCK_INLINE F32 splat(float value) { return F32{} + value; }

PENSTOCK_INLINE F32 load(const float* from) {
    F32 v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

PENSTOCK_INLINE void store(float* to, F32 v) { std::memcpy(to, &v, sizeof v); }

// The first `n` of `lanes` values, the rest 0; reads nothing behind them.
PENSTOCK_INLINE F32 load_first(const float* from, int n) {
#if defined(__AVX512F__)
    return (F32)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), from);
#else
    F32 v{};
    for (int i = 0; i < n; ++i) v[i] = from[i];
    return v;
#endif
}

PENSTOCK_INLINE void store_first(float* to, F32 v, int n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
#else
    for (int i = 0; i < n; ++i) to[i] = v[i];
#endif
}

PENSTOCK_INLINE F32 widen(U16 v) {
#if defined(__AVX512F__)
    // The masked form with a full mask: GCC 12 warns about the plain one's own header.
    const U32 wide = (U32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
#elif defined(__AVX2__)
    const U32 wide = (U32)_mm256_cvtepu16_epi32((__m128i)v);
#else
    const U32 wide = __builtin_convertvector(v, U32);
#endif
    return (F32)(wide << 16);
}

PENSTOCK_INLINE F32 load(const std::uint16_t* bf16) {
    U16 v;
    std::memcpy(&v, bf16, sizeof v);
    return widen(v);
}

PENSTOCK_INLINE F32 load_first(const std::uint16_t* bf16, int n) {
    U16 v{};
    for (int i = 0; i < n; ++i) v[i] = bf16[i];
    return widen(v);
}

// Round to bf16: to nearest, ties to even; NaN stays NaN.
PENSTOCK_INLINE U16 narrow(F32 v) {
#if defined(__AVX512BF16__)
    return (U16)_mm512_cvtneps_pbh((__m512)v);
#else
    const U32 bits = (U32)v;
    const U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const U32 quiet = (bits >> 16) | 0x40;
    const U32 chosen = (bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded;
#if defined(__AVX2__)
    const __m128i low = _mm256_castsi256_si128((__m256i)chosen),
                  high = _mm256_extracti128_si256((__m256i)chosen, 1);
    return (U16)_mm_packus_epi32(low, high);
#else
    return __builtin_convertvector(chosen, U16);
#endif
#endif
}

PENSTOCK_INLINE void store(std::uint16_t* bf16, F32 v) {
    const U16 half = narrow(v);
    std::memcpy(bf16, &half, sizeof half);
}

PENSTOCK_INLINE void store_first(std::uint16_t* bf16, F32 v, int n) {
    const U16 half = narrow(v);
    for (int i = 0; i < n; ++i) bf16[i] = half[i];
}

PENSTOCK_INLINE F32 larger(F32 a, F32 b) { return a > b ? a : b; }
PENSTOCK_INLINE F32 smaller(F32 a, F32 b) { return a < b ? a : b; }
PENSTOCK_INLINE F32 magnitude(F32 v) { return (F32)((U32)v & 0x7fffffff); }

// The lanes' sum, in one fixed order.
PENSTOCK_INLINE float sum_of(F32 v) {
    float part[lanes];
    store(part, v);
    for (int half = lanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) part[i] += part[i + half];
    }
    return part[0];
}

PENSTOCK_INLINE float largest_of(F32 v) {
    float largest = v[0];
    for (int i = 1; i < lanes; ++i) largest = v[i] > largest ? v[i] : largest;
    return largest;
}

// 1.5 * 2^23: adding it leaves the nearest integer (ties to even) in the low bits, for |v| < 2^22.
constexpr float round_magic = 12582912.0f;

PENSTOCK_INLINE I32 round_to_int(F32 v) { return (I32)(v + round_magic) - 0x4b400000; }

// e^v. v = n ln 2 + r, |r| <= ln(2) / 2; e^r by a polynomial of degree 7, times 2^n by the exponent's bits.
// Source: Moshier, Cephes mathematical library, expf.
// e^v = factor * 2^n, with n in the low bits of `shifted` (the magic number is added to it).
struct Exponential {
    F32 factor;
    F32 shifted;
};

PENSTOCK_INLINE Exponential exponential_of(F32 v) {
    const F32 shifted = v * 1.44269504f + round_magic;
    const F32 n = shifted - round_magic;
    const F32 r = (v - n * 0.693359375f) - n * -2.12194440e-4f;
    F32 p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return {p * (r * r) + r + 1.0f, shifted};
}

constexpr float exp_lowest = -87.3365447f, exp_highest = 88.7228394f;  // ln of the least normal and the largest float

PENSTOCK_INLINE F32 exp_of(F32 v) {
    const F32 x = v < exp_lowest ? splat(exp_lowest) : (v > exp_highest ? splat(exp_highest) : v);
    const Exponential e = exponential_of(x);
    // 2^n in two factors: 2^128 is no float, but e^88.7 is.
    const I32 power = (I32)e.shifted - 0x4b400000;
    const I32 half = power >> 1;
    const F32 y = e.factor * (F32)((half + 127) << 23) * (F32)((power - half + 127) << 23);
    const F32 bounded = v > exp_highest ? splat(__builtin_inff()) : y;
    return v < exp_lowest ? F32{} : bounded;
}

// e^v for v <= 0, with half the instructions: no upper bound, and 2^n, a normal number, is added to the
// exponent.
PENSTOCK_INLINE F32 exp_of_nonpositive(F32 v) {
    const Exponential e = exponential_of(v < exp_lowest ? splat(exp_lowest) : v);
    const F32 y = (F32)((U32)e.factor + ((U32)e.shifted << 23));  // what the magic number adds is shifted out
    return v < exp_lowest ? F32{} : y;
}

PENSTOCK_INLINE F32 sigmoid_of(F32 v) { return 1.0f / (1.0f + exp_of(-v)); }

// Near 0 an odd polynomial (Cephes, tanhf), else by e^2|v|.
PENSTOCK_INLINE F32 tanh_of(F32 v) {
    const F32 a = magnitude(v);
    const F32 z = v * v;
    F32 p = splat(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    const F32 small = p * z * v + v;
    const F32 large = 1.0f - 2.0f / (exp_of(a + a) + 1.0f);
    const F32 is_signed = (F32)((U32)large | ((U32)v & 0x80000000u));
    return a < 0.625f ? small : is_signed;
}

// The standard normal distribution's CDF, (1 + erf(v / sqrt 2)) / 2: for v < 0 half of erfc(|v| / sqrt 2),
// whose relative error stays small far into the tail. Source: Press et al., Numerical Recipes in C (1992),
// section 6.2, the Chebyshev fit of ln(erfc(a) / t) + a^2.
PENSTOCK_INLINE F32 normal_cdf_of(F32 v) {
    const F32 a = magnitude(v) * 0.707106781f;
    const F32 t = 1.0f / (1.0f + 0.5f * a);
    F32 p = splat(0.17087277f);
    p = p * t - 0.82215223f;
    p = p * t + 1.48851587f;
    p = p * t - 1.13520398f;
    p = p * t + 0.27886807f;
    p = p * t - 0.18628806f;
    p = p * t + 0.09678418f;
    p = p * t + 0.37409196f;
    p = p * t + 1.00002368f;
    p = p * t - 1.26551223f;
    const F32 tail = 0.5f * t * exp_of(p - a * a);
    return v < 0.0f ? tail : 1.0f - tail;
}

// silu: v sigmoid(v). gelu: v Phi(v). gelu_tanh: v sigmoid(2 sqrt(2 / pi) (v + 0.044715 v^3)), which is the
// tanh form because (1 + tanh(u)) / 2 = sigmoid(2 u).
PENSTOCK_INLINE F32 silu_of(F32 v) { return v * sigmoid_of(v); }
PENSTOCK_INLINE F32 gelu_of(F32 v) { return v * normal_cdf_of(v); }
PENSTOCK_INLINE F32 gelu_tanh_of(F32 v) { return v * sigmoid_of(1.59576912f * (v + 0.044715f * v * v * v)); }

}  // namespace
}  // namespace penstock
