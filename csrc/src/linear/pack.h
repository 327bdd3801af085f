// Packing and unpacking by format (matrix.h draws the layouts). Called by pack.cpp only, with a checked
// `Plain`.
//
// `pack_*` fills a matrix whose buffers are allocated and zero, with all threads of the pool; `unpack_*`
// writes float32 [out_features, in_features].
#pragma once

#include "penstock/bf16.h"
#include "penstock/matrix.h"

namespace penstock {

void pack_bf16(const Plain& plain, Matrix& matrix, Pool& pool);
void unpack_bf16(const Matrix& matrix, float* out);

void pack_int8(const Plain& plain, Matrix& matrix, Pool& pool);
void unpack_int8(const Matrix& matrix, float* out);

void pack_int4(const Plain& plain, Matrix& matrix, Pool& pool);
void unpack_int4(const Matrix& matrix, float* out);

// The same from values that are rounded already.
void pack_rounded_int8(const Rounded& rounded, Matrix& matrix, Pool& pool);
void pack_rounded_int4(const Rounded& rounded, Matrix& matrix, Pool& pool);

// Element (n, k) of the source.
[[gnu::always_inline]] inline float plain_value(const Plain& plain, std::int64_t n, std::int64_t k) {
    const std::int64_t at = n * plain.row_stride + k * plain.col_stride;
    if (plain.dtype == DType::f32) return static_cast<const float*>(plain.data)[at];
    return to_float(static_cast<const Bf16*>(plain.data)[at]);
}

}  // namespace penstock
