// The epilogues for avx512. See epilogue.inl.
#include "epilogue.inl"

namespace penstock {

const EpilogueKernels epilogue_avx512{&store_sums, &add_sums, &write_maxima, &gate_sums};

}  // namespace penstock
