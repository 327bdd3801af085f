// bf16 rows by int4 weights with TDPBF16PS, in plain C++: products with the integers -8 to 7, exact in bf16;
// scales per group.
#define PENSTOCK_EMULATED_TILES
#include "../tiles/tile.h"
#include "tile_groups.inl"

namespace penstock {

void multiply_int4_weight_only_amx_emulated(const Operand& x, std::int64_t first_row, int num_rows,
                                            const Matrix& w, int panel, float* out) {
    multiply_int4_panel<NibblesToBf16>(x, first_row, num_rows, int4_panel(w, panel), out);
}

}  // namespace penstock
