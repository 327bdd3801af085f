// The epilogues for avx2. See epilogue.inl.
#include "epilogue.inl"

namespace penstock {

const EpilogueKernels epilogue_avx2{&store_sums, &add_sums, &write_maxima, &gate_sums};

}  // namespace penstock
