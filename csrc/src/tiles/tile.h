// Tile instructions under one set of names, for kernels that are written once and compiled twice.
//
// A kernel's *_amx.cpp includes this and its own .inl; its *_amx_emulated.cpp defines PENSTOCK_EMULATED_TILES
// first and gets the same instructions from a machine in plain C++ (machine_amx_emulated.cpp), which stops
// the process wherever the hardware would fault. Tile numbers are template arguments, as in the instructions.
//
// ```
// configure(config)     LDTILECFG, unless the thread's tiles have these shapes already
// zero<T>()             TILEZERO       tile T = 0
// load<T>(from, n)      TILELOADD      row r of tile T from `from + r * n` (bytes)
// store<T>(to, n)       TILESTORED     row r of tile T to `to + r * n`
// dot_bf16<C, A, B>()   TDPBF16PS      C[m][n] += sum over k of A[m][2k, 2k+1] . B[k][2n, 2n+1], float32
// dot_int8<C, A, B>()   TDPBSSD        C[m][n] += sum over k of A[m][4k .. 4k+3] . B[k][4n .. 4n+3], int32
// ```
//
// **The configuration** belongs to the thread, and other code may run on the same thread between two
// operations (a framework's own tile kernels on the caller's), so nobody may assume that it is still there.
// `configure` reads it back (STTILECFG, 19 cycles) and loads it (LDTILECFG, about 200) only where it differs.
// Nobody releases the tiles: that would make each operation pay for loading them again, while a live tile
// state costs 8 KiB of copying at a context switch only; the operating system's idle loop releases it before
// deep sleep.
//
// All of it lies in an anonymous namespace: a copy for each file, in that file's instruction set.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2; cycles: Intel 64 and IA-32
// Architectures Optimization Reference Manual, chapter "Intel Advanced Matrix Extensions".
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "config.h"

#if defined(PENSTOCK_EMULATED_TILES)
#include "machine.h"
#endif

#define PENSTOCK_TILE [[gnu::always_inline, maybe_unused]] inline

namespace penstock {
namespace {
namespace tile {

#if defined(PENSTOCK_EMULATED_TILES)

PENSTOCK_TILE void load_config(const TileConfig& config) { emulated::load_config(config); }
PENSTOCK_TILE void store_config(TileConfig& config) { emulated::store_config(config); }

template <int T>
PENSTOCK_TILE void zero() {
    emulated::zero(T);
}

template <int T>
PENSTOCK_TILE void load(const void* from, std::int64_t stride) {
    emulated::load(T, from, stride);
}

template <int T>
PENSTOCK_TILE void store(void* to, std::int64_t stride) {
    emulated::store(T, to, stride);
}

template <int C, int A, int B>
PENSTOCK_TILE void dot_bf16() {
    emulated::dot_bf16(C, A, B);
}

template <int C, int A, int B>
PENSTOCK_TILE void dot_int8() {
    emulated::dot_int8(C, A, B);
}

#else

// Written as assembly and not with the compiler's intrinsics: g++ 12's say neither that a configuration is 64
// bytes of input nor that a tile is loaded from memory (stores into it are then dropped or moved), and take
// literals only. The compiler never uses tile registers itself, so there is nothing to declare as
// overwritten.

PENSTOCK_TILE void load_config(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }
PENSTOCK_TILE void store_config(TileConfig& config) { __asm__ volatile("sttilecfg %0" : "=m"(config)); }

template <int T>
PENSTOCK_TILE void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}

template <int T>
PENSTOCK_TILE void load(const void* from, std::int64_t stride) {
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(from), "r"(stride) : "memory");
}

template <int T>
PENSTOCK_TILE void store(void* to, std::int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(to), "r"(stride) : "memory");
}

template <int C, int A, int B>
PENSTOCK_TILE void dot_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

template <int C, int A, int B>
PENSTOCK_TILE void dot_int8() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

PENSTOCK_TILE void configure(const TileConfig& config) {
    TileConfig current;
    store_config(current);
    if (std::memcmp(&current, &config, sizeof config) != 0) load_config(config);
}

constexpr void set_shape(TileConfig& config, int tile, int rows, int row_bytes) {
    config.rows[tile] = static_cast<std::uint8_t>(rows);
    config.row_bytes[tile] = static_cast<std::uint16_t>(row_bytes);
}

// C tiles 0 to 3 of `rows` x 16, A tiles 4 and 5 of `rows` x `a_row_bytes`, B tiles 6 and 7 of as many rows
// as A has columns.
constexpr TileConfig product_config(int rows, int a_row_bytes) {
    TileConfig config;
    for (int t = 0; t < 4; ++t) set_shape(config, t, rows, tile_row_bytes_max);
    for (int t = 4; t < 6; ++t) set_shape(config, t, rows, a_row_bytes);
    for (int t = 6; t < 8; ++t) set_shape(config, t, a_row_bytes / 4, tile_row_bytes_max);
    return config;
}

template <int a_row_bytes, int... rows>
constexpr auto product_configs(std::integer_sequence<int, rows...>) {
    return std::array{product_config(rows + 1, a_row_bytes)...};
}

template <int a_row_bytes>
constexpr auto configs = product_configs<a_row_bytes>(std::make_integer_sequence<int, tile_rows_max>{});

// For products of `rows` rows, at most 16 of them.
template <int a_row_bytes = tile_row_bytes_max>
PENSTOCK_TILE void configure_product(int rows) {
    configure(configs<a_row_bytes>[(rows < tile_rows_max ? rows : tile_rows_max) - 1]);
}

}  // namespace tile
}  // namespace
}  // namespace penstock
