// The attention kernels with tiles, which are emulated in plain C++. See tiles.inl; the rest is kernels.inl
// with AVX-512.
#define PENSTOCK_EMULATED_TILES
#include "../tiles/tile.h"
#include "kernels.h"

#include "kernels.inl"
#include "tiles.inl"

namespace penstock {

const AttentionKernels& attention_kernels_amx_emulated() { return tile_kernels; }

}  // namespace penstock
