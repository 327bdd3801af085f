// int8 rows by int8 weights with TDPBSSD, in plain C++: 64 inputs a product. Same bits as int8_scalar.cpp.
#define PENSTOCK_EMULATED_TILES
#include "../tiles/tile.h"
#include "int8_tiles.inl"

namespace penstock {

void multiply_int8_amx_emulated(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w,
                                int panel, float* out) {
    if (num_rows < int8_tile_rows) return multiply_int8_avx512(x, first_row, num_rows, w, panel, out);
    multiply_int8_range(x, first_row, num_rows, w, panel, {0, w.padded_inputs}, out);
}

void multiply_int8_part_amx_emulated(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w,
                                     int panel, const InputRange& inputs, float* out) {
    multiply_int8_range(x, first_row, num_rows, w, panel, inputs, out);
}

}  // namespace penstock
