// Reading a weight's source in runs of values of one row, and the arithmetic that quantizing shares.
//
// Everything is float32, and every step is one rounding: a torch version repeats it bit for bit.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

#include "pack.h"

namespace penstock {

// Values [first, first + count) of row n as float32, then zeros up to `size`.
[[gnu::always_inline]] inline void read_row(const Plain& plain, std::int64_t n, std::int64_t first, int count,
                                            int size, float* out) {
    if (plain.dtype == DType::bf16 && plain.col_stride == 1) {
        const Bf16* row = static_cast<const Bf16*>(plain.data) + n * plain.row_stride + first;
        for (int i = 0; i < count; ++i) out[i] = to_float(row[i]);
    } else {
        for (int i = 0; i < count; ++i) out[i] = plain_value(plain, n, first + i);
    }
    for (int i = count; i < size; ++i) out[i] = 0.0f;
}

// The greatest |value| as the bits of a float32, which order like the magnitudes; infinity and NaN are the
// greatest.
[[gnu::always_inline]] inline std::int32_t largest_magnitude_bits(const float* values, int count) {
    std::int32_t largest = 0;
    for (int i = 0; i < count; ++i) {
        const std::int32_t bits = std::bit_cast<std::int32_t>(values[i]) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

// Round to the nearest integer, ties to even, for |value| < 2^22: 1.5 * 2^23 pushes the fraction out of the
// float.
[[gnu::always_inline]] inline float nearest_even(float value) {
    constexpr float magic = 12582912.0f;
    return (value + magic) - magic;
}

}  // namespace penstock
