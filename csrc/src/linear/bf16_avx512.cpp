// bf16 rows by bf16 weights with VDPBF16PS: each lane adds two products to its float32 sum.
//
// ```
// one pair of inputs k of a panel: 2 vectors of 16 features x 2 inputs, times the pair of each row, broadcast:
//   sums[r][f] += x[r][2k] w[f][2k] + x[r][2k+1] w[f][2k+1]         r < 12: 24 of the 32 registers hold sums
//
// up to 12 rows     one pass over the panel, sums in registers
// more              for each chunk of the panel (16 KiB, stays in L1): for each 12 rows: sums from `out`, and back
// ```
//
// Sums travel through `out` exactly, so a row's bits do not depend on the form. Weights come from memory once
// and in order; they are asked for one chunk ahead, evenly through the arithmetic: left alone the hardware's
// prefetcher starts over at each page, and reading and multiplying take turns.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "kernels.h"

namespace penstock {
namespace {

constexpr int pair_bytes = panel_features * 4;
constexpr int rows_max = 12;
constexpr int chunk_pairs = 128;   // 16 KiB of weights: a third of the L1 cache, so that the next chunk fits beside it
constexpr int ahead_bytes = 8192;  // in a single pass

struct Chunk {
    const std::byte* x;  // first row's first pair
    std::int64_t row_bytes;
    const std::byte* weights;
    int num_pairs;
    const std::byte* next;  // what to ask for on the way: `lines` cache lines for each pair
    float* out;
    bool is_first;
};

[[gnu::always_inline]] inline __m512bh pair_of(const std::byte* at) {
    std::int32_t pair;
    std::memcpy(&pair, at, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

template <int rows, int lines>
void multiply_rows(const Chunk& chunk) {
    __m512 sums[rows][2];
    if (chunk.is_first) {
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    } else {
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            sums[r][0] = _mm512_load_ps(chunk.out + r * panel_features);
            sums[r][1] = _mm512_load_ps(chunk.out + r * panel_features + 16);
        }
    }
    const std::byte* x = chunk.x;
    const std::byte* weights = chunk.weights;
    const std::byte* next = chunk.next;
    const std::int64_t row_bytes = chunk.row_bytes;
    float* out = chunk.out;
    for (int k = 0; k < chunk.num_pairs; ++k) {
        if constexpr (lines > 0) _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T0);
        if constexpr (lines > 1) _mm_prefetch(reinterpret_cast<const char*>(next + 64), _MM_HINT_T0);
        const __m512bh low = (__m512bh)_mm512_load_si512(weights);
        const __m512bh high = (__m512bh)_mm512_load_si512(weights + 64);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            const __m512bh pair = pair_of(x + r * row_bytes);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], pair, low);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], pair, high);
        }
        x += 4;
        weights += pair_bytes;
        next += pair_bytes;
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
        _mm512_store_ps(out + r * panel_features, sums[r][0]);
        _mm512_store_ps(out + r * panel_features + 16, sums[r][1]);
    }
}

struct ByLines {
    void (*run[3])(const Chunk& chunk);
};

template <int... rows>
constexpr auto table(std::integer_sequence<int, rows...>) {
    return std::array<ByLines, sizeof...(rows)>{
        ByLines{{multiply_rows<rows + 1, 0>, multiply_rows<rows + 1, 1>, multiply_rows<rows + 1, 2>}}...};
}
constexpr auto by_rows = table(std::make_integer_sequence<int, rows_max>{});

}  // namespace

void multiply_bf16_avx512(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w, int panel,
                          float* out) {
    const std::byte* weights = w.values.data() + w.panel_bytes() * static_cast<std::size_t>(panel);
    const std::byte* rows = x.row<std::byte>(first_row);
    const int num_pairs = (w.in_features + 1) / 2;
    if (num_rows <= rows_max) {
        by_rows[static_cast<std::size_t>(num_rows - 1)].run[2](
            {rows, x.row_bytes, weights, num_pairs, weights + ahead_bytes, out, true});
        return;
    }
    const int num_tiles = (num_rows + rows_max - 1) / rows_max;
    for (int pair = 0; pair < num_pairs; pair += chunk_pairs) {
        const int count = std::min(chunk_pairs, num_pairs - pair);
        const std::byte* values = weights + pair * pair_bytes;
        for (int tile = 0, row = 0; tile < num_tiles; ++tile) {
            const int tile_rows = (num_rows - row) / (num_tiles - tile);
            const int lines = tile < 2 ? 1 : 0;
            by_rows[static_cast<std::size_t>(tile_rows - 1)].run[lines](
                {rows + row * x.row_bytes + pair * 4, x.row_bytes, values, count,
                 values + chunk_pairs * pair_bytes + tile * 64, out + row * panel_features, pair == 0});
            row += tile_rows;
        }
    }
}

}  // namespace penstock
