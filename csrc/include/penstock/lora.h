// Low-rank adapters: y += scale * B (A x), for each row with its own adapter.
//
// Rows that use the same adapter and lie next to each other are a segment; other rows are the base model's
// and are left alone. Nothing is padded to the largest rank: each segment costs what its own adapter weighs.
//
// ```
// A   bf16 [rank][in]                   a row after the other: h[j] = dot(A[j], x)
// B   bf16 [ceil(out / 32)][rank][32]   panels of 32 outputs, zero behind the last: y[32 p + f] += h[j] B[p][j][f]
// ```
//
// Both are read once and in order, which is what a decode step costs: (in + out) * rank * 2 bytes a segment.
// **Law**: a row's result depends on that row and its adapter alone; every sum runs in one fixed order.
#pragma once

#include <cstdint>
#include <vector>

#include "penstock/program.h"

namespace penstock {

inline constexpr int adapter_panel = 32;     // outputs that lie together in B
inline constexpr int adapter_tile_rows = 8;  // rows of a segment that one task takes: they share A and B from the cache

// One product of an adapter over up to `adapter_tile_rows` rows.
struct LowRankTask {
    LowRank weights;
    Rows x;  // bf16
    Rows y;  // bf16 or f32, added to
    std::int64_t first_row;
    int num_rows;
    float* scratch;  // `low_rank_scratch` floats, 64-byte aligned
};

using ApplyLowRank = void (*)(const LowRankTask& task);

ApplyLowRank apply_low_rank(Isa isa);

// A product that adapters may change: its number in `AdapterRows::sites`, and where its result stands.
struct LoraSite {
    int site;
    Ref out;
};

// For every segment of the step: add its adapter's part to what stands in the outputs, products of the same x
// (bf16). Does nothing in a step without segments. Throws std::invalid_argument for references that do not
// fit.
void add_lora(Program& program, const Ref& x, const std::vector<LoraSite>& sites);

}  // namespace penstock
