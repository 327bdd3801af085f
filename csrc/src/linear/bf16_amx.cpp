// bf16 rows by bf16 weights with TDPBF16PS: 32 inputs a product. See tile_product.inl.
//
// The rounding is the instruction's: in each product the even and the odd inputs' sums apart, then together,
// then to the sum so far. It is not VDPBF16PS's, so one and the same kernel serves every number of rows.
#include "../tiles/tile.h"
#include "bf16_tiles.inl"

namespace penstock {

void multiply_bf16_amx(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w, int panel,
                       float* out) {
    multiply_bf16_range(x, first_row, num_rows, w, panel, {0, w.padded_inputs}, out);
}

void multiply_bf16_part_amx(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w,
                            int panel, const InputRange& inputs, float* out) {
    multiply_bf16_range(x, first_row, num_rows, w, panel, inputs, out);
}

}  // namespace penstock
