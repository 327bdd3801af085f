// Quantizing to int4, AVX2. See int4_quantize.inl.
#include "int4_quantize.inl"

namespace penstock {

const Int4Quantize& int4_quantize_avx2() { return quantize_groups; }

}  // namespace penstock
