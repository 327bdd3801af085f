// The epilogues for scalar. See epilogue.inl.
#include "epilogue.inl"

namespace penstock {

const EpilogueKernels epilogue_scalar{&store_sums, &add_sums, &write_maxima, &gate_sums};

}  // namespace penstock
