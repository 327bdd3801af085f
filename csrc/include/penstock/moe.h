// A mixture of experts: each token's best experts by the router's probability, their gated MLPs' results
// summed with those weights.
//
// ```
// route    router logits, softmax over all experts, the top_k of each token (equal: lowest id)
// sort     slots: the (token, rank) pairs ordered by expert; an expert's rows follow each other
// gather   rows of x by slot (bf16, or int8 with a scale each)
// up       activation(gate(x)) * up(x), a task for each panel of each expert that has rows
// down     the same for the down projection, float32 by slot
// sum      of each token's slots in the order of their ranks, weighted
// ```
//
// **Law**: a token's result does not depend on the other tokens: its products do not (linear.h), its sum has
// one order.
//
// Source: Jiang et al., Mixtral of Experts (2024), section 2.1; grouping by expert as in Gale et al.,
// MegaBlocks (2022).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "penstock/dense.h"
#include "penstock/matrix.h"
#include "penstock/program.h"

namespace penstock {

struct Expert {
    std::shared_ptr<Matrix> gate;
    std::shared_ptr<Matrix> up;
    std::shared_ptr<Matrix> down;
};

struct MoeArgs {
    Ref x;                         // bf16
    const std::uint16_t* router;   // bf16 [experts, x.cols]
    std::vector<Expert> experts;
    int top_k;
    bool renormalize;              // divide the chosen probabilities by their sum
    RowActivation activation;
    bool is_quantized;             // int8 rows inside
    Ref out;                       // bf16 or f32
    bool add;                      // add to what stands in `out`
};

// Appends the operation. Throws std::invalid_argument for shapes that do not fit together.
void add_moe(Program& program, const MoeArgs& args);

}  // namespace penstock
