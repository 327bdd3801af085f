// The row kernels for AVX-512. See kernels.inl.
#include "kernels.inl"

namespace penstock {

const DenseKernels& dense_kernels_avx512() { return kernels; }

}  // namespace penstock
