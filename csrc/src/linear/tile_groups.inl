// Rows times one int4 panel with tiles; included after tiles/tile.h. Sums of one scale group come from the
// tiles, the sum over groups is float32 in vector registers.
//
// ```
// a block of K   values unpacked to int8 or bf16, in the order of a B tile, on the stack (16 KiB)
// a C tile       16 rows x 16 features; per group: zero C, multiply, C to a buffer, and
//                totals[row] += float(buffer[row]) * scale of the group        16 registers, one for each row
// ```
//
// One C tile at a time, because the totals of 16 rows are 16 of the 32 vector registers: with totals in
// memory, a group would cost another load and a store for each row. Per group and C tile: multiplier 16
// cycles a step; load ports 16 a step + 8; store port 16; vector ports 16. Groups alternate between two sets
// of tiles and two buffers, so that one's products run while the other's sums are added.
//
// Groups of 32 int8 inputs fill half a step: tiles of A with 32 bytes a row and of B with 8 rows.

#include <immintrin.h>

#include "int4_panel.h"
#include "kernels.h"
#include "tile_product.inl"

namespace penstock {
namespace {

using Floats = float __attribute__((vector_size(64)));
using Ints = std::int32_t __attribute__((vector_size(64)));

// Exact integers of a group, as the dot product leaves them, to float32.
struct Int8Groups : Int8Dot {
    static constexpr int item_bytes = 1;
    static __m512 floats(const float* sums) {
        Ints v;
        std::memcpy(&v, sums, sizeof v);
        return (__m512)__builtin_convertvector(v, Floats);
    }
};

struct Bf16Groups : Bf16Dot {
    static constexpr int item_bytes = 2;
    static __m512 floats(const float* sums) { return _mm512_load_ps(sums); }
};

struct alignas(64) TileSums {
    float values[tile_rows_max * 16];
};

// One block of K of one call; groups begin and end with it, the very last one may be half as long as the
// others.
struct GroupBlock {
    const std::byte* rows;
    std::int64_t row_bytes;
    const std::byte* panel;  // unpacked
    const Float16* scales;   // [groups][32]
    int num_bytes;           // of each row
    int group_bytes;         // of a row; half a step at least
    bool is_first;
    TileSums* buffers;  // two; rows that the tiles do not have are 0
};

// The sums of one group: `bytes` of 16 rows at `a`, times the 16 features at `w`. `set`: which of the two
// sets of tiles.
template <class Dot, int set>
PENSTOCK_TILE void multiply_group(const std::byte* a, std::int64_t row_bytes, const std::byte* w, int bytes,
                                  TileSums& sums) {
    tile::zero<set>();
    for (int at = 0; at < bytes; at += step_bytes) {
        tile::load<4 + set>(a + at, row_bytes);
        tile::load<6 + set>(w + at / step_bytes * panel_step_bytes, panel_stride);
        Dot::template dot<set, 4 + set, 6 + set>();
    }
    tile::store<set>(sums.values, 64);
}

template <class Dot>
PENSTOCK_TILE void add_group(const TileSums& sums, const Float16* scales, __m512 (&totals)[tile_rows_max]) {
    const __m512 scale =
        _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
#pragma GCC unroll 16
    for (int r = 0; r < tile_rows_max; ++r) {
        totals[r] = _mm512_fmadd_ps(Dot::floats(sums.values + r * 16), scale, totals[r]);
    }
}

// 16 rows x 16 features (`half` of the panel's 32), all groups of the block; totals float32 [16][32].
template <class Dot>
[[gnu::noinline]] void multiply_groups(const GroupBlock& block, int first, int half, float* totals_of_rows) {
    __m512 totals[tile_rows_max];
    float* place = totals_of_rows + half * 16;
#pragma GCC unroll 16
    for (int r = 0; r < tile_rows_max; ++r) {
        totals[r] = block.is_first ? _mm512_setzero_ps() : _mm512_load_ps(place + r * panel_features);
    }
    TileSums* sums = block.buffers;
    const std::byte* a = block.rows + first * block.row_bytes;
    const std::byte* w = block.panel + half * 64;
    const Float16* scales = block.scales + half * 16;
    const std::int64_t panel_group = std::int64_t{block.group_bytes} * (panel_step_bytes / step_bytes);
    int left = block.num_bytes;
    for (; left >= 2 * block.group_bytes; left -= 2 * block.group_bytes) {
        multiply_group<Dot, 0>(a, block.row_bytes, w, block.group_bytes, sums[0]);
        multiply_group<Dot, 1>(a + block.group_bytes, block.row_bytes, w + panel_group, block.group_bytes,
                               sums[1]);
        add_group<Dot>(sums[0], scales, totals);
        add_group<Dot>(sums[1], scales + panel_features, totals);
        a += 2 * block.group_bytes, w += 2 * panel_group, scales += 2 * panel_features;
    }
    for (; left > 0; left -= block.group_bytes) {
        const int bytes = left < block.group_bytes ? left : block.group_bytes;
        multiply_group<Dot, 0>(a, block.row_bytes, w, bytes, sums[0]);
        add_group<Dot>(sums[0], scales, totals);
        a += block.group_bytes, w += panel_group, scales += panel_features;
    }
#pragma GCC unroll 16
    for (int r = 0; r < tile_rows_max; ++r) _mm512_store_ps(place + r * panel_features, totals[r]);
}

// Nibbles of 16 features x 8 inputs.
struct Nibbles {
    __m512i low, high;  // inputs 0 to 3, 4 to 7; 4 bits of each byte, what stands above them is not theirs
};

PENSTOCK_TILE Nibbles load_nibbles(const std::uint8_t* from) {
    fetch(from + panel_bytes_ahead);
    const __m512i bytes = _mm512_load_si512(from);
    return {bytes, _mm512_srli_epi16(bytes, 4)};
}

// To int8: eight inputs of 32 features are two rows of B tiles.
struct NibblesToInt8 {
    using Dot = Int8Groups;
    static __m512i signed_bytes(__m512i nibbles) {
        return _mm512_sub_epi8(_mm512_and_si512(nibbles, _mm512_set1_epi8(15)), _mm512_set1_epi8(8));
    }
    static void unpack(const std::uint8_t* from, std::byte* to) {
        for (int half = 0; half < 2; ++half) {
            const Nibbles nibbles = load_nibbles(from + half * 64);
            _mm512_store_si512(to + half * 64, signed_bytes(nibbles.low));
            _mm512_store_si512(to + panel_stride + half * 64, signed_bytes(nibbles.high));
        }
    }
};

// To bf16: they are four rows. A table of 16 values, twice, since the instruction looks at 5 bits and one is
// not ours.
struct NibblesToBf16 {
    using Dot = Bf16Groups;
    static __m512i table() {
        alignas(64) static constexpr std::uint16_t values[32] = {
            0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
            0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
            0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};  // -8 to 7
        return _mm512_load_si512(values);
    }
    // Two of each feature's four bytes, each to a 16-bit lane.
    static __m512i pair(__m512i nibbles, int first) {
        const __m512i places = _mm512_set_epi32(
            0x800d800c, 0x80098008, 0x80058004, 0x80018000, 0x800d800c, 0x80098008, 0x80058004, 0x80018000,
            0x800d800c, 0x80098008, 0x80058004, 0x80018000, 0x800d800c, 0x80098008, 0x80058004, 0x80018000);
        const __m512i offset = _mm512_set1_epi16(static_cast<short>(first));
        return _mm512_permutexvar_epi16(_mm512_shuffle_epi8(nibbles, _mm512_add_epi16(places, offset)),
                                        table());
    }
    static void unpack(const std::uint8_t* from, std::byte* to) {
        for (int half = 0; half < 2; ++half, to += 64) {
            const Nibbles nibbles = load_nibbles(from + half * 64);
            _mm512_store_si512(to, pair(nibbles.low, 0));
            _mm512_store_si512(to + panel_stride, pair(nibbles.low, 2));
            _mm512_store_si512(to + 2 * panel_stride, pair(nibbles.high, 0));
            _mm512_store_si512(to + 3 * panel_stride, pair(nibbles.high, 2));
        }
    }
};

template <class Dot>
void multiply_group_block(const GroupBlock& block, int num_rows, float* out, OneTile& last) {
    const int whole = num_rows / tile_rows_max * tile_rows_max;
    for (int first = 0; first < whole; first += tile_rows_max) {
        for (int half : {0, 1}) multiply_groups<Dot>(block, first, half, out + first * panel_features);
    }
    if (whole == num_rows) return;
    const int first = num_rows < tile_rows_max ? 0 : num_rows - tile_rows_max;
    for (int half : {0, 1}) multiply_groups<Dot>(block, first, half, last.values);
}

// out [num_rows][32] = x rows times the panel, scaled by the groups' scales.
template <class Unpack>
void multiply_int4_panel(const Operand& x, std::int64_t first_row, int num_rows, const Int4Panel& panel,
                         float* out) {
    using Dot = typename Unpack::Dot;
    constexpr int inputs_of_block = block_steps * step_bytes / Dot::item_bytes;
    const int group_bytes = panel.group_size * Dot::item_bytes;
    group_bytes < step_bytes ? tile::configure_product<step_bytes / 2>(num_rows)
                             : tile::configure_product(num_rows);
    alignas(64) std::byte unpacked[block_steps * panel_step_bytes];
    OneTile last;
    TileSums buffers[2] = {};
    for (int k = 0; k < panel.inputs; k += inputs_of_block) {
        const int inputs = std::min(inputs_of_block, panel.inputs - k);
        for (int i = 0; i < inputs; i += 8) {
            Unpack::unpack(panel.values + (k + i) * (panel_features / 2),
                           unpacked + i * Dot::item_bytes * panel_features);
        }
        const GroupBlock block{x.row<std::byte>(first_row) + k * Dot::item_bytes,
                               x.row_bytes,
                               unpacked,
                               panel.scales + k / panel.group_size * panel_features,
                               inputs * Dot::item_bytes,
                               group_bytes,
                               k == 0,
                               buffers};
        multiply_group_block<Dot>(block, num_rows, out, last);
    }
    const int rest = num_rows % tile_rows_max, from = num_rows < tile_rows_max ? 0 : tile_rows_max - rest;
    std::memcpy(out + (num_rows - rest) * panel_features, last.values + from * panel_features,
                sizeof(float) * static_cast<std::size_t>(rest * panel_features));
}

}  // namespace
}  // namespace penstock
