// What is done to a panel's sums while they lie in the cache: bias, residual, gate, store.
#pragma once

#include "penstock/isa.h"
#include "penstock/linear_op.h"
#include "penstock/program.h"

namespace penstock {

// One panel's results: float32 [num_rows][32], 64-byte aligned, and the panel's 32 biases (null for none).
struct Sums {
    const float* values;
    const float* bias;
};

// Where they go: rows [first_row, first_row + num_rows), columns [first_col, first_col + num_cols), num_cols
// <= 32.
struct Destination {
    Rows out;  // bf16 or f32
    std::int64_t first_row;
    int num_rows;
    int first_col;
    int num_cols;
};

struct EpilogueKernels {
    void (*store)(const Sums& sums, const Destination& to);                           // out = sums
    void (*add)(const Sums& sums, const Destination& to);                             // out = out + sums
    // The largest value of each row that `store` has just written as f32, NaN where there is one.
    void (*maxima)(const Destination& from, float* maxima, std::int64_t row_values);
    void (*gate)(Gate kind, const Sums& gate, const Sums& up, const Destination& to);  // out = activation(gate) * up
};

extern const EpilogueKernels epilogue_scalar;
[[gnu::weak]] extern const EpilogueKernels epilogue_avx2;    // not there on other architectures
[[gnu::weak]] extern const EpilogueKernels epilogue_avx512;

}  // namespace penstock
