// One draw from one row, scanned and (where it is read) weighed. Private to this folder.
#pragma once

#include <cstdint>

#include "row.h"

namespace penstock {

struct DrawParams {
    double temperature;  // above 0
    std::int64_t top_k;  // 0: off
    double top_p;        // 1: off
    double min_p;        // 0: off
    double uniform;      // in [0, 1)
};

// The first tokens of a row in its one order: logit falling, then id rising.
struct Candidates {
    const std::uint64_t* keys;
    std::int64_t num;

    std::int64_t id(std::int64_t i) const { return static_cast<std::int64_t>(keys[i] & 0xffffffffu); }
    float value(std::int64_t i) const;
};

// The first min(k, vocab) candidates; without those of -inf unless asked for. They lie in the scratch.
Candidates top_candidates(const SamplingKernels& kernels, const SampledRow& row, std::int64_t k,
                          bool with_impossible, const SampleScratch& scratch);

// The sum of all weights, from the columns.
double total_of(const SampledRow& row);

// The lowest id with the highest logit.
std::int64_t first_highest(const SamplingKernels& kernels, const SampledRow& row);

// Whether `draw` reads the columns' sums, and the weights themselves.
bool needs_columns(const DrawParams& params);
bool needs_weights(const DrawParams& params);

// One token; changes the row's weights and columns. A token of weight 0 is never drawn.
std::int64_t draw(const SamplingKernels& kernels, const SampledRow& row, const DrawParams& params,
                  const SampleScratch& scratch);

}  // namespace penstock
