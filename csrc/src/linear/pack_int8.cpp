// int8 panels: [32-feature panel][four inputs][32 features][4 inputs], signed, one float32 scale a feature.
// See matrix.h.
//
// ```
// scale = max|w| / 127        q = nearest_even(w / scale)        w ~ q * scale        (float32 arithmetic)
// ```
//
// A panel is read twice: for its greatest magnitudes, then (from the cache) to be divided, rounded and
// transposed in squares of 32 features x 64 inputs. Plain loops that the compiler turns into vectors. No row
// is copied as float32.
#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "pack.h"
#include "plain_rows.h"

namespace penstock {

namespace {

constexpr int chunk_inputs = 64;
constexpr float largest_value = 127.0f;
// |dot| <= 127 * 127 * K has to fit an int32: the kernels add the whole row up exactly.
constexpr int most_inputs = 131072;

float scale_of(const Plain& plain, int n) {
    std::int32_t largest = 0;
    float row[chunk_inputs];
    for (int k = 0; k < plain.in_features; k += chunk_inputs) {
        read_row(plain, n, k, std::min(chunk_inputs, plain.in_features - k), chunk_inputs, row);
        largest = std::max(largest, largest_magnitude_bits(row, chunk_inputs));
    }
    return std::bit_cast<float>(largest) / largest_value;
}

// A row of 64 values, quantized, into a column of the square: 4 bytes each 128 bytes.
void pack_chunk(const float* row, float scale, std::int8_t* column) {
    // No scale (a row of zeros, or values below 1e-43): every value is 0.
    const float divisor = scale > 0.0f ? scale : std::numeric_limits<float>::infinity();
    alignas(64) std::int8_t values[chunk_inputs];
    for (int i = 0; i < chunk_inputs; ++i) {
        const float rounded = nearest_even(row[i] / divisor);
        values[i] = static_cast<std::int8_t>(static_cast<std::int32_t>(rounded));
    }
    for (int i = 0; i < chunk_inputs / 4; ++i)
        std::copy_n(values + i * 4, 4, column + i * panel_features * 4);
}

// False where a value is not finite.
bool pack_panel(const Plain& plain, int panel, Matrix& matrix) {
    const int first = panel * panel_features;
    const int features = std::min(panel_features, matrix.out_features - first);
    float* scales = reinterpret_cast<float*>(matrix.scales.data()) + first;
    for (int f = 0; f < features; ++f) {
        scales[f] = scale_of(plain, first + f);
        if (!(scales[f] <= std::numeric_limits<float>::max())) return false;
    }
    auto* out = reinterpret_cast<std::int8_t*>(matrix.values.data()) + panel * matrix.panel_bytes();
    float row[chunk_inputs];
    for (int k = 0; k < plain.in_features; k += chunk_inputs) {
        for (int f = 0; f < features; ++f) {
            read_row(plain, first + f, k, std::min(chunk_inputs, plain.in_features - k), chunk_inputs, row);
            pack_chunk(row, scales[f], out + static_cast<std::int64_t>(k) * panel_features + f * 4);
        }
    }
    return true;
}

}  // namespace

void pack_int8(const Plain& plain, Matrix& matrix, Pool& pool) {
    if (plain.in_features > most_inputs) {
        throw std::invalid_argument("int8 weights have at most 131072 input features, not " +
                                    std::to_string(plain.in_features));
    }
    std::atomic<bool> is_finite{true};
    const std::function<void(Worker&)> job = [&](Worker& worker) {
        worker.share(matrix.num_panels, [&](std::int64_t panel) {
            if (!pack_panel(plain, static_cast<int>(panel), matrix))
                is_finite.store(false, std::memory_order_relaxed);
        });
    };
    pool.run(job);
    if (!is_finite) throw std::invalid_argument("a weight to be quantized holds infinity or NaN");
}

void unpack_int8(const Matrix& matrix, float* out) {
    const float* scales = reinterpret_cast<const float*>(matrix.scales.data());
    const auto* values = reinterpret_cast<const std::int8_t*>(matrix.values.data());
    const std::int64_t panel_size = static_cast<std::int64_t>(matrix.padded_inputs) * panel_features;
    for (std::int64_t n = 0; n < matrix.out_features; ++n) {
        const std::int8_t* feature = values + n / panel_features * panel_size + n % panel_features * 4;
        for (std::int64_t k = 0; k < matrix.in_features; ++k) {
            out[n * matrix.in_features + k] =
                static_cast<float>(feature[k / 4 * panel_features * 4 + k % 4]) * scales[n];
        }
    }
}

}  // namespace penstock
