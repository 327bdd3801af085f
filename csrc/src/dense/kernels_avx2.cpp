// The row kernels for AVX2 and FMA. See kernels.inl.
#include "kernels.inl"

namespace penstock {

const DenseKernels& dense_kernels_avx2() { return kernels; }

}  // namespace penstock
