// int8 rows x int8 weights with AVX-512 VNNI. Same bits as int8_scalar.cpp.
//
// `vpdpbusd` adds to each of 16 int32 sums four products of an unsigned and a signed byte. The weights become
// the unsigned side, w + 128 (a flipped sign bit), because the row's sum, which takes the 128 back, is known:
//
// ```
// sum_k x[k] w[f][k] = sum_k x[k] (w[f][k] + 128) - 128 sum_k x[k]
// ```
//
// A tile is up to 12 rows x 32 features, 24 registers of sums: per four inputs two loads of weights and a
// broadcast a row feed 24 instructions. Sums may wrap on the way; the result does not (K <= 131072).
#include "dot_avx512.h"

#include "kernels.h"
#include "row_tiles.h"

namespace penstock {

namespace {

constexpr int most_rows = 12;

struct Panel {
    const std::int8_t* values;
    const float* scales;
    int inputs;
};

[[gnu::always_inline]] inline __m512i load_unsigned(const std::int8_t* values) {
    return _mm512_xor_si512(_mm512_load_si512(values), _mm512_set1_epi8(-128));
}

[[gnu::always_inline]] inline __m512i four_inputs(const std::int8_t* x) {
    std::int32_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
}

std::int32_t sum_of(const std::int32_t* group_sums, int groups) {
    std::int32_t sum = 0;
    for (int g = 0; g < groups; ++g) sum += group_sums[g];
    return sum;
}

[[gnu::always_inline]] inline void store(__m512i sums, const float* w_scales, float x_scale, float* out) {
    const __m512 scaled = _mm512_mul_ps(to_floats(sums), _mm512_loadu_ps(w_scales));
    _mm512_store_ps(out, _mm512_mul_ps(scaled, _mm512_set1_ps(x_scale)));
}

// Four inputs of each row x 32 features.
template <int rows>
[[gnu::always_inline]] inline void multiply_step(const std::int8_t* const (&x)[rows], int k,
                                                 const std::int8_t* w, __m512i (&sums)[rows][2]) {
    const __m512i w0 = load_unsigned(w), w1 = load_unsigned(w + 64);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
        const __m512i four = four_inputs(x[r] + k);
        sums[r][0] = dot(sums[r][0], w0, four);
        sums[r][1] = dot(sums[r][1], w1, four);
    }
}

template <int rows>
void multiply_tile(const Operand& x, std::int64_t first_row, const Panel& panel, Ahead ahead, float* out) {
    const std::int8_t* x_rows[rows];
    __m512i sums[rows][2];
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
        x_rows[r] = x.row<std::int8_t>(first_row + r);
        const std::int32_t sum = sum_of(x.group_sums(first_row + r), panel.inputs / sum_group);
        sums[r][0] = sums[r][1] = _mm512_set1_epi32(-128 * sum);
    }
    const std::int8_t* w = panel.values;
    for (int k = 0; k < panel.inputs; k += 4, w += panel_features * 4) {
        ahead.ask();
        multiply_step<rows>(x_rows, k, w, sums);
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
        for (int half = 0; half < 2; ++half) {
            store(sums[r][half], panel.scales + half * 16, x.scale(first_row + r),
                  out + r * panel_features + half * 16);
        }
    }
}

// One row: memory sets the pace; two more pairs of sums so that no instruction waits for the one before it.
template <>
void multiply_tile<1>(const Operand& x, std::int64_t first_row, const Panel& panel, Ahead ahead, float* out) {
    const std::int8_t* const x_rows[1] = {x.row<std::int8_t>(first_row)};
    const std::int32_t sum = sum_of(x.group_sums(first_row), panel.inputs / sum_group);
    __m512i sums[4][1][2] = {};
    const std::int8_t* w = panel.values;
    for (int k = 0; k < panel.inputs; k += 16, w += panel_features * 16) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            ahead.ask();
            multiply_step<1>(x_rows, k + i * 4, w + panel_features * 4 * i, sums[i]);
        }
    }
    for (int half = 0; half < 2; ++half) {
        const __m512i all = _mm512_add_epi32(_mm512_add_epi32(sums[0][0][half], sums[1][0][half]),
                                             _mm512_add_epi32(sums[2][0][half], sums[3][0][half]));
        const __m512i exact = _mm512_sub_epi32(all, _mm512_set1_epi32(128 * sum));
        store(exact, panel.scales + half * 16, x.scale(first_row), out + half * 16);
    }
}

}  // namespace

void multiply_int8_avx512(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w, int panel,
                          float* out) {
    const Panel bound{reinterpret_cast<const std::int8_t*>(w.values.data()) + panel * w.panel_bytes(),
                      reinterpret_cast<const float*>(w.scales.data()) + panel * panel_features,
                      w.padded_inputs};
    for_row_tiles<most_rows>(num_rows, [&]<int rows>(const RowTile& tile) {
        const Ahead ahead(bound.values, w.panel_bytes(), tile);
        multiply_tile<rows>(x, first_row + tile.first_row, bound, ahead,
                            out + tile.first_row * panel_features);
    });
}

}  // namespace penstock
