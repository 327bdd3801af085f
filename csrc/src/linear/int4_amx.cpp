// int8 rows by int4 weights with TDPBSSD. Same bits as int4_avx512.cpp.
#include "../tiles/tile.h"
#include "int4_tiles.inl"

namespace penstock {

void multiply_int4_amx(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w, int panel,
                       float* out) {
    if (num_rows < int4_tile_rows) return multiply_int4_avx512(x, first_row, num_rows, w, panel, out);
    multiply_int4(x, first_row, num_rows, w, panel, out);
}

}  // namespace penstock
