// A group of float32 weights to int4: matrix.h states the rule, this is it, in vectors of the including
// file's instruction set. Every one gives the same bits: sums are by halves at every width, and no product is
// fused with a sum.
//
// Searching pays: on trained weights the mean squared error is 0.72 (groups of 32) and 0.69 (128) of that by
// scale = max|w| / 7. Four times as many candidates take another 3 % off, least squares less than the five
// do.
#include <utility>

#include "int4_quantize.h"
#include "penstock/simd.h"

namespace penstock {
namespace {

constexpr int num_candidates = 5;
constexpr float divisors[8] = {-7.0f, -7.5f, -8.0f, -8.5f, -9.0f, -9.0f, -9.0f, -9.0f};  // a vector of 8

// The compiler sees a value of its own: what comes after is not contracted with what came before.
PENSTOCK_INLINE F32 rounded(F32 v) {
#if defined(__x86_64__)
    asm("" : "+x"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#endif
    return v;
}

// combine(lane i, lane i + half) for halves of the register down to one: what remains in lane 0.
template <int half = lanes / 2, class Combine>
PENSTOCK_INLINE float fold(F32 v, Combine&& combine) {
    const F32 moved = [&]<int... i>(std::integer_sequence<int, i...>) {
        return __builtin_shufflevector(v, v, (i + half) % lanes...);
    }(std::make_integer_sequence<int, lanes>{});
    const F32 folded = combine(v, moved);
    if constexpr (half > 1) {
        return fold<half / 2>(folded, combine);
    } else {
        return folded[0];
    }
}

template <int size>
struct Group {
    static constexpr int vectors = size / lanes;
    F32 weights[vectors];

    PENSTOCK_INLINE explicit Group(const float* values) {
        for (int v = 0; v < vectors; ++v) weights[v] = load(values + v * lanes);
    }

    // The value of greatest magnitude with its sign, the first among equals.
    PENSTOCK_INLINE float extreme() const {
        F32 highest = weights[0], lowest = weights[0];
        for (int v = 1; v < vectors; ++v) {
            highest = larger(highest, weights[v]);
            lowest = smaller(lowest, weights[v]);
        }
        const float high = fold(highest, larger), low = fold(lowest, smaller);
        if (high != -low) return high > -low ? high : low;
        return first_sign(high);
    }

    float first_sign(float extreme) const {
        for (int v = 0; v < vectors; ++v) {
            for (int i = 0; i < lanes; ++i) {
                if (weights[v][i] == extreme) return extreme;
                if (weights[v][i] == -extreme) return -extreme;
            }
        }
        return extreme;
    }

    PENSTOCK_INLINE static F32 quantize(F32 weight, float inverse) {
        const F32 q = (rounded(weight * inverse) + round_magic) - round_magic;
        return larger(smaller(q, splat(7.0f)), splat(-8.0f));
    }

    PENSTOCK_INLINE float error(float scale, float inverse) const {
        F32 squares[vectors];
        for (int v = 0; v < vectors; ++v) {
            const F32 difference = weights[v] - quantize(weights[v], inverse) * scale;  // the product is exact
            squares[v] = rounded(difference * difference);
        }
        for (int half = vectors / 2; half > 0; half /= 2) {
            for (int v = 0; v < half; ++v) squares[v] += squares[v + half];
        }
        return fold(squares[0], [](F32 a, F32 b) { return a + b; });
    }

    PENSTOCK_INLINE void store_nibbles(float inverse, std::uint32_t* words) const {
        alignas(64) std::int8_t nibbles[size];
        for (int v = 0; v < vectors; ++v) {
            const I32 stored = __builtin_convertvector(quantize(weights[v], inverse) + 8.0f, I32);
            const I8 bytes = __builtin_convertvector(stored, I8);
            std::memcpy(nibbles + v * lanes, &bytes, sizeof bytes);
        }
        for (int word = 0; word < size / 8; ++word) {
            std::uint32_t low, high;
            std::memcpy(&low, nibbles + word * 8, sizeof low);
            std::memcpy(&high, nibbles + word * 8 + 4, sizeof high);
            words[word] = low | high << 4;
        }
    }
};

struct Candidates {
    Float16 halves[8];
    float scales[8];
    float inverses[8];

    PENSTOCK_INLINE explicit Candidates(float extreme) {
        for (int i = 0; i < 8; ++i) scales[i] = extreme / divisors[i];
#if defined(__F16C__)
        const __m128i rounded_scales = _mm256_cvtps_ph(_mm256_loadu_ps(scales), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(halves), rounded_scales);
        _mm256_storeu_ps(scales, _mm256_cvtph_ps(rounded_scales));
#else
        for (int i = 0; i < 8; ++i) halves[i] = to_float16(scales[i]);
        for (int i = 0; i < 8; ++i) scales[i] = from_float16(halves[i]);
#endif
        for (int i = 0; i < 8; ++i) inverses[i] = scales[i] == 0.0f ? 0.0f : 1.0f / scales[i];
    }
};

template <int size>
Float16 quantize_group(const float* values, std::uint32_t* words) {
    const Group<size> group(values);
    const Candidates candidates(group.extreme());
    int best = 0;
    float least = group.error(candidates.scales[0], candidates.inverses[0]);
    for (int i = 1; i < num_candidates; ++i) {
        const float error = group.error(candidates.scales[i], candidates.inverses[i]);
        best = error < least ? i : best;
        least = error < least ? error : least;
    }
    group.store_nibbles(candidates.inverses[best], words);
    return candidates.halves[best];
}

[[maybe_unused]] constexpr Int4Quantize quantize_groups{quantize_group<32>, quantize_group<64>,
                                                        quantize_group<128>};

}  // namespace
}  // namespace penstock
