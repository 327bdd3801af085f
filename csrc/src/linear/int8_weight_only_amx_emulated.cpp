// bf16 rows by int8 weights with TDPBF16PS, in plain C++. See int8_weight_only_tiles.inl.
#define PENSTOCK_EMULATED_TILES
#include "../tiles/tile.h"
#include "int8_weight_only_tiles.inl"

namespace penstock {

void multiply_int8_weight_only_amx_emulated(const Operand& x, std::int64_t first_row, int num_rows,
                                            const Matrix& w, int panel, float* out) {
    multiply_int8_weight_only(x, first_row, num_rows, w, panel, out);
}

}  // namespace penstock
