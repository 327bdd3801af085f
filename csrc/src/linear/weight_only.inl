// bf16 rows x int8 or int4 weights in float32, for instruction sets without bf16 dots: included by
// int8_weight_only_{scalar,avx2}.cpp and int4_weight_only_{scalar,avx2}.cpp.
//
// ```
// out[f] = sum_g (sum_{k in g} x[k] * q[f][k]) * scale[g][f]              int8: one group, the whole row
// ```
//
// For up to 48 rows at a time, 32 inputs of the panel are unpacked once (4 KiB, L1), then multiplied by all
// rows. A 32-bit lane holds 4 (int4: 8) values of a feature; each is shifted to the top, back with its sign,
// and converted. Sums run over K one after the other, whatever the tile's height: a row's bits do not depend
// on its neighbours.
#include <algorithm>

#include "int4_panel.h"
#include "kernels.h"
#include "penstock/simd.h"
#include "row_tiles.h"

namespace penstock {
namespace {

constexpr int chunk_inputs = 32;  // the smallest group
constexpr int block_rows = 48;    // 6 KiB of sums and 6 KiB of inputs beside the weights
constexpr int most_rows = 6;      // x 2 vectors: 12 of 16 registers
constexpr int prefetch_bytes = 4096;

PENSTOCK_INLINE F32 multiply_add(F32 a, F32 b, F32 c) {
#if defined(__FMA__)
    return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// A value in all lanes, straight from memory: spelled `splat`, GCC adds zeros and spills.
PENSTOCK_INLINE F32 broadcast(const float* from) {
#if defined(__AVX2__)
    return (F32)_mm256_broadcast_ss(from);
#else
    return *from - F32{};
#endif
}

struct Int8Weights {
    static constexpr int word_inputs = 4, bits = 8;
    static constexpr std::uint32_t flip = 0;
    static constexpr int place(int input) { return 8 * input; }  // bits below the value

    const std::uint8_t* values;
    const float* scales;
    int inputs;

    int group_end(int) const { return inputs; }
    void read_scales(int, float* out) const { std::copy_n(scales, panel_features, out); }
};

struct Int4Weights : Int4Panel {
    static constexpr int word_inputs = 8, bits = 4;
    static constexpr std::uint32_t flip = 0x88888888;  // q + 8 to q in two's complement
    static constexpr int place(int input) { return 8 * (input % 4) + 4 * (input / 4); }

    void read_scales(int k, float* out) const {
        const Float16* group = scales + k / group_size * panel_features;
        for (int f = 0; f < panel_features; ++f) out[f] = from_float16(group[f]);
    }
};

template <class Weights, int input>
PENSTOCK_INLINE F32 unpack(U32 words) {
    const I32 top = (I32)(words << (32 - Weights::bits - Weights::place(input)));
    return __builtin_convertvector(top >> (32 - Weights::bits), F32);
}

struct alignas(64) Scratch {
    float weights[chunk_inputs][panel_features];
    float inputs[block_rows][chunk_inputs];
    float sums[block_rows][panel_features];
};

// Inputs [k, k + 32) of all features.
template <class Weights>
void unpack_chunk(const Weights& weights, int k, Scratch& scratch) {
    constexpr int step_bytes = panel_features * 4;
    const std::uint8_t* w = weights.values + k / Weights::word_inputs * step_bytes;
    for (int i = 0; i < chunk_inputs; i += Weights::word_inputs, w += step_bytes) {
        __builtin_prefetch(w + prefetch_bytes);
        __builtin_prefetch(w + prefetch_bytes + 64);
        for (int f = 0; f < panel_features; f += lanes) {
            U32 words;
            std::memcpy(&words, w + f * 4, sizeof words);
            words ^= Weights::flip;
            [&]<int... input>(std::integer_sequence<int, input...>) {
                (store(&scratch.weights[i + input][f], unpack<Weights, input>(words)), ...);
            }(std::make_integer_sequence<int, Weights::word_inputs>{});
        }
    }
}

void widen_inputs(const Operand& x, std::int64_t first_row, int num_rows, int k, Scratch& scratch) {
    for (int r = 0; r < num_rows; ++r) {
        const auto* row = x.row<std::uint16_t>(first_row + r) + k;
        for (int i = 0; i < chunk_inputs; i += lanes) store(&scratch.inputs[r][i], load(row + i));
    }
}

// sums += inputs x weights for `rows` rows and `vectors` vectors of features.
template <int rows, int vectors>
PENSTOCK_INLINE void multiply_features(int first_row, int f, Scratch& scratch) {
    F32 sums[rows][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[r][v] = load(&scratch.sums[first_row + r][f + v * lanes]);
    }
    for (int k = 0; k < chunk_inputs; ++k) {
        F32 weights[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) weights[v] = load(&scratch.weights[k][f + v * lanes]);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const F32 value = broadcast(&scratch.inputs[first_row + r][k]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sums[r][v] = multiply_add(value, weights[v], sums[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) store(&scratch.sums[first_row + r][f + v * lanes], sums[r][v]);
    }
}

void multiply_chunk(int num_rows, Scratch& scratch) {
    for_row_tiles<most_rows>(num_rows, [&]<int rows>(const RowTile& tile) {
        constexpr int vectors = rows > 2 ? 2 : 4;
        for (int f = 0; f < panel_features; f += vectors * lanes) {
            multiply_features<rows, vectors>(tile.first_row, f, scratch);
        }
    });
}

// out += sums x scales.
void add_group(int num_rows, const float* scales, const Scratch& scratch, float* out) {
    for (int r = 0; r < num_rows; ++r, out += panel_features) {
        for (int f = 0; f < panel_features; f += lanes) {
            store(out + f, multiply_add(load(&scratch.sums[r][f]), load(scales + f), load(out + f)));
        }
    }
}

template <class Weights>
void multiply_block(const Operand& x, std::int64_t first_row, int num_rows, const Weights& weights,
                    float* out) {
    Scratch scratch;
    std::fill_n(out, num_rows * panel_features, 0.0f);
    for (int k = 0; k < weights.inputs;) {
        float scales[panel_features];
        weights.read_scales(k, scales);
        std::fill_n(scratch.sums[0], num_rows * panel_features, 0.0f);
        for (const int end = weights.group_end(k); k < end; k += chunk_inputs) {
            unpack_chunk(weights, k, scratch);
            widen_inputs(x, first_row, num_rows, k, scratch);
            multiply_chunk(num_rows, scratch);
        }
        add_group(num_rows, scales, scratch, out);
    }
}

template <class Weights>
void multiply_weight_only(const Operand& x, std::int64_t first_row, int num_rows, const Weights& weights,
                          float* out) {
    for (int row = 0; row < num_rows; row += block_rows) {
        const int rows = std::min(block_rows, num_rows - row);
        multiply_block(x, first_row + row, rows, weights, out + row * panel_features);
    }
}

[[maybe_unused]] Int8Weights int8_weights(const Matrix& w, int panel) {
    return {reinterpret_cast<const std::uint8_t*>(w.values.data()) + panel * w.panel_bytes(),
            reinterpret_cast<const float*>(w.scales.data()) + panel * panel_features, w.padded_inputs};
}

[[maybe_unused]] Int4Weights int4_weights(const Matrix& w, int panel) { return {int4_panel(w, panel)}; }

}  // namespace
}  // namespace penstock
