// bf16 panels: [32-feature panel][pair of inputs][32 features][2 inputs]. See matrix.h.
//
// A transposition of 4-byte pairs, done in squares of 32 features x 32 pairs (a row of a square is two cache
// lines of the source, the square's destination is contiguous).
#include <algorithm>

#include "pack.h"

namespace penstock {

namespace {

constexpr int pairs_at_once = 32;

Bf16 bf16_value(const Plain& plain, std::int64_t n, std::int64_t k) {
    const std::int64_t at = n * plain.row_stride + k * plain.col_stride;
    if (plain.dtype == DType::bf16) return static_cast<const Bf16*>(plain.data)[at];
    return to_bf16(static_cast<const float*>(plain.data)[at]);
}

// Pairs [first_pair, first_pair + count) of features [first, first + features) from anywhere.
void pack_any(const Plain& plain, int first, int features, int first_pair, int count, Bf16* out) {
    for (int pair = first_pair; pair < first_pair + count; ++pair) {
        Bf16* group = out + static_cast<std::int64_t>(pair) * panel_features * 2;
        const int inputs = std::min(2, plain.in_features - pair * 2);
        for (int f = 0; f < features; ++f) {
            for (int i = 0; i < inputs; ++i) group[f * 2 + i] = bf16_value(plain, first + f, pair * 2 + i);
        }
    }
}

// The same for whole pairs of contiguous bf16 rows, the usual case: 4-byte moves.
void pack_rows(const Plain& plain, int first, int features, int first_pair, int count, Bf16* out) {
    const Bf16* source = static_cast<const Bf16*>(plain.data) + first * plain.row_stride + first_pair * 2;
    auto* square =
        reinterpret_cast<std::byte*>(out + static_cast<std::int64_t>(first_pair) * panel_features * 2);
    for (int f = 0; f < features; ++f) {
        const auto* row = reinterpret_cast<const std::byte*>(source + f * plain.row_stride);
        std::byte* column = square + f * 4;
        for (int pair = 0; pair < count; ++pair)
            std::copy_n(row + pair * 4, 4, column + pair * panel_features * 4);
    }
}

}  // namespace

void pack_bf16(const Plain& plain, Matrix& matrix, Pool& pool) {
    const bool has_rows = plain.dtype == DType::bf16 && plain.col_stride == 1;
    const int whole_pairs = has_rows ? plain.in_features / 2 : 0;
    const int num_pairs = (plain.in_features + 1) / 2;
    const std::int64_t panel_size = static_cast<std::int64_t>(matrix.padded_inputs) * panel_features;
    const std::function<void(Worker&)> job = [&](Worker& worker) {
        worker.share(matrix.num_panels, [&](std::int64_t panel) {
            Bf16* out = reinterpret_cast<Bf16*>(matrix.values.data()) + panel * panel_size;
            const int first = static_cast<int>(panel) * panel_features;
            const int features = std::min(panel_features, matrix.out_features - first);
            for (int pair = 0; pair < whole_pairs; pair += pairs_at_once) {
                pack_rows(plain, first, features, pair, std::min(pairs_at_once, whole_pairs - pair), out);
            }
            pack_any(plain, first, features, whole_pairs, num_pairs - whole_pairs, out);
        });
    };
    pool.run(job);
}

void unpack_bf16(const Matrix& matrix, float* out) {
    const Bf16* values = reinterpret_cast<const Bf16*>(matrix.values.data());
    const std::int64_t panel_size = static_cast<std::int64_t>(matrix.padded_inputs) * panel_features;
    for (std::int64_t n = 0; n < matrix.out_features; ++n) {
        const Bf16* feature = values + n / panel_features * panel_size + n % panel_features * 2;
        for (std::int64_t k = 0; k < matrix.in_features; ++k) {
            out[n * matrix.in_features + k] = to_float(feature[k / 2 * panel_features * 2 + k % 2]);
        }
    }
}

}  // namespace penstock
