// Weights in the order in which the linear kernels read them.
//
// A matrix [out_features N, in_features K] is cut into panels of 32 output features; a panel is read from its
// first byte to its last by one thread. Inside a panel the inputs follow each other in groups that fill one
// instruction:
//
// ```
// bf16  [ceil(N/32)] [Kp/2] [32 features] [2 inputs]      128 bytes a pair of inputs
// int8  [ceil(N/32)] [Kp/4] [32 features] [4 inputs]      128 bytes for four inputs; signed
// int4  [ceil(N/32)] [Kp/8] [32 features] [8 inputs]      byte j of a feature: low nibble input j, high nibble input j + 4
// ```
//
// Kp is K rounded up to 64, the rest and the missing features of the last panel are zero (int4: nibbles of
// 8). 16 rows of 64 bytes at a stride of 128 are one operand tile of AMX; two such vectors a row are what
// AVX-512 multiplies by a broadcast group of the input.
//
// Quantization (both symmetric, round to nearest even):
//   int8  one scale a feature: scale = max|w| / 127, q = round(w / scale) in [-127, 127] (all 0 where scale is 0)
//   int4  one scale a feature and `group_size` inputs (32, 64 or 128), stored as float16; q in [-8, 7], stored as q + 8
//
// The scale of an int4 group is the best of five. All in float32, each operation rounded; m is the group's
// value of greatest magnitude with its sign (the first of equals), the last group is filled up with zeros:
//
// ```
// for d in -7, -7.5, -8, -8.5, -9:
//     s = float16(m / d)          i = 1 / s, or 0 where s is 0
//     q = min(max(round(w * i), -8), 7)
//     e = (w - q * s)^2, summed by halves: e[j] += e[j + n/2] for j < n/2; n /= 2; until n is 1
// the first s of the least e, and its q
// ```
//
// Infinity and NaN are refused, for int4 also magnitudes above 458528 (65504 * 7), and more than 131072
// inputs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "penstock/huge_buffer.h"
#include "penstock/pool.h"
#include "penstock/program.h"

namespace penstock {

enum class WeightFormat : int { bf16, int8, int4 };

inline constexpr int panel_features = 32;
inline constexpr int input_alignment = 64;

struct Matrix {
    WeightFormat format;
    int out_features;
    int in_features;
    int padded_inputs;   // in_features rounded up to `input_alignment`
    int num_panels;
    int group_size;      // int4: inputs that share a scale; 0 otherwise
    HugeBuffer values;   // panels, as drawn above
    HugeBuffer scales;   // int8: float32 [num_panels * 32]; int4: float16 [num_panels][num_groups()][32]

    int num_groups() const { return group_size ? (padded_inputs + group_size - 1) / group_size : 0; }
    std::size_t num_bytes() const { return values.size() + scales.size(); }
    std::size_t panel_bytes() const {
        return num_panels ? values.size() / static_cast<std::size_t>(num_panels) : 0;
    }
};

// The source of a pack: element (n, k) at data + n * row_stride + k * col_stride (strides in elements).
struct Plain {
    const void* data;
    DType dtype;  // bf16 or f32
    std::int64_t row_stride;
    std::int64_t col_stride;
    int out_features;
    int in_features;
};

// Pack, and quantize if the format asks for it, with all threads of the pool.
std::shared_ptr<Matrix> pack(const Plain& plain, WeightFormat format, int group_size, Pool& pool);

// A weight that somebody else has rounded, on a grid that a format can keep as it is. Value (n, k) at
// values + n * in_features + k: int8 any of [-128, 127] (the kernels' sums have room for -128), int4 [-8, 7].
// Scales: int8 float32 [out_features], int4 float16 [out_features][ceil(in_features / group_size)]; any sign.
struct Rounded {
    const std::int8_t* values;
    const void* scales;
    int out_features;
    int in_features;
};

// Lay the very same values and scales into panels; int8 and int4 only.
std::shared_ptr<Matrix> pack(const Rounded& rounded, WeightFormat format, int group_size, Pool& pool);

// The values that the matrix stands for, float32 [out_features, in_features], row major.
void unpack(const Matrix& matrix, float* out);

}  // namespace penstock
