// int8 rows by int8 weights with tiles, and how many rows are worth them; included by int8_amx.cpp and
// int8_amx_emulated.cpp after tiles/tile.h.
#include "kernels.h"
#include "penstock/simd.h"
#include "tile_product.inl"

namespace penstock {
namespace {

// Fewer rows go to the AVX-512 kernel, which gives the same bits. A step of a panel (2 KiB) takes about 340
// cycles from memory (6 bytes a cycle and core); AVX-512 spends 32 cycles on it for each row (32 dot
// products, one a cycle), the tiles 52 for 1 to 16 rows (one product waits for the one before). Both wait for
// memory below 10 rows; 4 keeps the tiles' turn where weights come from L3 or L2 at two to three times that
// pace.
constexpr int int8_tile_rows = 4;

// Rows [first, end) in place: the exact sums, times the feature's scale, times the row's (in the order of
// int8_scalar.cpp).
struct ScaleSums {
    const Operand& x;
    std::int64_t first_row;
    const float* w_scales;
    float* out;

    void operator()(int first, int end) const {
        static_assert(2 * lanes == panel_features);
        const F32 low = load(w_scales), high = load(w_scales + lanes);
        float* sums = out + first * panel_features;
        for (int r = first; r < end; ++r, sums += panel_features) {
            const float x_scale = x.scale(first_row + r);
            store(sums, __builtin_convertvector((I32)load(sums), F32) * low * x_scale);
            store(sums + lanes, __builtin_convertvector((I32)load(sums + lanes), F32) * high * x_scale);
        }
    }
};

void multiply_int8_range(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w, int panel,
                         const InputRange& inputs, float* out) {
    const StoredPanel values{w.values.data() + w.panel_bytes() * static_cast<std::size_t>(panel)};
    const float* scales = reinterpret_cast<const float*>(w.scales.data()) + panel * panel_features;
    multiply_panel<Int8Dot>(
        x, first_row, num_rows, values,
        {inputs.first / step_bytes, inputs.end / step_bytes, w.padded_inputs / step_bytes}, out,
        ScaleSums{x, first_row, scales, out});
}

}  // namespace
}  // namespace penstock
