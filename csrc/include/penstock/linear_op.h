// The linear operations of a program: products of all rows of x with packed matrices, finished and stored.
//
// Each throws std::invalid_argument where shapes, dtypes or formats do not fit together.
#pragma once

#include <memory>
#include <variant>
#include <vector>

#include "penstock/linear.h"
#include "penstock/matrix.h"
#include "penstock/program.h"

namespace penstock {

enum class Gate : int { silu, gelu, gelu_tanh };

// bf16 rows, or int8 rows (int8 and int4 matrices only). In rows whose length is not a multiple of 64 zeros
// must follow: a buffer of the program's own, or its last columns.
using LinearInput = std::variant<Ref, QuantizedRef>;

struct Projection {
    std::shared_ptr<const Matrix> matrix;
    const float* bias;  // [out_features], copied; null for none
};

// outs[i] = x @ matrix[i].T + bias[i], or that added to what stands in outs[i]. outs: bf16 or f32 [rows,
// out_features].
void add_linear(Program& program, const LinearInput& x, const std::vector<Projection>& projections,
                const std::vector<Ref>& outs, bool add);

// out = activation(gate of x) * (up of x). out: bf16 or f32 [rows, out_features].
void add_gated_linear(Program& program, const LinearInput& x, const Projection& gate, const Projection& up,
                      Gate kind, const Ref& out);

}  // namespace penstock
