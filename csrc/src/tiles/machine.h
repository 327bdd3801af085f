// The tile registers of a thread and the instructions on them in plain C++: exact, slow, checked.
//
// Exact means bit for bit, as the manual defines the operations: int8 products summed modulo 2^32; bf16
// products in float32 by fused multiply-adds, even and odd inputs apart, their sum added to the tile; every
// step rounded to nearest even, denormals taken as zero and flushed to zero.
// Checked means that whatever raises #UD or #GP on hardware (no configuration, a wrong palette, shapes that
// do not fit together, one tile named twice) ends the process with a line that says so.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, LDTILECFG, TILELOADD,
// TDPBF16PS, TDPBSSD.
#pragma once

#include <cstdint>

#include "config.h"

namespace penstock::emulated {

void load_config(const TileConfig& config);
void store_config(TileConfig& config);
void zero(int tile);
void load(int tile, const void* from, std::int64_t stride);
void store(int tile, void* to, std::int64_t stride);
void dot_bf16(int c, int a, int b);
void dot_int8(int c, int a, int b);

}  // namespace penstock::emulated
