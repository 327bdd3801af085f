// The multiplication kernels by name, one file each: multiply_<format>_<isa> is in <format>_<isa>.cpp.
//
// A declaration is weak: where its file is not part of the build (another architecture) it is null, and the
// table takes the next lower instruction set's.
#pragma once

#include "penstock/linear.h"

namespace penstock {

using MultiplyFunction = void(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w,
                              int panel, float* out);

#define PENSTOCK_KERNELS(format)                                      \
    [[gnu::weak]] MultiplyFunction multiply_##format##_scalar;        \
    [[gnu::weak]] MultiplyFunction multiply_##format##_avx2;          \
    [[gnu::weak]] MultiplyFunction multiply_##format##_avx512;        \
    [[gnu::weak]] MultiplyFunction multiply_##format##_amx_emulated;  \
    [[gnu::weak]] MultiplyFunction multiply_##format##_amx;

using MultiplyPartFunction = void(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w,
                                  int panel, const InputRange& inputs, float* out);
[[gnu::weak]] MultiplyPartFunction multiply_bf16_part_amx;
[[gnu::weak]] MultiplyPartFunction multiply_bf16_part_amx_emulated;
[[gnu::weak]] MultiplyPartFunction multiply_int8_part_amx;
[[gnu::weak]] MultiplyPartFunction multiply_int8_part_amx_emulated;

PENSTOCK_KERNELS(bf16)
PENSTOCK_KERNELS(int8)
PENSTOCK_KERNELS(int4)
PENSTOCK_KERNELS(int8_weight_only)
PENSTOCK_KERNELS(int4_weight_only)
#undef PENSTOCK_KERNELS

}  // namespace penstock
