// The passes of kernels.h, once for every instruction set: the file that includes this one decides which.
#include "kernels.h"
#include "penstock/simd.h"

namespace penstock {
namespace {

constexpr int vectors_per_strip = block_tokens;
constexpr int strip = vectors_per_strip * lanes;

// A bit for each lane whose condition holds.
PENSTOCK_INLINE unsigned bits_of(I32 condition) {
#if defined(__AVX512DQ__)
    return _mm512_movepi32_mask((__m512i)condition);
#elif defined(__AVX2__)
    return static_cast<unsigned>(_mm256_movemask_ps((__m256)condition));
#else
    unsigned bits = 0;
    for (int i = 0; i < lanes; ++i) bits |= static_cast<unsigned>(condition[i] & 1) << i;
    return bits;
#endif
}

PENSTOCK_INLINE I32 counting() {
    I32 v;
    for (int i = 0; i < lanes; ++i) v[i] = i;
    return v;
}

// The first n of `lanes` values, the rest `other`.
PENSTOCK_INLINE F32 load_or(const float* from, std::int64_t n, float other) {
    return counting() < static_cast<std::int32_t>(n) ? load_first(from, static_cast<int>(n)) : splat(other);
}

constexpr float minus_infinity = -__builtin_inff();

void scan(const float* row, std::int64_t vocab, Range strips, float* maxima) {
    for (std::int64_t s = strips.start; s < strips.end; ++s) {
        const float* from = row + s * strip;
        const std::int64_t here = vocab - s * strip < strip ? vocab - s * strip : strip;
        F32 best[4] = {splat(minus_infinity), splat(minus_infinity), splat(minus_infinity),
                       splat(minus_infinity)};
        I32 is_nan{};
        std::int64_t i = 0;
        for (; i + 4 * lanes <= here; i += 4 * lanes) {
            for (int k = 0; k < 4; ++k) {
                const F32 v = load(from + i + k * lanes);
                best[k] = larger(v, best[k]);
                is_nan |= v != v;
            }
        }
        for (; i < here; i += lanes) {
            const F32 v = here - i < lanes ? load_or(from + i, here - i, minus_infinity) : load(from + i);
            best[0] = larger(v, best[0]);
            is_nan |= v != v;
        }
        const F32 all = larger(larger(best[0], best[1]), larger(best[2], best[3]));
        store(maxima + s * lanes, is_nan ? splat(__builtin_nanf("")) : all);
    }
}

float largest(const float* values, std::int64_t n) {
    F32 best = splat(minus_infinity);
    I32 is_nan{};
    for (std::int64_t i = 0; i < n; i += lanes) {
        const F32 v = n - i < lanes ? load_or(values + i, n - i, minus_infinity) : load(values + i);
        best = larger(v, best);
        is_nan |= v != v;
    }
    return bits_of(is_nan) ? __builtin_nanf("") : largest_of(best);
}

std::int64_t find(const float* values, std::int64_t n, float value) {
    const F32 wanted = splat(value);
    std::int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
        const unsigned bits = bits_of(load(values + i) == wanted);
        if (bits) return i + __builtin_ctz(bits);
    }
    for (; i < n; ++i) {
        if (values[i] == value) return i;
    }
    return n;
}

PENSTOCK_INLINE F32 weight_of(F32 logit, Softmax softmax) {
    return exp_of_nonpositive((logit - softmax.highest) * softmax.factor);
}

// Adds f(row[i], i) for a piece of the row, the first of whose tokens is `first`, to sums[0 ...].
template <class Function>
PENSTOCK_INLINE void add_piece(const float* row, std::int64_t first, std::int64_t n, float* sums,
                               Function f) {
    std::int64_t i = 0;
    for (; i + lanes <= n; i += lanes)
        store(sums + i, load(sums + i) + f(load(row + first + i), first + i, lanes));
    if (i >= n) return;
    const int rest = static_cast<int>(n - i);
    const F32 value = f(load_first(row + first + i, rest), first + i, rest);
    store_first(sums + i, load_first(sums + i, rest) + value, rest);
}

// The columns' sums: the row's 32 pieces are added one after another, each a run of neighbours.
template <class Function>
PENSTOCK_INLINE void sum_columns(const float* row, std::int64_t vocab, Range columns,
                                 std::int64_t num_columns, float* sums, Function f) {
    for (std::int64_t c = columns.start; c < columns.end; ++c) sums[c] = 0.0f;
    for (std::int64_t start = 0; start + columns.start < vocab; start += num_columns) {
        const std::int64_t first = start + columns.start;
        const std::int64_t end = start + columns.end < vocab ? start + columns.end : vocab;
        add_piece(row, first, end - first, sums + columns.start, f);
    }
}

void weigh(const float* row, std::int64_t vocab, Softmax softmax, Range columns, std::int64_t num_columns,
           float* sums, float* weights) {
    if (!weights) {
        sum_columns(row, vocab, columns, num_columns, sums,
                    [=](F32 v, std::int64_t, int) { return weight_of(v, softmax); });
        return;
    }
    sum_columns(row, vocab, columns, num_columns, sums, [=](F32 v, std::int64_t id, int n) {
        const F32 weight = weight_of(v, softmax);
        if (n == lanes) {
            store(weights + id, weight);
        } else {
            store_first(weights + id, weight, n);
        }
        return weight;
    });
}

void weights(const float* row, std::int64_t n, Softmax softmax, float* out) {
    std::int64_t i = 0;
    for (; i + lanes <= n; i += lanes) store(out + i, weight_of(load(row + i), softmax));
    const int rest = static_cast<int>(n - i);
    if (rest) store_first(out + i, weight_of(load_first(row + i, rest), softmax), rest);
}

std::int64_t collect(const float* values, std::int64_t n, float low, float high, std::int64_t* ids) {
    std::int64_t count = 0;
    const F32 from = splat(low), to = splat(high);
    for (std::int64_t i = 0; i < n; i += lanes) {
        const F32 v = n - i < lanes ? load_or(values + i, n - i, __builtin_nanf("")) : load(values + i);
        for (unsigned bits = bits_of((v >= from) & (v < to)); bits; bits &= bits - 1)
            ids[count++] = i + __builtin_ctz(bits);
    }
    return count;
}

// sum + v where v >= bound.
PENSTOCK_INLINE F32 add_if_at_least(F32 sum, F32 v, F32 bound) {
#if defined(__AVX512F__)
    const __mmask16 bits = _mm512_cmp_ps_mask((__m512)v, (__m512)bound, _CMP_GE_OQ);
    return (F32)_mm512_mask_add_ps((__m512)sum, bits, (__m512)sum, (__m512)v);
#else
    return sum + (F32)((I32)v & (v >= bound));
#endif
}

template <int num_bounds>
PENSTOCK_INLINE void sum_above(const float* weights, std::int64_t n, const float* thresholds, int count,
                               double* sums) {
    // Pieces that are summed in float32: 256 additions a lane keep the error of a sum below 1e-6.
    constexpr std::int64_t piece = 256 * lanes;
    F32 bounds[num_bounds];
    for (int t = 0; t < num_bounds; ++t) bounds[t] = splat(t < count ? thresholds[t] : __builtin_inff());
    for (int t = 0; t < count; ++t) sums[t] = 0.0;
    for (std::int64_t start = 0; start < n; start += piece) {
        const std::int64_t end = start + piece < n ? start + piece : n;
        F32 parts[num_bounds] = {};
        for (std::int64_t i = start; i < end; i += lanes) {
            const F32 v =
                end - i < lanes ? load_first(weights + i, static_cast<int>(end - i)) : load(weights + i);
            for (int t = 0; t < num_bounds; ++t) parts[t] = add_if_at_least(parts[t], v, bounds[t]);
        }
        for (int t = 0; t < count; ++t) sums[t] += static_cast<double>(sum_of(parts[t]));
    }
}

void masses(const float* weights, std::int64_t n, const float* thresholds, int count, double* sums) {
    constexpr int few = 4;  // half the time of `max_thresholds`
    if (count <= few) return sum_above<few>(weights, n, thresholds, count, sums);
    sum_above<max_thresholds>(weights, n, thresholds, count, sums);
}

void cut(float* weights, std::int64_t vocab, float weight, std::int64_t id, float least,
         std::int64_t num_columns, float* sums) {
    const F32 border = splat(weight), bound = splat(least);
    const I32 last = I32{} + static_cast<std::int32_t>(id);
    sum_columns(weights, vocab, {0, num_columns}, num_columns, sums, [=](F32 v, std::int64_t first, int n) {
        const I32 ids = counting() + static_cast<std::int32_t>(first);
        const I32 stays = ((v > border) | ((v == border) & (ids <= last))) & (v >= bound);
        const F32 left = stays ? v : F32{};
        if (n == lanes) {
            store(weights + first, left);
        } else {
            store_first(weights + first, left, n);
        }
        return left;
    });
}

std::int64_t count_above(const float* values, std::int64_t n, float value, bool with_equal) {
    std::int64_t count = 0;
    const F32 bound = splat(value);
    for (std::int64_t i = 0; i < n; i += lanes) {
        const F32 v = n - i < lanes ? load_or(values + i, n - i, __builtin_nanf("")) : load(values + i);
        count += __builtin_popcount(bits_of(with_equal ? v >= bound : v > bound));
    }
    return count;
}

// All bits of the exponent set: infinite or NaN.
PENSTOCK_INLINE I32 is_no_number(F32 v) { return ((U32)v & 0x7f800000) == U32{} + 0x7f800000; }

template <class T>
PENSTOCK_INLINE bool is_finite(const T* values, std::int64_t n) {
    I32 bad{};
    std::int64_t i = 0;
    for (; i + lanes <= n; i += lanes) bad |= is_no_number(load(values + i));
    if (i < n) bad |= is_no_number(load_first(values + i, static_cast<int>(n - i)));
    return bits_of(bad) == 0;
}

bool is_finite_bf16(const std::uint16_t* values, std::int64_t n) { return is_finite(values, n); }
bool is_finite_f32(const float* values, std::int64_t n) { return is_finite(values, n); }

constexpr SamplingKernels kernels{strip,   lanes,  scan, largest,     find,           weigh,        weights,
                                  collect, masses, cut,  count_above, is_finite_bf16, is_finite_f32};

}  // namespace
}  // namespace penstock
