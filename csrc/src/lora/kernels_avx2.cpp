// The adapters' kernel for AVX2. See kernels.inl.
#include "kernels.inl"

namespace penstock {

void apply_low_rank_avx2(const LowRankTask& task) { apply(task); }

}  // namespace penstock
