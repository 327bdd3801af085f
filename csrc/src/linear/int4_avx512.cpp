// int8 rows x int4 weights with AVX-512 VNNI. The formula is int4_scalar.cpp's.
//
// The stored nibbles, q + 8, are the unsigned side of `vpdpbusd` as they are. 64 bytes hold 16 features x 8
// inputs:
//
// ```
// byte j of a feature   & 15 -> inputs 0..3      >> 4 & 15 -> inputs 4..7
// ```
//
// A tile is up to 6 rows x 32 features: 12 registers of integers for the group, 12 of floats for the whole
// row. Eight inputs cost six instructions of unpacking, for 4 products a row.
#include "dot_avx512.h"

#include "int4_panel.h"
#include "kernels.h"
#include "row_tiles.h"

namespace penstock {

namespace {

constexpr int most_rows = 6;

struct Nibbles {
    __m512i low, high;
};

[[gnu::always_inline]] inline Nibbles load_nibbles(const std::uint8_t* w) {
    const __m512i bytes = _mm512_load_si512(w), mask = _mm512_set1_epi8(15);
    return {_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask)};
}

[[gnu::always_inline]] inline __m512i four_inputs(const std::int8_t* x) {
    std::int32_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
}

[[gnu::always_inline]] inline __m512 load_scales(const Float16* scales) {
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
}

// Eight inputs of each row x 32 features.
template <int rows>
[[gnu::always_inline]] inline void multiply_step(const std::int8_t* const (&x)[rows], int k,
                                                 const std::uint8_t* w, __m512i (&sums)[rows][2]) {
    const Nibbles w0 = load_nibbles(w), w1 = load_nibbles(w + 64);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
        const __m512i first = four_inputs(x[r] + k), second = four_inputs(x[r] + k + 4);
        sums[r][0] = dot(sums[r][0], w0.low, first);
        sums[r][1] = dot(sums[r][1], w1.low, first);
        sums[r][0] = dot(sums[r][0], w0.high, second);
        sums[r][1] = dot(sums[r][1], w1.high, second);
    }
}

template <int rows>
void multiply_tile(const Operand& x, std::int64_t first_row, const Int4Panel& panel, Ahead ahead,
                   float* out) {
    const std::int8_t* x_rows[rows];
    const std::int32_t* x_sums[rows];
    __m512 totals[rows][2];
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
        x_rows[r] = x.row<std::int8_t>(first_row + r);
        x_sums[r] = x.group_sums(first_row + r);
        totals[r][0] = totals[r][1] = _mm512_setzero_ps();
    }
    const std::uint8_t* w = panel.values;
    const Float16* scales = panel.scales;
    for (int k = 0; k < panel.inputs; scales += panel_features) {
        const int end = panel.group_end(k);
        __m512i sums[rows][2];
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r)
            sums[r][0] = sums[r][1] = _mm512_set1_epi32(int4_offset(x_sums[r], k, end));
        for (; k < end; k += 8, w += panel_features * 4) {
            ahead.ask();
            multiply_step<rows>(x_rows, k, w, sums);
        }
        for (int half = 0; half < 2; ++half) {
            const __m512 scale = load_scales(scales + half * 16);
#pragma GCC unroll 12
            for (int r = 0; r < rows; ++r) {
                totals[r][half] = _mm512_fmadd_ps(to_floats(sums[r][half]), scale, totals[r][half]);
            }
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
        const __m512 x_scale = _mm512_set1_ps(x.scale(first_row + r));
        for (int half = 0; half < 2; ++half) {
            _mm512_store_ps(out + r * panel_features + half * 16, _mm512_mul_ps(totals[r][half], x_scale));
        }
    }
}

// 32 inputs of one row: a pair of sums for the low and one for the high nibbles, so that fewer instructions
// wait.
[[gnu::always_inline]] inline void multiply_32(const std::int8_t* x, const std::uint8_t* w, Ahead& ahead,
                                               __m512i (&sums)[2][2]) {
    for (int i = 0; i < 4; ++i, x += 8, w += panel_features * 4) {
        ahead.ask();
        const __m512i first = four_inputs(x), second = four_inputs(x + 4);
        for (int half = 0; half < 2; ++half) {
            const Nibbles nibbles = load_nibbles(w + half * 64);
            sums[half][0] = dot(sums[half][0], nibbles.low, first);
            sums[half][1] = dot(sums[half][1], nibbles.high, second);
        }
    }
}

template <>
void multiply_tile<1>(const Operand& x, std::int64_t first_row, const Int4Panel& panel, Ahead ahead,
                      float* out) {
    const auto* x_row = x.row<std::int8_t>(first_row);
    const std::int32_t* x_sums = x.group_sums(first_row);
    __m512 totals[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    const std::uint8_t* w = panel.values;
    const Float16* scales = panel.scales;
    for (int k = 0; k < panel.inputs; scales += panel_features) {
        const int end = panel.group_end(k);
        const __m512i offset = _mm512_set1_epi32(int4_offset(x_sums, k, end)), zero = _mm512_setzero_si512();
        __m512i sums[2][2] = {{offset, zero}, {offset, zero}};
        for (; k < end; k += 32, w += panel_features * 16) multiply_32(x_row + k, w, ahead, sums);
        for (int half = 0; half < 2; ++half) {
            const __m512 exact = to_floats(_mm512_add_epi32(sums[half][0], sums[half][1]));
            totals[half] = _mm512_fmadd_ps(exact, load_scales(scales + half * 16), totals[half]);
        }
    }
    const __m512 x_scale = _mm512_set1_ps(x.scale(first_row));
    for (int half = 0; half < 2; ++half)
        _mm512_store_ps(out + half * 16, _mm512_mul_ps(totals[half], x_scale));
}

}  // namespace

void multiply_int4_avx512(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w, int panel,
                          float* out) {
    const Int4Panel bound = int4_panel(w, panel);
    for_row_tiles<most_rows>(num_rows, [&]<int rows>(const RowTile& tile) {
        const Ahead ahead(bound.values, w.panel_bytes(), tile);
        multiply_tile<rows>(x, first_row + tile.first_row, bound, ahead,
                            out + tile.first_row * panel_features);
    });
}

}  // namespace penstock
