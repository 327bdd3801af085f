// bf16 rows x int8 or int4 weights in float32, for instruction sets without bf16 dots: included by
// int8_weight_only_{scalar,avx2}.cpp and int4_weight_only_{scalar,avx2}.cpp.
//
// ```
// int8   out[f] = (sum_k x[k] * q[f][k]) * scale[f]
// int4   out[f] = sum_g (sum_{k in g} x[k] * q[f][k]) * scale[g][f]
// ```
//
// Weights are integers until the last moment: a 32-bit lane holds 4 (8) values of one feature, each is shifted to the top,
// back with its sign, and converted. Sums are one after the other in K, whatever the tile's height: a row's bits do not
// depend on its neighbours.
#include "int4_panel.h"
#include "kernels.h"
#include "penstock/simd.h"
#include "row_tiles.h"

namespace penstock {
namespace {

// The panel of 32 features in parts of `vectors` registers; rows share what was unpacked.
constexpr int most_rows = 4;
constexpr int vectors = lanes == 8 ? 2 : 4;
constexpr int prefetch_bytes = 2048;

// A value's place in its lane, in bits from below.
struct Int8Word {
    static constexpr int inputs = 4, bits = 8;
    static constexpr std::uint32_t flip = 0;
    static constexpr int place(int input) { return 8 * input; }
};

// Stored as q + 8: with the top bit flipped a nibble is q in two's complement.
struct Int4Word {
    static constexpr int inputs = 8, bits = 4;
    static constexpr std::uint32_t flip = 0x88888888;
    static constexpr int place(int input) { return 8 * (input % 4) + 4 * (input / 4); }
};

template <class Word, int input>
PENSTOCK_INLINE F32 unpack(U32 words) {
    constexpr int above = 32 - Word::bits - Word::place(input);
    const I32 top = (I32)(words << above);
    return __builtin_convertvector(top >> (32 - Word::bits), F32);
}

template <int rows>
struct Tile {
    const std::uint16_t* x[rows];
    F32 sums[rows][vectors];

    Tile(const Operand& from, std::int64_t first_row) {
        for (int r = 0; r < rows; ++r) x[r] = from.row<std::uint16_t>(first_row + r);
    }

    PENSTOCK_INLINE void clear() {
        for (int r = 0; r < rows; ++r) std::fill_n(sums[r], vectors, F32{});
    }

    template <class Word, int input>
    PENSTOCK_INLINE void multiply_input(int k, const U32 (&words)[vectors]) {
        F32 weights[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) weights[v] = unpack<Word, input>(words[v]);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
            const F32 value = (F32)((U32{} + x[r][k + input]) << 16);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sums[r][v] += value * weights[v];
        }
    }

    // Inputs [k, end) of the features whose words begin at w.
    template <class Word>
    PENSTOCK_INLINE void multiply(int k, int end, const std::uint8_t* w) {
        for (; k < end; k += Word::inputs, w += panel_features * 4) {
            __builtin_prefetch(w + prefetch_bytes);
            U32 words[vectors];
            std::memcpy(words, w, sizeof words);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) words[v] ^= Word::flip;
            [&]<int... inputs>(std::integer_sequence<int, inputs...>) {
                (multiply_input<Word, inputs>(k, words), ...);
            }(std::make_integer_sequence<int, Word::inputs>{});
        }
    }
};

template <int rows>
void multiply_int8_features(const Operand& x, std::int64_t first_row, const std::uint8_t* w, const float* scales, int inputs,
                            float* out) {
    Tile<rows> tile(x, first_row);
    tile.clear();
    tile.template multiply<Int8Word>(0, inputs, w);
    for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < vectors; ++v) store(out + r * panel_features + v * lanes, tile.sums[r][v] * load(scales + v * lanes));
    }
}

template <int rows>
void multiply_int4_features(const Operand& x, std::int64_t first_row, const Int4Panel& panel, int first, float* out) {
    Tile<rows> tile(x, first_row);
    F32 totals[rows][vectors] = {};
    const std::uint8_t* w = panel.values + first * 4;
    const Float16* half_scales = panel.scales + first;
    for (int k = 0; k < panel.inputs; half_scales += panel_features) {
        const int end = panel.group_end(k);
        tile.clear();
        tile.template multiply<Int4Word>(k, end, w);
        w += (end - k) / Int4Word::inputs * panel_features * 4;
        k = end;
        alignas(64) float scales[vectors * lanes];
        for (int f = 0; f < vectors * lanes; ++f) scales[f] = from_float16(half_scales[f]);
        for (int r = 0; r < rows; ++r) {
            for (int v = 0; v < vectors; ++v) totals[r][v] += tile.sums[r][v] * load(scales + v * lanes);
        }
    }
    for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < vectors; ++v) store(out + r * panel_features + v * lanes, totals[r][v]);
    }
}

[[maybe_unused]] void multiply_int8_weight_only(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w,
                                                int panel, float* out) {
    const auto* values = reinterpret_cast<const std::uint8_t*>(w.values.data()) + panel * w.panel_bytes();
    const float* scales = reinterpret_cast<const float*>(w.scales.data()) + panel * panel_features;
    for_row_tiles<most_rows>(num_rows, [&]<int rows>(const RowTile& tile) {
        for (int first = 0; first < panel_features; first += vectors * lanes) {
            multiply_int8_features<rows>(x, first_row + tile.first_row, values + first * 4, scales + first, w.padded_inputs,
                                         out + tile.first_row * panel_features + first);
        }
    });
}

[[maybe_unused]] void multiply_int4_weight_only(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w,
                                                int panel, float* out) {
    const Int4Panel bound = int4_panel(w, panel);
    for_row_tiles<most_rows>(num_rows, [&]<int rows>(const RowTile& tile) {
        for (int first = 0; first < panel_features; first += vectors * lanes) {
            multiply_int4_features<rows>(x, first_row + tile.first_row, bound, first, out + tile.first_row * panel_features + first);
        }
    });
}

}  // namespace
}  // namespace penstock
