// int8 rows by int4 weights with tiles, and how many rows are worth them; included by int4_amx.cpp and
// int4_amx_emulated.cpp after tiles/tile.h.
#include "tile_groups.inl"

namespace penstock {
namespace {

// Fewer rows go to the AVX-512 kernel, which gives the same bits. A step of a panel (64 inputs of 32
// features, 1 KiB) takes about 170 cycles from memory; AVX-512 spends 24 on its nibbles and 32 on each row,
// the tiles about 100 for 1 to 16 rows.
constexpr int int4_tile_rows = 4;

void multiply_int4(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w, int panel,
                   float* out) {
    multiply_int4_panel<NibblesToInt8>(x, first_row, num_rows, int4_panel(w, panel), out);
    for (int r = 0; r < num_rows; ++r, out += panel_features) {
        const __m512 x_scale = _mm512_set1_ps(x.scale(first_row + r));
        _mm512_store_ps(out, _mm512_mul_ps(_mm512_load_ps(out), x_scale));
        _mm512_store_ps(out + 16, _mm512_mul_ps(_mm512_load_ps(out + 16), x_scale));
    }
}

}  // namespace
}  // namespace penstock
