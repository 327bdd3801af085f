// bf16 by bf16 where there is no bf16 instruction: widened by a shift (even input) and a mask (odd input) to float32.
//
// ```
// out[r][f] = sum over pairs k of  x[r][2k] w[f][2k]  then  x[r][2k+1] w[f][2k+1],  k rising, one accumulator
// ```
#include "kernels.h"
#include "penstock/bf16.h"
#include "penstock/simd.h"

namespace penstock {
namespace {

constexpr int row_vectors = panel_features / lanes;

PENSTOCK_INLINE U32 load_pairs(const std::byte* from) {
    U32 v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <int rows>
PENSTOCK_INLINE void multiply_rows(const Operand& x, std::int64_t first_row, const std::byte* weights, int num_pairs,
                                   float* out) {
    F32 sums[rows][row_vectors] = {};
    for (int k = 0; k < num_pairs; ++k) {
        for (int v = 0; v < row_vectors; ++v) {
            const U32 pairs = load_pairs(weights + (k * panel_features + v * lanes) * 4);
            const F32 even = (F32)(pairs << 16), odd = (F32)(pairs & 0xffff0000u);
            for (int r = 0; r < rows; ++r) {
                const Bf16* pair = x.row<Bf16>(first_row + r) + 2 * k;
                sums[r][v] += even * to_float(pair[0]);
                sums[r][v] += odd * to_float(pair[1]);
            }
        }
    }
    for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < row_vectors; ++v) store(out + r * panel_features + v * lanes, sums[r][v]);
    }
}

void multiply_widened(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w, int panel, float* out) {
    const std::byte* weights = w.values.data() + w.panel_bytes() * static_cast<std::size_t>(panel);
    for (int r = 0; r < num_rows; ++r) {
        multiply_rows<1>(x, first_row + r, weights, (w.in_features + 1) / 2, out + r * panel_features);
    }
}

}  // namespace
}  // namespace penstock
