// The sampler's passes for AVX-512. See kernels.inl.
#include "kernels.inl"

namespace penstock {

const SamplingKernels& sampling_kernels_avx512() { return kernels; }

}  // namespace penstock
