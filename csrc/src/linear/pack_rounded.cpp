// Panels from values that somebody else has rounded (`Rounded` in matrix.h): only the order changes, no
// number does.
//
// A panel is filled feature by feature; what lies beyond the last feature or input is zero, as pack_int8.cpp
// and pack_int4.cpp leave it.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "float16.h"
#include "pack.h"

namespace penstock {

namespace {

constexpr int int8_run = 4, int4_run = 8;  // inputs of a feature that lie together

int features_of(const Matrix& matrix, int panel) {
    return std::min(panel_features, matrix.out_features - panel * panel_features);
}

// False where a scale is not finite.
bool pack_int8_panel(const Rounded& rounded, int panel, Matrix& matrix) {
    const int first = panel * panel_features, features = features_of(matrix, panel);
    const float* from = static_cast<const float*>(rounded.scales) + first;
    std::copy_n(from, features, reinterpret_cast<float*>(matrix.scales.data()) + first);
    auto* out = reinterpret_cast<std::int8_t*>(matrix.values.data()) + panel * matrix.panel_bytes();
    for (int f = 0; f < features; ++f) {
        const std::int8_t* row = rounded.values + std::int64_t{first + f} * rounded.in_features;
        for (int k = 0; k < rounded.in_features; k += int8_run) {
            const int count = std::min(int8_run, rounded.in_features - k);
            std::copy_n(row + k, count, out + std::int64_t{k} * panel_features + f * int8_run);
        }
    }
    return std::all_of(from, from + features, [](float scale) { return std::isfinite(scale); });
}

// Inputs [k, k + 8) of a row as the nibbles of 4 bytes; inputs behind the last are 0. False where a value is
// no int4.
bool store_nibbles(const std::int8_t* row, int k, int in_features, std::uint8_t* out) {
    bool fits = true;
    for (int j = 0; j < int4_run / 2; ++j) {
        const int low = k + j < in_features ? row[k + j] : 0;
        const int high = k + j + int4_run / 2 < in_features ? row[k + j + int4_run / 2] : 0;
        fits = fits && std::min(low, high) >= -8 && std::max(low, high) <= 7;
        out[j] = static_cast<std::uint8_t>(((low + 8) & 15) | (((high + 8) & 15) << 4));
    }
    return fits;
}

bool copy_scales(const Rounded& rounded, int n, Matrix& matrix) {
    const int given = (rounded.in_features + matrix.group_size - 1) / matrix.group_size;
    const Float16* from = static_cast<const Float16*>(rounded.scales) + std::int64_t{n} * given;
    auto* to = reinterpret_cast<Float16*>(matrix.scales.data()) +
               std::int64_t{n / panel_features} * matrix.num_groups() * panel_features + n % panel_features;
    for (int g = 0; g < given; ++g) to[g * panel_features] = from[g];
    return std::all_of(from, from + given, [](Float16 scale) { return std::isfinite(from_float16(scale)); });
}

// False where a value is no int4 or a scale is not finite.
bool pack_int4_panel(const Rounded& rounded, int panel, Matrix& matrix) {
    const int first = panel * panel_features, features = features_of(matrix, panel);
    auto* out = reinterpret_cast<std::uint8_t*>(matrix.values.data()) + panel * matrix.panel_bytes();
    std::fill_n(out, matrix.panel_bytes(), std::uint8_t{0x88});
    bool fits = true;
    for (int f = 0; f < features; ++f) {
        const std::int8_t* row = rounded.values + std::int64_t{first + f} * rounded.in_features;
        for (int k = 0; k < rounded.in_features; k += int4_run) {
            std::uint8_t* at = out + std::int64_t{k} * (panel_features / 2) + f * (int4_run / 2);
            fits = store_nibbles(row, k, rounded.in_features, at) && fits;
        }
        fits = copy_scales(rounded, first + f, matrix) && fits;
    }
    return fits;
}

template <class PackPanel>
void for_panels(const Matrix& matrix, Pool& pool, const PackPanel& pack_panel) {
    std::atomic<bool> fits{true};
    const std::function<void(Worker&)> job = [&](Worker& worker) {
        worker.share(matrix.num_panels, [&](std::int64_t panel) {
            if (!pack_panel(static_cast<int>(panel))) fits.store(false, std::memory_order_relaxed);
        });
    };
    pool.run(job);
    if (!fits)
        throw std::invalid_argument(
            "a rounded weight has a value out of range, or a scale that is not finite");
}

}  // namespace

void pack_rounded_int8(const Rounded& rounded, Matrix& matrix, Pool& pool) {
    for_panels(matrix, pool, [&](int panel) { return pack_int8_panel(rounded, panel, matrix); });
}

void pack_rounded_int4(const Rounded& rounded, Matrix& matrix, Pool& pool) {
    for_panels(matrix, pool, [&](int panel) { return pack_int4_panel(rounded, panel, matrix); });
}

}  // namespace penstock
