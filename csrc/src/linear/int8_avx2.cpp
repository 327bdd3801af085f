// int8 rows x int8 weights with AVX2. Same bits as int8_scalar.cpp.
//
// `vpmaddubsw` multiplies unsigned by signed bytes and adds pairs in 16 bits. With the sign moved to the
// input,
//
// ```
// x w = sign(x, w) |w|         two products of 127 * 127 are 32,258: a pair never saturates
// ```
//
// and `vpmaddwd` by ones adds the pairs up in 32 bits: four instructions for 32 products. A tile is 4 rows x
// 16 features or fewer rows x 32: eight sums, the rows' inputs, and a vector of weights with its magnitude
// fill the 16 registers.
#include <immintrin.h>

#include "kernels.h"
#include "row_tiles.h"

namespace penstock {

namespace {

constexpr int most_rows = 4;
constexpr int prefetch_bytes = 2048;

struct Panel {
    const std::int8_t* values;
    const float* scales;
    int inputs;
};

[[gnu::always_inline]] inline __m256i four_inputs(const std::int8_t* x) {
    std::int32_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm256_set1_epi32(four);
}

// Four inputs of each row x 8 features for each vector.
template <int rows, int vectors>
[[gnu::always_inline]] inline void multiply_step(const std::int8_t* const (&x)[rows], int k,
                                                 const std::int8_t* w, __m256i (&sums)[rows][vectors]) {
    __m256i fours[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) fours[r] = four_inputs(x[r] + k);
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
        const __m256i weights = _mm256_load_si256(reinterpret_cast<const __m256i*>(w) + v);
        const __m256i magnitudes = _mm256_abs_epi8(weights);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
            const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(fours[r], weights));
            sums[r][v] = _mm256_add_epi32(sums[r][v], _mm256_madd_epi16(pairs, ones));
        }
    }
}

// `vectors` times 8 features from `first` on.
template <int rows, int vectors>
void multiply_features(const Operand& x, std::int64_t first_row, const Panel& panel, int first, float* out) {
    const std::int8_t* x_rows[rows];
    __m256i sums[rows][vectors] = {};
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) x_rows[r] = x.row<std::int8_t>(first_row + r);
    const std::int8_t* w = panel.values + first * 4;
    for (int k = 0; k < panel.inputs; k += 4, w += panel_features * 4) {
        _mm_prefetch(w + prefetch_bytes, _MM_HINT_T0);
        if constexpr (vectors == 4) _mm_prefetch(w + prefetch_bytes + 64, _MM_HINT_T0);
        multiply_step<rows, vectors>(x_rows, k, w, sums);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
        const __m256 x_scale = _mm256_set1_ps(x.scale(first_row + r));
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            const __m256 scale = _mm256_loadu_ps(panel.scales + first + v * 8);
            const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[r][v]), scale);
            _mm256_store_ps(out + r * panel_features + first + v * 8, _mm256_mul_ps(scaled, x_scale));
        }
    }
}

template <int rows>
void multiply_tile(const Operand& x, std::int64_t first_row, const Panel& panel, float* out) {
    constexpr int vectors = rows > 2 ? 2 : 4;
    for (int first = 0; first < panel_features; first += vectors * 8) {
        multiply_features<rows, vectors>(x, first_row, panel, first, out);
    }
}

}  // namespace

void multiply_int8_avx2(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w, int panel,
                        float* out) {
    const Panel bound{reinterpret_cast<const std::int8_t*>(w.values.data()) + panel * w.panel_bytes(),
                      reinterpret_cast<const float*>(w.scales.data()) + panel * panel_features,
                      w.padded_inputs};
    for_row_tiles<most_rows>(num_rows, [&]<int rows>(const RowTile& tile) {
        multiply_tile<rows>(x, first_row + tile.first_row, bound, out + tile.first_row * panel_features);
    });
}

}  // namespace penstock
