// The kernel of lora.h, by instruction set. Private to this folder.
#pragma once

#include "penstock/lora.h"

namespace penstock {

// Floats of scratch behind `num_values` of a row.
[[gnu::always_inline]] inline int padded_values(int num_values) { return (num_values + 63) / 64 * 64; }

void apply_low_rank_scalar(const LowRankTask& task);
void apply_low_rank_avx2(const LowRankTask& task);
void apply_low_rank_avx512(const LowRankTask& task);

}  // namespace penstock
