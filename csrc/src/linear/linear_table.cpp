// The kernels of each instruction set: its own, or the next lower one's. See linear.h.
#include <initializer_list>

#include "kernels.h"

namespace penstock {

namespace {

// Rows that fill each instruction set's registers (or tiles) beside a panel of 32 features.
constexpr int rows_scalar = 4, rows_avx2 = 6, rows_avx512 = 12, rows_amx = 32;

Multiply first_of(std::initializer_list<Multiply> fastest_first) {
    for (Multiply kernel : fastest_first) {
        if (kernel) return kernel;
    }
    return nullptr;
}

#define PENSTOCK_SCALAR(format) multiply_##format##_scalar
#define PENSTOCK_AVX2(format) multiply_##format##_avx2, PENSTOCK_SCALAR(format)
#define PENSTOCK_AVX512(format) multiply_##format##_avx512, PENSTOCK_AVX2(format)
#define PENSTOCK_AMX_EMULATED(format) multiply_##format##_amx_emulated, PENSTOCK_AVX512(format)
#define PENSTOCK_AMX(format) multiply_##format##_amx, PENSTOCK_AVX512(format)
#define PENSTOCK_TABLE(isa, rows)                                                      \
    LinearKernels {                                                                    \
        first_of({isa(bf16)}), first_of({isa(int8)}), first_of({isa(int4)}),           \
            first_of({isa(int8_weight_only)}), first_of({isa(int4_weight_only)}), rows \
    }

LinearKernels with_parts(LinearKernels kernels, MultiplyPart bf16, MultiplyPart int8) {
    kernels.bf16_part = bf16;
    kernels.int8_part = int8;
    return kernels;
}

}  // namespace

const LinearKernels& linear_kernels(Isa isa) {
    static const LinearKernels scalar = PENSTOCK_TABLE(PENSTOCK_SCALAR, rows_scalar);
    static const LinearKernels avx2 = PENSTOCK_TABLE(PENSTOCK_AVX2, rows_avx2);
    static const LinearKernels avx512 = PENSTOCK_TABLE(PENSTOCK_AVX512, rows_avx512);
    static const LinearKernels emulated =
        with_parts(PENSTOCK_TABLE(PENSTOCK_AMX_EMULATED, rows_amx), multiply_bf16_part_amx_emulated,
                   multiply_int8_part_amx_emulated);
    static const LinearKernels amx =
        with_parts(PENSTOCK_TABLE(PENSTOCK_AMX, rows_amx), multiply_bf16_part_amx, multiply_int8_part_amx);
    switch (isa) {
        case Isa::scalar: return scalar;
        case Isa::avx2: return avx2;
        case Isa::avx512: return avx512;
        case Isa::amx_emulated: return emulated;
        case Isa::amx: return amx;
    }
    return scalar;
}

}  // namespace penstock
