// See machine.h. Compiled with AVX-512 so that a row of a tile is one vector for the compiler; no instruction
// named.
#include "machine.h"

#include <pmmintrin.h>
#include <xmmintrin.h>

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace penstock::emulated {

namespace {

constexpr int lanes = tile_row_bytes_max / 4;

struct Tile {
    alignas(64) std::byte bytes[tile_rows_max][tile_row_bytes_max];
};

struct Machine {
    TileConfig config{.palette = 0};
    Tile tiles[num_tiles];
};

thread_local Machine machine;

[[noreturn]] void fault(const char* instruction, const char* reason) {
    std::fprintf(stderr, "penstock: tiles: %s would fault on hardware: %s\n", instruction, reason);
    std::abort();
}

void require(bool holds, const char* instruction, const char* otherwise) {
    if (!holds) fault(instruction, otherwise);
}

bool are_zero(const std::uint8_t* bytes, int count) {
    for (int i = 0; i < count; ++i) {
        if (bytes[i] != 0) return false;
    }
    return true;
}

int rows_of(int tile) { return machine.config.rows[tile]; }
int row_bytes_of(int tile) { return machine.config.row_bytes[tile]; }

void require_shape(int tile, const char* instruction) {
    require(machine.config.palette == 1, instruction, "no configuration is loaded");
    require(tile >= 0 && tile < num_tiles, instruction, "no such tile");
    require(rows_of(tile) != 0 && row_bytes_of(tile) != 0, instruction, "the tile has no shape");
}

// What every dot product needs: C [m, n] += A [m, k] B [k, n], all in 4-byte elements.
void require_product(int c, int a, int b, const char* instruction) {
    for (int tile : {c, a, b}) {
        require_shape(tile, instruction);
        require(row_bytes_of(tile) % 4 == 0, instruction, "a row is not whole 4-byte elements");
    }
    require(c != a && c != b && a != b, instruction, "a tile is named twice");
    require(rows_of(c) == rows_of(a), instruction, "C and A differ in rows");
    require(row_bytes_of(c) == row_bytes_of(b), instruction, "C and B differ in columns");
    require(row_bytes_of(a) / 4 == rows_of(b), instruction, "A's columns are not B's rows");
}

void clear_behind(Tile& tile, int rows, int row_bytes) {
    for (int r = 0; r < tile_rows_max; ++r) {
        const int kept = r < rows ? row_bytes : 0;
        std::memset(tile.bytes[r] + kept, 0, static_cast<std::size_t>(tile_row_bytes_max - kept));
    }
}

// The even and the odd inputs of B, widened to float32; whoever multiplies reads them.
struct Widened {
    float even[tile_rows_max][lanes];
    float odd[tile_rows_max][lanes];
};

float widen(std::uint32_t bits) { return std::bit_cast<float>(bits); }

void widen_pairs(const std::byte* row, float* even, float* odd) {
    std::uint32_t pairs[lanes];
    std::memcpy(pairs, row, sizeof pairs);
    for (int n = 0; n < lanes; ++n) even[n] = widen(pairs[n] << 16);
    for (int n = 0; n < lanes; ++n) odd[n] = widen(pairs[n] & 0xffff0000u);
}

// Not inlined: it must run between the two changes of the rounding mode.
[[gnu::noinline]] void multiply_bf16(Tile& c, const Tile& a, const Widened& b, int num_rows, int num_pairs) {
    for (int m = 0; m < num_rows; ++m) {
        float a_even[lanes], a_odd[lanes];
        widen_pairs(a.bytes[m], a_even, a_odd);
        float even[lanes] = {}, odd[lanes] = {};
        for (int k = 0; k < num_pairs; ++k) {
            for (int n = 0; n < lanes; ++n) even[n] = __builtin_fmaf(a_even[k], b.even[k][n], even[n]);
            for (int n = 0; n < lanes; ++n) odd[n] = __builtin_fmaf(a_odd[k], b.odd[k][n], odd[n]);
        }
        float sums[lanes];
        std::memcpy(sums, c.bytes[m], sizeof sums);
        for (int n = 0; n < lanes; ++n) sums[n] += even[n] + odd[n];
        std::memcpy(c.bytes[m], sums, sizeof sums);
    }
}

}  // namespace

void load_config(const TileConfig& config) {
    constexpr const char* name = "LDTILECFG";
    require(config.palette == 1, name, "the palette is not 1");
    require(config.start_row == 0 && are_zero(config.reserved, sizeof config.reserved), name,
            "reserved bytes are set");
    for (int t = 0; t < 16; ++t) {
        const int rows = config.rows[t], row_bytes = config.row_bytes[t];
        require(t < num_tiles || (rows == 0 && row_bytes == 0), name, "a tile behind the eighth has a shape");
        require(rows <= tile_rows_max && row_bytes <= tile_row_bytes_max, name, "a tile is too large");
        require((rows == 0) == (row_bytes == 0), name, "a tile has rows or columns but not both");
    }
    machine.config = config;
    for (Tile& tile : machine.tiles) std::memset(&tile, 0, sizeof tile);
}

void store_config(TileConfig& config) { config = machine.config; }

void zero(int tile) {
    require_shape(tile, "TILEZERO");
    std::memset(&machine.tiles[tile], 0, sizeof(Tile));
}

void load(int tile, const void* from, std::int64_t stride) {
    require_shape(tile, "TILELOADD");
    Tile& to = machine.tiles[tile];
    for (int r = 0; r < rows_of(tile); ++r) {
        std::memcpy(to.bytes[r], static_cast<const std::byte*>(from) + r * stride,
                    static_cast<std::size_t>(row_bytes_of(tile)));
    }
    clear_behind(to, rows_of(tile), row_bytes_of(tile));
}

void store(int tile, void* to, std::int64_t stride) {
    require_shape(tile, "TILESTORED");
    for (int r = 0; r < rows_of(tile); ++r) {
        std::memcpy(static_cast<std::byte*>(to) + r * stride, machine.tiles[tile].bytes[r],
                    static_cast<std::size_t>(row_bytes_of(tile)));
    }
}

void dot_bf16(int c, int a, int b) {
    require_product(c, a, b, "TDPBF16PS");
    Widened widened;
    for (int k = 0; k < rows_of(b); ++k)
        widen_pairs(machine.tiles[b].bytes[k], widened.even[k], widened.odd[k]);
    // Denormals as the tiles treat them, exceptions masked, round to nearest even: 0x8000 | 0x0040 | 0x1f80.
    const unsigned before = _mm_getcsr();
    _mm_setcsr(_MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON | _MM_MASK_MASK);
    multiply_bf16(machine.tiles[c], machine.tiles[a], widened, rows_of(a), rows_of(b));
    _mm_setcsr(before);
    clear_behind(machine.tiles[c], rows_of(c), row_bytes_of(c));
}

void dot_int8(int c, int a, int b) {
    require_product(c, a, b, "TDPBSSD");
    for (int m = 0; m < rows_of(c); ++m) {
        std::uint32_t sums[lanes];
        std::memcpy(sums, machine.tiles[c].bytes[m], sizeof sums);
        const auto* left = reinterpret_cast<const std::int8_t*>(machine.tiles[a].bytes[m]);
        for (int k = 0; k < rows_of(b); ++k) {
            const auto* right = reinterpret_cast<const std::int8_t*>(machine.tiles[b].bytes[k]);
            for (int n = 0; n < lanes; ++n) {
                int sum = 0;
                for (int i = 0; i < 4; ++i) sum += left[4 * k + i] * right[4 * n + i];
                sums[n] += static_cast<std::uint32_t>(sum);
            }
        }
        std::memcpy(machine.tiles[c].bytes[m], sums, sizeof sums);
    }
    clear_behind(machine.tiles[c], rows_of(c), row_bytes_of(c));
}

}  // namespace penstock::emulated
