// One row on its way through the sampler, and a thread's scratch. Private to this folder.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace penstock {

inline constexpr std::int64_t most_lanes = 16;

// A row with the memory that belongs to it while it is worked on.
struct SampledRow {
    float* edited;   // [vocab]: the logits after the edits
    float* scanned;  // [blocks]: maxima of our own scan
    float* columns;  // [columns]: sums of weights
    float* weights;  // [vocab]; only where a filter needs them
    std::int64_t vocab = 0;
    const float* raw = nullptr;     // as the model gave it
    const float* logits = nullptr;  // raw, or edited
    const float* maxima = nullptr;  // [blocks] of `logits`: our own or those that came with them
    std::int64_t strip_tokens = 0;  // neighbours whose blocks' maxima lie together
    std::int64_t strip_blocks = 0;
    float raw_highest = 0.0f;
    float highest = 0.0f;  // of `logits`

    std::int64_t num_columns() const { return (vocab + column_tokens - 1) / column_tokens; }
    std::int64_t num_strips() const { return (vocab + strip_tokens - 1) / strip_tokens; }
    std::int64_t num_blocks() const { return num_strips() * strip_blocks; }
};

struct SampleScratch {
    float* blocks;        // [blocks]
    std::int64_t* ids;    // [vocab]
    std::uint64_t* keys;  // [vocab]
};

}  // namespace penstock
