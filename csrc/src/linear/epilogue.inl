// The epilogues over simd.h's vectors: included once by the file of each instruction set.
#include "epilogue.h"
#include "penstock/matrix.h"
#include "penstock/simd.h"

namespace penstock {
namespace {

constexpr int vectors = panel_features / lanes;  // of a row of sums

PENSTOCK_INLINE F32 sum_at(const Sums& sums, int row, int v) {
    const F32 value = load(sums.values + row * panel_features + v * lanes);
    return sums.bias ? value + load(sums.bias + v * lanes) : value;
}

// Calls result(row, v, at) for each vector of the destination, `at` being what stands there now when `reads`,
// and stores what it returns.
template <class T, bool reads, class Result>
PENSTOCK_INLINE void for_each(const Destination& to, const Result& result) {
    for (int row = 0; row < to.num_rows; ++row) {
        T* out = to.out.row<T>(to.first_row + row) + to.first_col;
        for (int v = 0; v < vectors; ++v) {
            const int here = to.num_cols - v * lanes;
            if (here >= lanes) {
                store(out + v * lanes, result(row, v, reads ? load(out + v * lanes) : F32{}));
            } else if (here > 0) {
                store_first(out + v * lanes,
                            result(row, v, reads ? load_first(out + v * lanes, here) : F32{}), here);
            }
        }
    }
}

template <bool reads, class Result>
PENSTOCK_INLINE void for_each(const Destination& to, const Result& result) {
    if (to.out.dtype == DType::f32) {
        for_each<float, reads>(to, result);
    } else {
        for_each<std::uint16_t, reads>(to, result);
    }
}

void store_sums(const Sums& sums, const Destination& to) {
    for_each<false>(to, [&](int row, int v, F32) { return sum_at(sums, row, v); });
}

void add_sums(const Sums& sums, const Destination& to) {
    for_each<true>(to, [&](int row, int v, F32 at) { return at + sum_at(sums, row, v); });
}

// Whether some lane's condition holds.
PENSTOCK_INLINE bool holds_anywhere(I32 condition) {
#if defined(__AVX512DQ__)
    return _mm512_movepi32_mask((__m512i)condition) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)condition) != 0;
#else
    std::int32_t any = 0;
    for (int i = 0; i < lanes; ++i) any |= condition[i];
    return any != 0;
#endif
}

// As `largest_of`, by halves: a product does this for every row and panel.
PENSTOCK_INLINE float largest_by_halves(F32 v) {
    for (int half = lanes / 2; half > 0; half /= 2) {
        I32 turned;
        for (int i = 0; i < lanes; ++i) turned[i] = (i + half) % lanes;
        v = larger(v, __builtin_shuffle(v, turned));
    }
    return v[0];
}

// Of n values from `from` on, which need not fill their vectors.
PENSTOCK_INLINE float largest_or_nan(const float* from, int n) {
    F32 best = splat(-__builtin_inff());
    I32 is_nan{};
    for (int i = 0; i < n; i += lanes) {
        F32 value = splat(-__builtin_inff());
        if (n - i >= lanes) {
            value = load(from + i);
        } else {
            for (int k = 0; k < n - i; ++k) value[k] = from[i + k];
        }
        best = larger(value, best);
        is_nan |= value != value;
    }
    return holds_anywhere(is_nan) ? __builtin_nanf("") : largest_by_halves(best);
}

void write_maxima(const Destination& from, float* maxima, std::int64_t row_values) {
    for (int row = 0; row < from.num_rows; ++row) {
        const float* values = from.out.row<float>(from.first_row + row) + from.first_col;
        maxima[row * row_values] = from.num_cols == panel_features
                                       ? largest_or_nan(values, panel_features)
                                       : largest_or_nan(values, from.num_cols);
    }
}

void gate_sums(Gate kind, const Sums& gate, const Sums& up, const Destination& to) {
    const auto with = [&](auto activation) {
        for_each<false>(
            to, [&](int row, int v, F32) { return activation(sum_at(gate, row, v)) * sum_at(up, row, v); });
    };
    switch (kind) {
        case Gate::silu: return with([](F32 v) { return silu_of(v); });
        case Gate::gelu: return with([](F32 v) { return gelu_of(v); });
        case Gate::gelu_tanh: return with([](F32 v) { return gelu_tanh_of(v); });
    }
}

}  // namespace
}  // namespace penstock
