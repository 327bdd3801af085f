// int8 rows by int4 weights with TDPBSSD, in plain C++. Same bits as int4_avx512.cpp.
#define PENSTOCK_EMULATED_TILES
#include "../tiles/tile.h"
#include "int4_tiles.inl"

namespace penstock {

void multiply_int4_amx_emulated(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w,
                                int panel, float* out) {
    if (num_rows < int4_tile_rows) return multiply_int4_avx512(x, first_row, num_rows, w, panel, out);
    multiply_int4(x, first_row, num_rows, w, panel, out);
}

}  // namespace penstock
