// int8 rows x int4 weights with AVX2. The formula is int4_scalar.cpp's.
//
// The stored nibbles, q + 8, are the unsigned side of `vpmaddubsw`, which adds pairs of products in 16 bits.
// A pair is at most 2 * 15 * 127 = 3,810, so that the eight pairs which 32 inputs give a lane still fit
// (30,480); then `vpmaddwd` by ones takes them to 32 bits. A tile is 3 rows x 16 features or fewer rows x 32;
// with a fourth row GCC keeps sums on the stack.
#include <immintrin.h>

#include "int4_panel.h"
#include "kernels.h"
#include "row_tiles.h"

namespace penstock {

namespace {

constexpr int most_rows = 3;
constexpr int prefetch_bytes = 2048;
constexpr int inputs_16_bits_hold = 32;
constexpr int step_bytes = panel_features * 4;  // eight inputs of the panel

[[gnu::always_inline]] inline __m256i four_inputs(const std::int8_t* x) {
    std::int32_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm256_set1_epi32(four);
}

[[gnu::always_inline]] inline __m256 load_scales(const Float16* scales) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
}

// Eight inputs of each row x 8 features for each vector.
template <int rows, int vectors>
[[gnu::always_inline]] inline void multiply_step(const std::int8_t* const (&x)[rows], int k,
                                                 const std::uint8_t* w, __m256i (&pairs)[rows][vectors]) {
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i low[vectors], high[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
        const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(w) + v);
        low[v] = _mm256_and_si256(bytes, mask);
        high[v] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
        const __m256i first = four_inputs(x[r] + k), second = four_inputs(x[r] + k + 4);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            const __m256i lower = _mm256_maddubs_epi16(low[v], first);
            const __m256i upper = _mm256_maddubs_epi16(high[v], second);
            pairs[r][v] = _mm256_add_epi16(pairs[r][v], _mm256_add_epi16(lower, upper));
        }
    }
}

// sums += the products of 32 inputs.
template <int rows, int vectors>
[[gnu::always_inline]] inline void multiply_32(const std::int8_t* const (&x)[rows], int k,
                                               const std::uint8_t* w, __m256i (&sums)[rows][vectors]) {
    __m256i pairs[rows][vectors] = {};
// Not unrolled: GCC would gather the products of all four steps before it adds them, and spill.
#pragma GCC unroll 1
    for (int end = k + inputs_16_bits_hold; k < end; k += 8, w += step_bytes) {
        _mm_prefetch(w + prefetch_bytes, _MM_HINT_T0);
        if constexpr (vectors == 4) _mm_prefetch(w + prefetch_bytes + 64, _MM_HINT_T0);
        multiply_step<rows, vectors>(x, k, w, pairs);
    }
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            sums[r][v] = _mm256_add_epi32(sums[r][v], _mm256_madd_epi16(pairs[r][v], ones));
        }
    }
}

// `vectors` times 8 features from `first` on.
template <int rows, int vectors>
void multiply_features(const Operand& x, std::int64_t first_row, const Int4Panel& panel, int first,
                       float* out) {
    const std::int8_t* x_rows[rows];
    __m256 totals[rows][vectors] = {};
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) x_rows[r] = x.row<std::int8_t>(first_row + r);
    const std::uint8_t* w = panel.values + first * 4;
    const Float16* scales = panel.scales + first;
    for (int k = 0; k < panel.inputs; scales += panel_features) {
        const int end = panel.group_end(k);
        __m256i sums[rows][vectors];
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
            const __m256i offset = _mm256_set1_epi32(int4_offset(x.group_sums(first_row + r), k, end));
            std::fill_n(sums[r], vectors, offset);
        }
        for (; k < end; k += inputs_16_bits_hold, w += step_bytes * inputs_16_bits_hold / 8) {
            multiply_32<rows, vectors>(x_rows, k, w, sums);
        }
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            const __m256 scale = load_scales(scales + v * 8);
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) {
                totals[r][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[r][v]), scale, totals[r][v]);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
        const __m256 x_scale = _mm256_set1_ps(x.scale(first_row + r));
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            _mm256_store_ps(out + r * panel_features + first + v * 8, _mm256_mul_ps(totals[r][v], x_scale));
        }
    }
}

template <int rows>
void multiply_tile(const Operand& x, std::int64_t first_row, const Int4Panel& panel, float* out) {
    constexpr int vectors = rows > 2 ? 2 : 4;
    for (int first = 0; first < panel_features; first += vectors * 8) {
        multiply_features<rows, vectors>(x, first_row, panel, first, out);
    }
}

}  // namespace

void multiply_int4_avx2(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w, int panel,
                        float* out) {
    const Int4Panel bound = int4_panel(w, panel);
    for_row_tiles<most_rows>(num_rows, [&]<int rows>(const RowTile& tile) {
        multiply_tile<rows>(x, first_row + tile.first_row, bound, out + tile.first_row * panel_features);
    });
}

}  // namespace penstock
