// bf16 rows by int8 weights with bf16 tiles; included by int8_weight_only_amx.cpp and
// int8_weight_only_amx_emulated.cpp after tiles/tile.h.
//
// A block of K of the panel is widened to bf16 on the stack (integers to 128 are exact), then multiplied like
// a bf16 panel; the feature's scale comes last:
//
// ```
// four bytes of a feature   w0 w1 w2 w3   ->   row 2i: w0 w1   row 2i + 1: w2 w3
// ```
//
// A byte at the top of an int32 is its value times 2^24, which float32 and bf16 hold exactly: no sign
// extension, and the scale takes the 2^24 back. The price: rows with values above 10^28 overflow, and scales
// below 2^-102 lose bits.
#include <immintrin.h>

#include "kernels.h"
#include "tile_product.inl"

namespace penstock {
namespace {

using Floats = float __attribute__((vector_size(64)));
using Ints = std::int32_t __attribute__((vector_size(64)));
constexpr float top_byte = 0x1p-24f;
constexpr std::int32_t top = static_cast<std::int32_t>(0xff000000u);

PENSTOCK_TILE Ints float_bits(Ints value) { return (Ints)__builtin_convertvector(value, Floats); }

// Two values at the top of int32 lanes, to a pair of bf16: the upper halves of their floats, whose lower
// halves are 0.
PENSTOCK_TILE Ints bf16_pair(Ints even, Ints odd) {
    using Unsigned = std::uint32_t __attribute__((vector_size(64)));
    return (Ints)((Unsigned)float_bits(even) >> 16) | float_bits(odd);
}

// 16 features x 4 inputs to two rows of a B tile.
PENSTOCK_TILE void widen_four(const std::int8_t* from, std::byte* to) {
    Ints bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    fetch(from + panel_bytes_ahead);
    const Ints low = bf16_pair(bytes << 24, (bytes << 16) & top);
    const Ints high = bf16_pair((bytes << 8) & top, bytes & top);
    std::memcpy(to, &low, sizeof low);
    std::memcpy(to + panel_stride, &high, sizeof high);
}

struct alignas(64) Scratch {
    std::byte bytes[block_steps * panel_step_bytes];
};

struct WidenedPanel {
    static constexpr bool is_stored = false;
    const std::int8_t* values;
    Scratch& scratch;

    const std::byte* block(int step, int count) const {
        const std::int8_t* from = values + std::int64_t{step} * (panel_step_bytes / 2);
        std::byte* to = scratch.bytes;
        for (int i = 0; i < count * tile_rows_max / 2; ++i, from += panel_stride, to += 2 * panel_stride) {
            widen_four(from, to);
            widen_four(from + 64, to + 64);
        }
        return scratch.bytes;
    }
};

void multiply_int8_weight_only(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w,
                               int panel, float* out) {
    Scratch scratch;
    const WidenedPanel widened{
        reinterpret_cast<const std::int8_t*>(w.values.data()) + panel * w.panel_bytes(), scratch};
    const float* scales = reinterpret_cast<const float*>(w.scales.data()) + panel * panel_features;
    const __m512 low = _mm512_mul_ps(_mm512_loadu_ps(scales), _mm512_set1_ps(top_byte));
    const __m512 high = _mm512_mul_ps(_mm512_loadu_ps(scales + 16), _mm512_set1_ps(top_byte));
    const int num_steps = w.padded_inputs * 2 / step_bytes;
    multiply_panel<Bf16Dot>(
        x, first_row, num_rows, widened, {0, num_steps, num_steps}, out,
        [low, high, out](int first, int end) {
            for (float* sums = out + first * panel_features; first < end; ++first, sums += panel_features) {
                _mm512_store_ps(sums, _mm512_mul_ps(_mm512_load_ps(sums), low));
                _mm512_store_ps(sums + 16, _mm512_mul_ps(_mm512_load_ps(sums + 16), high));
            }
        });
}

}  // namespace
}  // namespace penstock
