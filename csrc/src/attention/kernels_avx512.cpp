// The attention kernels for AVX-512. See kernels.inl.
#include "kernels.h"

#include "kernels.inl"

namespace penstock {

const AttentionKernels& attention_kernels_avx512() { return kernels; }

}  // namespace penstock
