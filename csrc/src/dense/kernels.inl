// The row kernels of dense.h, once for every instruction set: the file that includes this one decides which.
//
// Rows are float32 scratch, 64-byte aligned, zero from n to n rounded up to 64; so the loops have no tails,
// but for the first and the last, which touch memory that is not ours.
#include <cmath>

#include "kernels.h"
#include "penstock/simd.h"

namespace penstock {
namespace {

constexpr int row_padding = 64;

PENSTOCK_INLINE int padded(int n) { return (n + row_padding - 1) / row_padding * row_padding; }

template <class T>
PENSTOCK_INLINE void load_any(const T* from, int n, float* row) {
    int i = 0;
    for (; i + lanes <= n; i += lanes) store(row + i, load(from + i));
    if (i < n) {
        store(row + i, load_first(from + i, n - i));
        i += lanes;
    }
    for (; i < padded(n); i += lanes) store(row + i, F32{});
}

template <class T>
PENSTOCK_INLINE void add_any(const T* from, int n, float* row) {
    int i = 0;
    for (; i + lanes <= n; i += lanes) store(row + i, load(row + i) + load(from + i));
    if (i < n) store(row + i, load(row + i) + load_first(from + i, n - i));
}

template <class T>
PENSTOCK_INLINE void store_any(const float* row, int n, T* to) {
    int i = 0;
    for (; i + lanes <= n; i += lanes) store(to + i, load(row + i));
    if (i < n) store_first(to + i, load(row + i), n - i);
}

void load_bf16(const std::uint16_t* from, int n, float* row) { load_any(from, n, row); }
void load_f32(const float* from, int n, float* row) { load_any(from, n, row); }
void add_bf16(const std::uint16_t* from, int n, float* row) { add_any(from, n, row); }
void add_f32(const float* from, int n, float* row) { add_any(from, n, row); }

void add_scaled(const float* from, int n, float factor, float* row) {
    int i = 0;
    for (; i + lanes <= n; i += lanes) store(row + i, load(row + i) + load(from + i) * factor);
    if (i < n) store(row + i, load(row + i) + load_first(from + i, n - i) * factor);
}

void store_bf16(const float* row, int n, std::uint16_t* to) { store_any(row, n, to); }
void store_f32(const float* row, int n, float* to) { store_any(row, n, to); }

// sum(f(row[i])) for i < n, four running sums of `lanes` each; f(0) must be 0.
template <class Function>
PENSTOCK_INLINE float sum_row(const float* row, int n, Function f) {
    F32 sums[4] = {};
    int i = 0;
    for (; i + 4 * lanes <= n; i += 4 * lanes) {
        for (int k = 0; k < 4; ++k) sums[k] += f(load(row + i + k * lanes));
    }
    for (; i + lanes <= n; i += lanes) sums[0] += f(load(row + i));
    if (i < n) sums[1] += f(load_first(row + i, n - i));
    return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// row[i] = f(row[i], i) for i < n.
template <class Function>
PENSTOCK_INLINE void change_row(float* row, int n, Function f) {
    int i = 0;
    for (; i + lanes <= n; i += lanes) store(row + i, f(load(row + i), i));
    if (i >= n) return;
    for (; i < n; ++i) row[i] = f(splat(row[i]), i)[0];
}

PENSTOCK_INLINE F32 weights_at(const std::uint16_t* weight, int i, int n) {
    return i + lanes <= n ? load(weight + i) : load_first(weight + i, 1);
}

void rms_norm(float* row, int n, const std::uint16_t* weight, float eps, float weight_offset) {
    const float squares = sum_row(row, n, [](F32 v) { return v * v; });
    const float factor = 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
    change_row(row, n, [&](F32 v, int i) { return v * factor * (weights_at(weight, i, n) + weight_offset); });
}

void layer_norm(float* row, int n, const std::uint16_t* weight, const std::uint16_t* bias, float eps) {
    const float mean = sum_row(row, n, [](F32 v) { return v; }) / static_cast<float>(n);
    change_row(row, n, [&](F32 v, int) { return v - mean; });
    const float squares = sum_row(row, n, [](F32 v) { return v * v; });
    const float factor = 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
    change_row(row, n,
               [&](F32 v, int i) { return v * factor * weights_at(weight, i, n) + weights_at(bias, i, n); });
}

// The largest magnitude; NaN if there is one, for as integers the magnitudes' bits have it above everything.
PENSTOCK_INLINE float largest_magnitude(const float* row, int n) {
    I32 most{};
    for (int i = 0; i < padded(n); i += lanes) {
        const I32 bits = (I32)magnitude(load(row + i));
        most = bits > most ? bits : most;
    }
    std::int32_t bits = 0;
    for (int i = 0; i < lanes; ++i) bits = most[i] > bits ? most[i] : bits;
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    return largest;
}

PENSTOCK_INLINE void store_i8(std::int8_t* to, I32 v) {
    const I8 bytes = __builtin_convertvector(v, I8);
    std::memcpy(to, &bytes, sizeof bytes);
}

// q = round(row / scale) in [-127, 127]. A row with NaN or infinity gets such a scale and values of 0: what
// is computed from it is NaN. Rows below 1e-36 are zero (their reciprocal would overflow).
float quantize(const float* row, int n, std::int8_t* values, std::int32_t* sums) {
    constexpr float least = 1e-36f, most = 3.0e38f;
    const float largest = largest_magnitude(row, n);
    const bool is_usable = largest >= least && largest <= most;
    const float factor = is_usable ? 127.0f / largest : 0.0f;
    alignas(64) std::int8_t group[row_padding];
    for (int start = 0; start < n; start += row_padding) {
        for (int half = 0; half < 2; ++half) {
            I32 sum{};
            for (int i = half * sum_group; i < (half + 1) * sum_group; i += lanes) {
                const I32 q = is_usable ? round_to_int(load(row + start + i) * factor) : I32{};
                sum += q;
                store_i8(group + i, q);
            }
            std::int32_t total = 0;
            for (int i = 0; i < lanes; ++i) total += sum[i];
            sums[start / sum_group + half] = total;
        }
        const int here = n - start < row_padding ? n - start : row_padding;
        std::memcpy(values + start, group, static_cast<std::size_t>(here));
    }
    if (largest < least) return 0.0f;
    return largest <= most ? largest / 127.0f : largest;
}

void activate(float* row, int n, RowActivation activation) {
    switch (activation) {
        case RowActivation::silu: return change_row(row, padded(n), [](F32 v, int) { return silu_of(v); });
        case RowActivation::gelu: return change_row(row, padded(n), [](F32 v, int) { return gelu_of(v); });
        case RowActivation::gelu_tanh:
            return change_row(row, padded(n), [](F32 v, int) { return gelu_tanh_of(v); });
    }
}

void multiply(float* row, int n, const float* by) {
    change_row(row, padded(n), [&](F32 v, int i) { return v * load(by + i); });
}

void scale(float* row, int n, float factor) {
    change_row(row, padded(n), [&](F32 v, int) { return v * factor; });
}

void softcap(float* row, int n, float cap) {
    const float inverse = 1.0f / cap;
    change_row(row, padded(n), [&](F32 v, int) { return cap * tanh_of(v * inverse); });
}

constexpr DenseKernels kernels{load_bf16, load_f32,   add_bf16, add_f32,  add_scaled, store_bf16, store_f32,
                               rms_norm,  layer_norm, quantize, activate, multiply,   scale,      softcap};

}  // namespace
}  // namespace penstock
