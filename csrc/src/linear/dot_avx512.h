// The AVX-512 dot instructions, for files compiled with them.
//
// Spelled out: GCC 12 turns the intrinsics, in a loop over many sums, into a copy of every sum before and
// after each instruction (the loop takes 1.7 times as long); with the operands tied here it keeps them in
// place.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace penstock {
namespace {

// sums + four products of unsigned and signed bytes, in each 32 bits.
[[gnu::always_inline, maybe_unused]] inline __m512i dot(__m512i sums, __m512i unsigned_bytes,
                                                        __m512i signed_bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(signed_bytes));
    return sums;
}

// sums + two products of bf16 values, in each 32 bits.
[[gnu::always_inline, maybe_unused]] inline __m512 dot(__m512 sums, __m512i a, __m512i b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
    return sums;
}

// Without _mm512_cvtepi32_ps, of which GCC 12 warns that it reads an uninitialized register.
[[gnu::always_inline, maybe_unused]] inline __m512 to_floats(__m512i integers) {
    typedef std::int32_t Integers __attribute__((vector_size(64)));
    return __builtin_convertvector((Integers)integers, __m512);
}

}  // namespace
}  // namespace penstock
