// Operations on rows that multiply no matrix: embedding, norms, quantization, activations, sums.
//
// Each thread takes whole rows (or, where values are independent, pieces of rows), widens them to float32 in
// its own scratch, and works there: a row of a model fits into the L1 cache, so that a pass over it costs a
// cycle a vector.
//
// ```
// x (bf16 | f32) --load--> scratch f32 --add, norm, activation ...--> store --> bf16 | f32
//                                                                `--> quantize --> i8, scale, sums
// ```
//
// **Law**: a row's result depends on that row alone; every sum runs in one fixed order.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <variant>

#include "penstock/linear.h"
#include "penstock/program.h"

namespace penstock {

enum class RowActivation : int { silu, gelu, gelu_tanh };

// "silu", "gelu" or "gelu_tanh"; throws std::invalid_argument for others.
RowActivation activation_named(std::string_view name);

// What each instruction set brings. Scratch rows are float32, 64-byte aligned, and hold 0 from n to n rounded
// up to 64.
struct DenseKernels {
    // Read n values; the rest of the last 64 becomes 0.
    void (*load_bf16)(const std::uint16_t* from, int n, float* row);
    void (*load_f32)(const float* from, int n, float* row);
    // row += n values.
    void (*add_bf16)(const std::uint16_t* from, int n, float* row);
    void (*add_f32)(const float* from, int n, float* row);
    // row += factor * n values.
    void (*add_scaled)(const float* from, int n, float factor, float* row);
    // Write n values and nothing behind them.
    void (*store_bf16)(const float* row, int n, std::uint16_t* to);
    void (*store_f32)(const float* row, int n, float* to);
    // row / sqrt(mean(row^2) + eps) * (weight + weight_offset)
    void (*rms_norm)(float* row, int n, const std::uint16_t* weight, float eps, float weight_offset);
    // (row - mean) / sqrt(var + eps) * weight + bias
    void (*layer_norm)(float* row, int n, const std::uint16_t* weight, const std::uint16_t* bias, float eps);
    // int8 values (n of them) and sums of every 32 (over n rounded up to 64); returns the scale.
    float (*quantize)(const float* row, int n, std::int8_t* values, std::int32_t* sums);
    void (*activate)(float* row, int n, RowActivation activation);
    void (*multiply)(float* row, int n, const float* by);
    void (*scale)(float* row, int n, float factor);
    void (*softcap)(float* row, int n, float cap);
};

const DenseKernels& dense_kernels(Isa isa);

// Each appends one operation; the arguments are those of the functions of the same names in _native.pyi. They
// throw std::invalid_argument for references that do not fit together.
using RowsOut = std::variant<Ref, QuantizedRef>;

struct EmbeddingArgs {
    Ref ids;
    const std::uint16_t* table;
    std::int64_t num_rows;
    std::int64_t row_stride;  // values from row to row
    float scale;
    Ref out;
};
void add_embedding(Program& program, const EmbeddingArgs& args);

struct NormArgs {
    Ref x;
    const std::uint16_t* weight;
    const std::uint16_t* bias;  // layer norm's
    float eps;
    float weight_offset;  // RMS norm's
    int group;            // values that are normed together; divides x.cols
    std::optional<Ref> residual;
    std::optional<Ref> sum;
    RowsOut out;
};
void add_rms_norm(Program& program, const NormArgs& args);
void add_layer_norm(Program& program, const NormArgs& args);

void add_quantize(Program& program, const Ref& x, const QuantizedRef& out);
void add_convert(Program& program, const Ref& x, const Ref& out);
void add_sum(Program& program, const Ref& a, const Ref& b, const Ref& out);
void add_scale(Program& program, const Ref& x, float factor, const Ref& out);
void add_activation(Program& program, const Ref& x, RowActivation activation, const RowsOut& out);
void add_gated_activation(Program& program, const Ref& gate, const Ref& up, RowActivation activation,
                          const RowsOut& out);
void add_softcap(Program& program, const Ref& x, float cap);

}  // namespace penstock
