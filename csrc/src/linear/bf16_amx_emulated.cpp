// bf16 rows by bf16 weights with TDPBF16PS, in plain C++: 32 inputs a product. See tile_product.inl.
//
// The rounding is the instruction's: in each product the even and the odd inputs' sums apart, then together, then to the
// sum so far. It is not VDPBF16PS's, so one and the same kernel serves every number of rows.
#define PENSTOCK_EMULATED_TILES
#include "../tiles/tile.h"
#include "kernels.h"
#include "tile_product.inl"

namespace penstock {

void multiply_bf16_amx_emulated(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w, int panel, float* out) {
    const StoredPanel values{w.values.data() + w.panel_bytes() * static_cast<std::size_t>(panel)};
    multiply_panel<Bf16Dot>(x, first_row, num_rows, values, w.padded_inputs * 2 / step_bytes, out, [](int, int) {});
}

}  // namespace penstock
