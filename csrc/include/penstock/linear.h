// `x @ weight.T`: the one interface behind which every instruction set and weight format multiplies.
//
// A kernel computes one panel (32 output features) for some rows, sums in float32 (int32 within an int8
// group), scales applied, no bias and no activation: `linear_op` distributes panels and rows over the threads
// and finishes the results (bias, gate, residual, store) while they lie in the cache.
//
// ```
//   x rows  [first_row, first_row + num_rows)  x  panel p of w   ->   out [num_rows][32] float32
// ```
//
// **Law**: a row's result is the same bits whatever rows are computed with it, in whatever order and by how
// many threads: each output is one fixed sequence of operations over K. (Between instruction sets results
// differ by roundings.)
#pragma once

#include <cstdint>

#include "penstock/isa.h"
#include "penstock/matrix.h"
#include "penstock/program.h"

namespace penstock {

// int8 rows: x = value * scale. One scale a row (token), values in [-127, 127].
// `sums[g]` is the sum of values [32 g, 32 g + 32): weights are stored with an offset in some formats.
struct QuantizedRef {
    Ref values;  // i8 [rows, K]
    Ref scales;  // f32 [rows, 1]
    Ref sums;    // i32 [rows, ceil(K / 64) * 2]
};
inline constexpr int sum_group = 32;

// The input rows of a product, bound: bf16 (scales and sums null) or int8.
struct Operand {
    const std::byte* data;
    std::int64_t row_bytes;  // rows are zero from K to K rounded up to 64
    const std::byte* scales = nullptr;
    std::int64_t scales_row_bytes = 0;
    const std::byte* sums = nullptr;
    std::int64_t sums_row_bytes = 0;

    template <class T>
    [[gnu::always_inline]] const T* row(std::int64_t r) const {
        return reinterpret_cast<const T*>(data + r * row_bytes);
    }
    [[gnu::always_inline]] float scale(std::int64_t r) const {
        return *reinterpret_cast<const float*>(scales + r * scales_row_bytes);
    }
    [[gnu::always_inline]] const std::int32_t* group_sums(std::int64_t r) const {
        return reinterpret_cast<const std::int32_t*>(sums + r * sums_row_bytes);
    }
};

// num_rows >= 1; out is 64-byte aligned, [num_rows][32]. Features past out_features get 0.
using Multiply = void (*)(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w, int panel,
                          float* out);

// The same for some of the inputs, a multiple of 64 of them: parts in their order, the first
// at 0, the last to padded_inputs, give Multiply's bits. Between them `out` holds the kernel's own sums.
struct InputRange {
    int first;
    int end;
};
using MultiplyPart = void (*)(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w,
                              int panel, const InputRange& inputs, float* out);

struct LinearKernels {
    Multiply bf16;              // bf16 rows, bf16 weights
    Multiply int8;              // int8 rows, int8 weights
    Multiply int4;              // int8 rows, int4 weights
    Multiply int8_weight_only;  // bf16 rows, int8 weights (widened to bf16 on the way)
    Multiply int4_weight_only;  // bf16 rows, int4 weights
    int rows_at_once;           // the least number of rows at which it reaches its full speed (a multiple is best)
    MultiplyPart bf16_part = nullptr;  // null where an instruction set has none: tiles have
    MultiplyPart int8_part = nullptr;
};

const LinearKernels& linear_kernels(Isa isa);

}  // namespace penstock
