// The sampler's passes for AVX2 and FMA. See kernels.inl.
#include "kernels.inl"

namespace penstock {

const SamplingKernels& sampling_kernels_avx2() { return kernels; }

}  // namespace penstock
