// bf16 by bf16 where there is no bf16 instruction: widened to float32 by a shift, multiplied there.
//
// ```
// out[r][f] = sum over k of x[r][k] w[f][k]        k rising, one accumulator, one fused multiply-add (or two roundings
//                                                  where there is none) a step
//
// up to 2 rows   weights are widened in registers on their way; one pass over the panel
// more           for each chunk of 128 inputs: the weights widened once to [128][32] (16 KiB, in L1), then for each
//                6 rows: their values widened to [6][128], and 6 rows x 2 vectors of sums kept in registers
// ```
//
// Sums between chunks lie in `out`, exactly, so a row's bits do not depend on the form. The next chunk is
// asked for while the first rows of this one are multiplied.
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "penstock/bf16.h"
#include "penstock/simd.h"
#include "row_tiles.h"

namespace penstock {
namespace {

constexpr int chunk_inputs = 128;
constexpr int tile_rows_max = 6;    // x 2 vectors: 12 of 16 registers
constexpr int direct_rows_max = 2;  // x 4 vectors: 8 registers, and 2 values of each row
constexpr int pair_bytes = panel_features * 4;
constexpr int ahead_bytes = 4096;  // a page, about the time that memory takes to answer

struct Tile {
    const std::byte* x;  // first row's first value, bf16
    std::int64_t row_bytes;
    const std::byte* next;  // weights to ask for on the way, or null
    float* out;
    bool is_first;
};

PENSTOCK_INLINE F32 multiply_add(F32 a, F32 b, F32 c) {
#if defined(__FMA__)
    return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// A value in all lanes, straight from memory.
PENSTOCK_INLINE F32 broadcast(const float* from) {
#if defined(__AVX2__)
    return (F32)_mm256_broadcast_ss(from);
#else
    return *from - F32{};
#endif
}

PENSTOCK_INLINE U32 broadcast_pair(const std::byte* from) {
    std::uint32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    return pair + U32{};
}

PENSTOCK_INLINE U32 load_pairs(const std::byte* from) {
    U32 v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

PENSTOCK_INLINE F32 even_of(U32 pairs) { return (F32)(pairs << 16); }
PENSTOCK_INLINE F32 odd_of(U32 pairs) { return (F32)(pairs & 0xffff0000u); }

// [pairs][32 features][2] to [2 pairs][32 features].
PENSTOCK_INLINE void widen_weights(const std::byte* weights, int num_pairs, float* out) {
    for (int k = 0; k < num_pairs; ++k, weights += pair_bytes, out += 2 * panel_features) {
#pragma GCC unroll 8
        for (int f = 0; f < panel_features; f += lanes) {
            const U32 pairs = load_pairs(weights + f * 4);
            store(out + f, even_of(pairs));
            store(out + panel_features + f, odd_of(pairs));
        }
    }
}

// A row's pairs to values; reads and writes whole vectors (rows are padded to 64 values, chunks are multiples
// of that).
PENSTOCK_INLINE void widen_row(const std::byte* row, int num_inputs, float* out) {
    for (int k = 0; k < num_inputs; k += lanes) {
        U16 values;
        std::memcpy(&values, row + k * 2, sizeof values);
        store(out + k, widen(values));
    }
}

// Features [first, first + 2 vectors) of `rows` rows.
template <int rows, bool asks>
PENSTOCK_INLINE void multiply_columns(const Tile& tile, const float* x, const float* weights, int num_pairs,
                                      int first) {
    F32 sums[rows][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        const float* at = tile.out + r * panel_features + first;
        sums[r][0] = tile.is_first ? F32{} : load(at);
        sums[r][1] = tile.is_first ? F32{} : load(at + lanes);
    }
    for (int k = 0; k < 2 * num_pairs; k += 2) {
        if (asks) __builtin_prefetch(tile.next + k / 2 * pair_bytes + first * 4);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const float* group = weights + (k + i) * panel_features + first;
            const F32 low = load(group), high = load(group + lanes);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                const F32 value = broadcast(x + r * chunk_inputs + k + i);
                sums[r][0] = multiply_add(value, low, sums[r][0]);
                sums[r][1] = multiply_add(value, high, sums[r][1]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        store(tile.out + r * panel_features + first, sums[r][0]);
        store(tile.out + r * panel_features + first + lanes, sums[r][1]);
    }
}

template <int rows>
void multiply_tile(const Tile& tile, const float* weights, int num_pairs) {
    alignas(64) float x[rows * chunk_inputs];
    for (int r = 0; r < rows; ++r)
        widen_row(tile.x + r * tile.row_bytes, 2 * num_pairs, x + r * chunk_inputs);
    for (int f = 0; f < panel_features; f += 2 * lanes) {
        if (tile.next) {
            multiply_columns<rows, true>(tile, x, weights, num_pairs, f);
        } else {
            multiply_columns<rows, false>(tile, x, weights, num_pairs, f);
        }
    }
}

// Features [first, first + 4 vectors) of `rows` rows over the whole panel.
template <int rows>
PENSTOCK_INLINE void multiply_directly(const Tile& tile, const std::byte* weights, int num_pairs) {
    F32 sums[rows][4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) sums[r][0] = sums[r][1] = sums[r][2] = sums[r][3] = F32{};
    for (int k = 0; k < num_pairs; ++k) {
        const std::byte* group = weights + k * pair_bytes;
        __builtin_prefetch(group + ahead_bytes);
        __builtin_prefetch(group + ahead_bytes + 64);
        U32 x[rows];
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) x[r] = broadcast_pair(tile.x + r * tile.row_bytes + k * 4);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const U32 pairs = load_pairs(group + v * lanes * 4);
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) {
                sums[r][v] = multiply_add(even_of(x[r]), even_of(pairs), sums[r][v]);
                sums[r][v] = multiply_add(odd_of(x[r]), odd_of(pairs), sums[r][v]);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) store(tile.out + r * panel_features + v * lanes, sums[r][v]);
    }
}

void multiply_widened(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w, int panel,
                      float* out) {
    const std::byte* weights = w.values.data() + w.panel_bytes() * static_cast<std::size_t>(panel);
    const std::byte* rows = x.row<std::byte>(first_row);
    const int num_pairs = w.padded_inputs / 2;
    if (num_rows <= direct_rows_max) {
        for_row_tiles<direct_rows_max>(num_rows, [&]<int height>(int) {
            for (int f = 0; f < panel_features; f += 4 * lanes) {
                multiply_directly<height>({rows, x.row_bytes, nullptr, out + f, true}, weights + f * 4,
                                          num_pairs);
            }
        });
        return;
    }
    alignas(64) float widened[chunk_inputs * panel_features];
    for (int pair = 0; pair < num_pairs; pair += chunk_inputs / 2) {
        const int count = std::min(chunk_inputs / 2, num_pairs - pair);
        const std::byte* chunk = weights + pair * pair_bytes;
        widen_weights(chunk, count, widened);
        for_row_tiles<tile_rows_max>(num_rows, [&]<int height>(int row) {
            const std::byte* next = row == 0 ? chunk + chunk_inputs / 2 * pair_bytes : nullptr;
            multiply_tile<height>({rows + row * x.row_bytes + pair * 4, x.row_bytes, next,
                                   out + row * panel_features, pair == 0},
                                  widened, count);
        });
    }
}

}  // namespace
}  // namespace penstock
