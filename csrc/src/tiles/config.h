// The shapes of the eight tile registers, as LDTILECFG reads them.
//
// ```
// byte 0 palette (1) | 1 start row (0) | 2-15 zero | 16-31 bytes a row, tiles 0 to 7 | 32-47 zero | 48-55 rows | 56-63 zero
// ```
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18 "Programming
// with Intel AMX".
#pragma once

#include <cstdint>

namespace penstock {

inline constexpr int num_tiles = 8;
inline constexpr int tile_rows_max = 16;
inline constexpr int tile_row_bytes_max = 64;
inline constexpr int tile_bytes = tile_rows_max * tile_row_bytes_max;

struct alignas(64) TileConfig {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace penstock
