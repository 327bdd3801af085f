// bf16 rows x int8 weights with AVX-512: integers widened to bf16 in registers, then bf16 dots.
//
// ```
// out[f] = (sum_k x[k] * q[f][k]) * scale[f]              q in [-127, 127] is exact in bf16
// ```
//
// A 32-bit lane holds four inputs of a feature, b0 to b3. Each is isolated with its sign and converted to
// float32, whose lower half is then zero: float(b0) >> 16 | float(b1) is the pair of bf16 that the dot takes.
// 15 instructions a vector of weights, shared by up to 12 rows (24 registers of sums). Sums run over K in one
// order at every height.
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

typedef std::int32_t I32x16 __attribute__((vector_size(64)));
typedef std::uint32_t U32x16 __attribute__((vector_size(64)));
typedef float F32x16 __attribute__((vector_size(64)));

// Byte `place` of each lane as float32.
template <int place>
[[gnu::always_inline]] inline U32x16 widened(U32x16 words) {
    return (U32x16)__builtin_convertvector((I32x16)(words << (24 - 8 * place)) >> 24, F32x16);
}

// Bytes `place` and `place + 1` as a pair of bf16.
template <int place>
[[gnu::always_inline]] inline __m512i pair_of(U32x16 words) {
    return (__m512i)((widened<place>(words) >> 16) | widened<place + 1>(words));
}

[[gnu::always_inline]] inline __m512i two_inputs(const std::uint16_t* x) {
    std::int32_t two;
    std::memcpy(&two, x, sizeof two);
    return _mm512_set1_epi32(two);
}

template <int rows>
[[gnu::always_inline]] inline void multiply_pair(const std::uint16_t* const (&x)[rows], int k, __m512i w0,
                                                 __m512i w1, __m512 (&sums)[rows][2]) {
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
        const __m512i two = two_inputs(x[r] + k);
        sums[r][0] = dot(sums[r][0], two, w0);
        sums[r][1] = dot(sums[r][1], two, w1);
    }
}

template <int rows>
void multiply_tile(const Operand& x, std::int64_t first_row, const Panel& panel, Ahead ahead, float* out) {
    const std::uint16_t* x_rows[rows];
    __m512 sums[rows][2];
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
        x_rows[r] = x.row<std::uint16_t>(first_row + r);
        sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    }
    const std::int8_t* w = panel.values;
    for (int k = 0; k < panel.inputs; k += 4, w += panel_features * 4) {
        ahead.ask();
        const U32x16 w0 = (U32x16)_mm512_load_si512(w), w1 = (U32x16)_mm512_load_si512(w + 64);
        multiply_pair<rows>(x_rows, k, pair_of<0>(w0), pair_of<0>(w1), sums);
        multiply_pair<rows>(x_rows, k + 2, pair_of<2>(w0), pair_of<2>(w1), sums);
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
        for (int half = 0; half < 2; ++half) {
            const __m512 scale = _mm512_loadu_ps(panel.scales + half * 16);
            _mm512_store_ps(out + r * panel_features + half * 16, _mm512_mul_ps(sums[r][half], scale));
        }
    }
}

}  // namespace

void multiply_int8_weight_only_avx512(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w,
                                      int panel, float* out) {
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
