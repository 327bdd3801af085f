// The attention kernels with tiles. See tiles.inl; the rest is kernels.inl with AVX-512.
#include "../tiles/tile.h"
#include "kernels.h"

#include "kernels.inl"
#include "tiles.inl"

namespace penstock {

const AttentionKernels& attention_kernels_amx() { return tile_kernels; }

}  // namespace penstock
