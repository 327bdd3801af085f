// int4 panels: [32-feature panel][eight inputs][32 features][8 inputs in 4 bytes], float16 scales of groups. See matrix.h,
// which states the rule for the scale; here it is carried out, five candidates a group.
//
// The rule is one of searching little: against scale = max|w| / 7 it halves the mean squared error of trained weights;
// sixty-five candidates take another 3 % away, two rounds of least squares less than the five do.
#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "float16.h"
#include "pack.h"
#include "plain_rows.h"

namespace penstock {

namespace {

constexpr int most_group = 128;
constexpr int most_inputs = 131072;
constexpr float divisors[] = {-7.0f, -7.5f, -8.0f, -8.5f, -9.0f};
// The greatest magnitude whose scales are all finite in float16: 65504 * 7.
constexpr float largest_weight = 458528.0f;

struct Candidate {
    float error;
    Float16 scale;
    alignas(64) float values[most_group];  // -8 to 7
};

// The value of greatest magnitude, the first among equals.
float extreme_of(const float* group, int size) {
    const std::int32_t largest = largest_magnitude_bits(group, size);
    for (int i = 0; i < size; ++i) {
        if ((std::bit_cast<std::int32_t>(group[i]) & 0x7fffffff) == largest) return group[i];
    }
    return 0.0f;
}

// Sum of halves: e[i] + e[i + n/2] until one is left.
float sum_by_halves(float* errors, int size) {
    for (int half = size / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) errors[i] += errors[i + half];
    }
    return errors[0];
}

template <int size>
void quantize_with(const float* group, Float16 scale, Candidate& out) {
    const float step = from_float16(scale);
    const float inverse = step == 0.0f ? 0.0f : 1.0f / step;
    alignas(64) float errors[size];
    for (int i = 0; i < size; ++i) {
        float q = nearest_even(group[i] * inverse);
        q = q < 7.0f ? q : 7.0f;
        q = q > -8.0f ? q : -8.0f;
        out.values[i] = q;
        const float error = group[i] - q * step;
        errors[i] = error * error;
    }
    out.scale = scale;
    out.error = sum_by_halves(errors, size);
}

// Whichever of two candidates holds the best.
template <int size>
const Candidate& quantize_group(const float* group, Candidate (&candidates)[2]) {
    const float extreme = extreme_of(group, size);
    int best = 0;
    candidates[best].error = std::numeric_limits<float>::infinity();
    for (float divisor : divisors) {
        quantize_with<size>(group, to_float16(extreme / divisor), candidates[1 - best]);
        if (candidates[1 - best].error < candidates[best].error) best = 1 - best;
    }
    return candidates[best];
}

// A group's values, two in a byte, into a feature's column: 4 bytes each 128 bytes.
void store_group(const float* values, int inputs, std::uint8_t* column) {
    for (int k = 0; k < inputs; k += 8, column += panel_features * 4) {
        for (int j = 0; j < 4; ++j) {
            const int low = static_cast<int>(values[k + j]) + 8, high = static_cast<int>(values[k + j + 4]) + 8;
            column[j] = static_cast<std::uint8_t>(low | high << 4);
        }
    }
}

// False where a value is too large, infinite or NaN.
template <int size>
bool pack_panel(const Plain& plain, int panel, Matrix& matrix) {
    const int first = panel * panel_features;
    const int features = std::min(panel_features, matrix.out_features - first);
    auto* out = reinterpret_cast<std::uint8_t*>(matrix.values.data()) + panel * matrix.panel_bytes();
    auto* scales = reinterpret_cast<Float16*>(matrix.scales.data()) + std::int64_t{panel} * matrix.num_groups() * panel_features;
    if (features < panel_features) std::fill_n(out, matrix.panel_bytes(), std::uint8_t{0x88});
    alignas(64) float group[size];
    Candidate candidates[2];
    for (int g = 0, k = 0; k < matrix.padded_inputs; ++g, k += size) {
        for (int f = 0; f < features; ++f) {
            read_row(plain, first + f, k, std::clamp(plain.in_features - k, 0, size), size, group);
            if (largest_magnitude_bits(group, size) > std::bit_cast<std::int32_t>(largest_weight)) return false;
            const Candidate& best = quantize_group<size>(group, candidates);
            scales[g * panel_features + f] = best.scale;
            store_group(best.values, std::min(size, matrix.padded_inputs - k),
                        out + static_cast<std::int64_t>(k) * (panel_features / 2) + f * 4);
        }
    }
    return true;
}

}  // namespace

void pack_int4(const Plain& plain, Matrix& matrix, Pool& pool) {
    if (plain.in_features > most_inputs) {
        throw std::invalid_argument("int4 weights have at most 131072 input features, not " +
                                    std::to_string(plain.in_features));
    }
    const auto pack_one = matrix.group_size == 32   ? pack_panel<32>
                          : matrix.group_size == 64 ? pack_panel<64>
                                                    : pack_panel<128>;
    std::atomic<bool> fits{true};
    const std::function<void(Worker&)> job = [&](Worker& worker) {
        worker.share(matrix.num_panels, [&](std::int64_t panel) {
            if (!pack_one(plain, static_cast<int>(panel), matrix)) fits.store(false, std::memory_order_relaxed);
        });
    };
    pool.run(job);
    if (!fits) throw std::invalid_argument("a weight to be quantized to int4 is NaN or greater than 458528 in magnitude");
}

void unpack_int4(const Matrix& matrix, float* out) {
    const auto* scales = reinterpret_cast<const Float16*>(matrix.scales.data());
    const auto* values = reinterpret_cast<const std::uint8_t*>(matrix.values.data());
    const auto panel_size = static_cast<std::int64_t>(matrix.panel_bytes());
    for (std::int64_t n = 0; n < matrix.out_features; ++n) {
        const std::int64_t panel = n / panel_features, f = n % panel_features;
        const std::uint8_t* feature = values + panel * panel_size + f * 4;
        for (std::int64_t k = 0; k < matrix.in_features; ++k) {
            const int byte = feature[k / 8 * panel_features * 4 + k % 4];
            const int value = (k % 8 < 4 ? byte & 15 : byte >> 4) - 8;
            const std::int64_t group = panel * matrix.num_groups() + k / matrix.group_size;
            out[n * matrix.in_features + k] = static_cast<float>(value) * from_float16(scales[group * panel_features + f]);
        }
    }
}

}  // namespace penstock
