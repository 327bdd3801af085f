// bf16 rows x int4 weights with AVX-512: nibbles widened to bf16 by a table, then bf16 dots.
//
// ```
// out[f] = sum_g (sum_{k in g} x[k] * q[f][k]) * scale[g][f]              q in [-8, 7] is exact in bf16
// ```
//
// `vpermw` looks 32 words up by the low five bits of each index. The table has 16 entries, twice, so that a
// fifth bit does not matter, and an index word may carry anything above:
//
// ```
// bytes b0 b1 b2 b3 of a lane   words (b0, b1)        -> inputs 0, 1        words >> 4 -> inputs 4, 5
//                               words (b2, b3)        -> inputs 2, 3        words >> 4 -> inputs 6, 7
// ```
//
// Eight instructions for 128 weights, shared by up to 6 rows (12 registers for the group, 12 for the whole
// row).
#include "dot_avx512.h"
#include "int4_panel.h"
#include "kernels.h"
#include "row_tiles.h"

namespace penstock {

namespace {

constexpr int most_rows = 6;

// bf16 of -8 to 7, twice.
alignas(64) constexpr std::uint16_t bf16_of_nibble[32] = {
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,  //
    0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,  //
    0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};

// The four pairs of inputs of 16 features: (0, 1), (2, 3), (4, 5), (6, 7).
struct Pairs {
    __m512i of[4];
};

[[gnu::always_inline]] inline Pairs load_pairs(const std::uint8_t* w) {
    const __m512i bytes = _mm512_load_si512(w), table = _mm512_load_si512(bf16_of_nibble);
    // Byte 0 (2) to byte 0, byte 1 (3) to byte 2 of each lane; -1 gives a zero byte.
    const __m512i first =
        _mm512_shuffle_epi8(bytes, _mm512_set4_epi32(0xff0dff0c, 0xff09ff08, 0xff05ff04, 0xff01ff00));
    const __m512i second =
        _mm512_shuffle_epi8(bytes, _mm512_set4_epi32(0xff0fff0e, 0xff0bff0a, 0xff07ff06, 0xff03ff02));
    return {{_mm512_permutexvar_epi16(first, table), _mm512_permutexvar_epi16(second, table),
             _mm512_permutexvar_epi16(_mm512_srli_epi16(first, 4), table),
             _mm512_permutexvar_epi16(_mm512_srli_epi16(second, 4), table)}};
}

[[gnu::always_inline]] inline __m512i two_inputs(const std::uint16_t* x) {
    std::int32_t two;
    std::memcpy(&two, x, sizeof two);
    return _mm512_set1_epi32(two);
}

template <int rows>
[[gnu::always_inline]] inline void multiply_step(const std::uint16_t* const (&x)[rows], int k,
                                                 const std::uint8_t* w, __m512 (&sums)[rows][2]) {
    const Pairs w0 = load_pairs(w), w1 = load_pairs(w + 64);
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair) {
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r) {
            const __m512i two = two_inputs(x[r] + k + pair * 2);
            sums[r][0] = dot(sums[r][0], two, w0.of[pair]);
            sums[r][1] = dot(sums[r][1], two, w1.of[pair]);
        }
    }
}

[[gnu::always_inline]] inline __m512 load_scales(const Float16* scales) {
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
}

template <int rows>
void multiply_tile(const Operand& x, std::int64_t first_row, const Int4Panel& panel, Ahead ahead,
                   float* out) {
    const std::uint16_t* x_rows[rows];
    __m512 totals[rows][2];
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
        x_rows[r] = x.row<std::uint16_t>(first_row + r);
        totals[r][0] = totals[r][1] = _mm512_setzero_ps();
    }
    const std::uint8_t* w = panel.values;
    const Float16* scales = panel.scales;
    for (int k = 0; k < panel.inputs; scales += panel_features) {
        __m512 sums[rows][2] = {};
        for (const int end = panel.group_end(k); k < end; k += 8, w += panel_features * 4) {
            ahead.ask();
            multiply_step<rows>(x_rows, k, w, sums);
        }
        for (int half = 0; half < 2; ++half) {
            const __m512 scale = load_scales(scales + half * 16);
#pragma GCC unroll 12
            for (int r = 0; r < rows; ++r)
                totals[r][half] = _mm512_fmadd_ps(sums[r][half], scale, totals[r][half]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
        for (int half = 0; half < 2; ++half)
            _mm512_store_ps(out + r * panel_features + half * 16, totals[r][half]);
    }
}

}  // namespace

void multiply_int4_weight_only_avx512(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w,
                                      int panel, float* out) {
    const Int4Panel bound = int4_panel(w, panel);
    for_row_tiles<most_rows>(num_rows, [&]<int rows>(const RowTile& tile) {
        const Ahead ahead(bound.values, w.panel_bytes(), tile);
        multiply_tile<rows>(x, first_row + tile.first_row, bound, ahead,
                            out + tile.first_row * panel_features);
    });
}

}  // namespace penstock
