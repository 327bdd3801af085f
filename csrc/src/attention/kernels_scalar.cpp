// The attention kernels for any CPU of the architecture. See kernels.inl.
#include "kernels.h"

#include "kernels.inl"

namespace penstock {

const AttentionKernels& attention_kernels_scalar() { return kernels; }

}  // namespace penstock
