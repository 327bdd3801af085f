// Quantizing to int4, plain C++. See int4_quantize.inl.
#include "int4_quantize.inl"

namespace penstock {

const Int4Quantize& int4_quantize_scalar() { return quantize_groups; }

}  // namespace penstock
