// One row on its way through the sampler, and a thread's scratch. Private to this folder.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace penstock {

inline constexpr std::int64_t most_lanes = 16;

// A row with the memory that belongs to it while it is worked on.
struct SampledRow {
    float* edited;   // [vocab]: the logits after the edits
    float* maxima;   // [blocks]
    float* columns;  // [columns]: sums of weights
    float* weights;  // [vocab]; only where a filter needs them
    std::int64_t vocab = 0;
    const float* raw = nullptr;     // as the model gave it
    const float* logits = nullptr;  // raw, or edited
    float raw_highest = 0.0f;
    float highest = 0.0f;  // of `logits`

    std::int64_t num_columns() const { return (vocab + column_tokens - 1) / column_tokens; }
    std::int64_t num_strips(const SamplingKernels& kernels) const {
        return (vocab + kernels.strip_tokens - 1) / kernels.strip_tokens;
    }
    std::int64_t num_blocks(const SamplingKernels& kernels) const {
        return num_strips(kernels) * kernels.strip_blocks;
    }
};

struct SampleScratch {
    float* blocks;        // [blocks]
    std::int64_t* ids;    // [vocab]
    std::uint64_t* keys;  // [vocab]
};

}  // namespace penstock
