// The row kernels for any CPU of the architecture. See kernels.inl.
#include "kernels.inl"

namespace penstock {

const DenseKernels& dense_kernels_scalar() { return kernels; }

}  // namespace penstock
