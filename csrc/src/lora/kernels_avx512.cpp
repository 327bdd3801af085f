// The adapters' kernel for AVX-512. See kernels.inl.
#include "kernels.inl"

namespace penstock {

void apply_low_rank_avx512(const LowRankTask& task) { apply(task); }

}  // namespace penstock
