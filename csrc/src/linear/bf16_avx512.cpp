// bf16 rows by bf16 weights with VDPBF16PS: each lane adds two products to its float32 sum.
//
// ```
// one pair of inputs k of a panel: 2 vectors of 16 features x 2 inputs, times the pair of each row, broadcast:
//   sums[r][f] += x[r][2k] w[f][2k] + x[r][2k+1] w[f][2k+1]         r < 12: 24 of the 32 registers hold sums
// ```
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace penstock {
namespace {

constexpr int pair_bytes = panel_features * 4;

[[gnu::always_inline]] inline __m512bh pair_of(const std::byte* row, int k) {
    std::int32_t pair;
    std::memcpy(&pair, row + k * 4, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

template <int rows>
void multiply_rows(const std::byte* x, std::int64_t row_bytes, const std::byte* weights, int num_pairs, float* out) {
    __m512 sums[rows][2];
    for (int r = 0; r < rows; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int k = 0; k < num_pairs; ++k) {
        const __m512bh low = (__m512bh)_mm512_load_si512(weights + k * pair_bytes);
        const __m512bh high = (__m512bh)_mm512_load_si512(weights + k * pair_bytes + 64);
        for (int r = 0; r < rows; ++r) {
            const __m512bh pair = pair_of(x + r * row_bytes, k);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], pair, low);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], pair, high);
        }
    }
    for (int r = 0; r < rows; ++r) {
        _mm512_store_ps(out + r * panel_features, sums[r][0]);
        _mm512_store_ps(out + r * panel_features + 16, sums[r][1]);
    }
}

using MultiplyRows = void(const std::byte* x, std::int64_t row_bytes, const std::byte* weights, int num_pairs, float* out);
constexpr MultiplyRows* by_rows[] = {nullptr,           multiply_rows<1>, multiply_rows<2>,  multiply_rows<3>,
                                     multiply_rows<4>,  multiply_rows<5>, multiply_rows<6>,  multiply_rows<7>,
                                     multiply_rows<8>,  multiply_rows<9>, multiply_rows<10>, multiply_rows<11>,
                                     multiply_rows<12>};
constexpr int rows_max = 12;

}  // namespace

void multiply_bf16_avx512(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w, int panel,
                          float* out) {
    const std::byte* weights = w.values.data() + w.panel_bytes() * static_cast<std::size_t>(panel);
    const std::byte* rows = x.row<std::byte>(first_row);
    const int num_pairs = (w.in_features + 1) / 2;
    while (num_rows > 0) {
        const int count = num_rows < rows_max ? num_rows : rows_max;
        by_rows[count](rows, x.row_bytes, weights, num_pairs, out);
        rows += count * x.row_bytes;
        out += count * panel_features;
        num_rows -= count;
    }
}

}  // namespace penstock
