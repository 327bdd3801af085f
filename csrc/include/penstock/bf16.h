// bf16 <-> float32, one value at a time. Vector forms are the kernels' own.
//
// bf16 is the upper half of a float32. Rounding is to nearest, ties to even; NaN stays NaN (quiet),
// infinities stay.
#pragma once

#include <bit>
#include <cstdint>

namespace penstock {

using Bf16 = std::uint16_t;

// `always_inline`: also included by files compiled for one instruction set, whose copy must not become
// everybody's.
[[gnu::always_inline]] inline float to_float(Bf16 value) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(value) << 16);
}

[[gnu::always_inline]] inline Bf16 to_bf16(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    constexpr std::uint32_t infinity = 0x7f800000, quiet = 0x00400000;
    if ((bits & 0x7fffffff) > infinity) return static_cast<Bf16>((bits | quiet) >> 16);
    return static_cast<Bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace penstock
