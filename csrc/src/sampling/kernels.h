// Passes over one row of the vocabulary, by instruction set. Private to this folder.
#pragma once

#include <cstdint>

#include "penstock/isa.h"

namespace penstock {

// A row is scanned in strips of 64 vectors; the maximum of each of a strip's lanes stands for 64 tokens, its
// block.
inline constexpr std::int64_t block_tokens = 64;
// Tokens that are summed in float32 before float64 takes over; LANES in vocabulary.py.
inline constexpr std::int64_t column_tokens = 32;
// Thresholds that one pass of `masses` can take.
inline constexpr int max_thresholds = 10;

// The softmax's numerators: exp((logit - highest) * factor).
struct Softmax {
    float highest;
    float factor;
};

// [start, end) of something.
struct Range {
    std::int64_t start;
    std::int64_t end;
};

struct SamplingKernels {
    int strip_tokens;  // tokens in a strip
    int strip_blocks;  // blocks in a strip
    // maxima[b] for the blocks of some strips, NaN where there is one in the block. A short last strip counts
    // as full.
    void (*scan)(const float* row, std::int64_t vocab, Range strips, float* maxima);
    // The largest of n values; NaN if there is one.
    float (*largest)(const float* values, std::int64_t n);
    // The first index with that value, or n.
    std::int64_t (*find)(const float* values, std::int64_t n, float value);
    // sums[c] for some columns: token c, c + C, c + 2 C ... with C = num_columns.
    // The weights are written to `weights` unless that is null.
    void (*weigh)(const float* row, std::int64_t vocab, Softmax softmax, Range columns,
                  std::int64_t num_columns, float* sums, float* weights);
    void (*weights)(const float* row, std::int64_t n, Softmax softmax, float* out);
    // ids of the values with low <= value < high; returns how many.
    std::int64_t (*collect)(const float* values, std::int64_t n, float low, float high, std::int64_t* ids);
    // sums[t] = sum of the weights whose value is at least thresholds[t].
    void (*masses)(const float* weights, std::int64_t n, const float* thresholds, int count, double* sums);
    // Set to 0 what comes after (weight, id) in the order "weight falling, id rising", and what is below
    // `least`; and the columns' sums of what stays.
    void (*cut)(float* weights, std::int64_t vocab, float weight, std::int64_t id, float least,
                std::int64_t num_columns, float* sums);
    std::int64_t (*count_above)(const float* values, std::int64_t n, float value, bool with_equal);
    bool (*is_finite_bf16)(const std::uint16_t* values, std::int64_t n);
    bool (*is_finite_f32)(const float* values, std::int64_t n);
};

const SamplingKernels& sampling_kernels_scalar();
const SamplingKernels& sampling_kernels_avx2();
const SamplingKernels& sampling_kernels_avx512();

}  // namespace penstock
