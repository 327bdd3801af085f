// int4 panels: [32-feature panel][eight inputs][32 features][8 inputs in 4 bytes], float16 scales of groups.
// See matrix.h.
//
// A panel's groups are read, checked and quantized one by one (int4_quantize.inl, by the fastest instruction
// set that the CPU has: all give the same bits) and laid into the panel, 4 bytes each 128.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "float16.h"
#include "int4_quantize.h"
#include "pack.h"
#include "penstock/isa.h"
#include "plain_rows.h"

namespace penstock {

namespace {

constexpr int most_group = 128;
constexpr int most_inputs = 131072;
// The greatest magnitude whose scales are all finite in float16: 65504 * 7.
constexpr float largest_weight = 458528.0f;

const Int4Quantize& fastest_quantize() {
    const Isa best = supported_isas().back();
    if (best >= Isa::avx512 && int4_quantize_avx512) return int4_quantize_avx512();
    if (best >= Isa::avx2 && int4_quantize_avx2) return int4_quantize_avx2();
    return int4_quantize_scalar();
}

QuantizeGroup* quantize_for(int group_size) {
    const Int4Quantize& quantize = fastest_quantize();
    if (group_size == 32) return quantize.group_32;
    return group_size == 64 ? quantize.group_64 : quantize.group_128;
}

void store_words(const std::uint32_t* words, int count, std::uint8_t* column) {
    for (int i = 0; i < count; ++i) std::memcpy(column + i * panel_features * 4, words + i, sizeof *words);
}

// False where a value is too large, infinite or NaN.
bool pack_panel(const Plain& plain, int panel, QuantizeGroup* quantize, Matrix& matrix) {
    const int first = panel * panel_features, size = matrix.group_size;
    const int features = std::min(panel_features, matrix.out_features - first);
    auto* out = reinterpret_cast<std::uint8_t*>(matrix.values.data()) + panel * matrix.panel_bytes();
    auto* scales = reinterpret_cast<Float16*>(matrix.scales.data()) +
                   std::int64_t{panel} * matrix.num_groups() * panel_features;
    if (features < panel_features) std::fill_n(out, matrix.panel_bytes(), std::uint8_t{0x88});
    alignas(64) float group[most_group];
    std::uint32_t words[most_group / 8];
    for (int g = 0, k = 0; k < matrix.padded_inputs; ++g, k += size) {
        const int inputs = std::min(size, matrix.padded_inputs - k);
        for (int f = 0; f < features; ++f) {
            read_row(plain, first + f, k, std::clamp(plain.in_features - k, 0, size), size, group);
            if (largest_magnitude_bits(group, size) > std::bit_cast<std::int32_t>(largest_weight))
                return false;
            scales[g * panel_features + f] = quantize(group, words);
            store_words(words, inputs / 8, out + static_cast<std::int64_t>(k) * (panel_features / 2) + f * 4);
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
    QuantizeGroup* quantize = quantize_for(matrix.group_size);
    std::atomic<bool> fits{true};
    const std::function<void(Worker&)> job = [&](Worker& worker) {
        worker.share(matrix.num_panels, [&](std::int64_t panel) {
            const bool is_packed = pack_panel(plain, static_cast<int>(panel), quantize, matrix);
            if (!is_packed) fits.store(false, std::memory_order_relaxed);
        });
    };
    pool.run(job);
    if (!fits)
        throw std::invalid_argument(
            "a weight to be quantized to int4 is NaN or greater than 458528 in magnitude");
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
            out[n * matrix.in_features + k] =
                static_cast<float>(value) * from_float16(scales[group * panel_features + f]);
        }
    }
}

}  // namespace penstock
