// The attention kernels for AVX2. See kernels.inl.
#include "kernels.h"

#include "kernels.inl"

namespace penstock {

const AttentionKernels& attention_kernels_avx2() { return kernels; }

}  // namespace penstock
