// float32 <-> float16 without instructions for it: the scales of int4 weights. To nearest, ties to even;
// subnormals kept.
#pragma once

#include <bit>
#include <cstdint>

namespace penstock {

using Float16 = std::uint16_t;

// Beyond the largest float16 the result is infinity; NaN stays NaN.
[[gnu::always_inline]] inline Float16 to_float16(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000;
    const std::uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return static_cast<Float16>(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return static_cast<Float16>(sign | 0x7c00);  // 65520 and more round up to infinity
    if (magnitude < 0x38800000) {                                             // below 2^-14: a multiple of 2^-24
        // 0.5f's last bit is worth 2^-24: the addition rounds as wanted.
        const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
        return static_cast<Float16>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3f000000));
    }
    const std::uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    return static_cast<Float16>(sign | ((rounded - 0x38000000) >> 13));
}

[[gnu::always_inline]] inline float from_float16(Float16 value) {
    const std::uint32_t sign = static_cast<std::uint32_t>(value & 0x8000) << 16;
    const std::uint32_t magnitude = value & 0x7fffu;
    if (magnitude >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | (magnitude << 13));
    // Exponents are 112 apart; a product with 2^112 moves them, subnormals included.
    const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(scaled) | sign);
}

}  // namespace penstock
