// The sampler's passes for any CPU of the architecture. See kernels.inl.
#include "kernels.inl"

namespace penstock {

const SamplingKernels& sampling_kernels_scalar() { return kernels; }

}  // namespace penstock
