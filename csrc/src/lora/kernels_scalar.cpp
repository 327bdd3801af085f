// The adapters' kernel for any CPU. See kernels.inl.
#include "kernels.inl"

namespace penstock {

void apply_low_rank_scalar(const LowRankTask& task) { apply(task); }

}  // namespace penstock
