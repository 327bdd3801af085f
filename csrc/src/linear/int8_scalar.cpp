// int8 rows x int8 weights in plain C++: exact integers over K, then the two scales.
//
// ```
// out[f] = (float(sum_k x[k] * w[f][k]) * w_scale[f]) * x_scale
// ```
//
// Every instruction set's int8 kernel gives these bits.
#include "kernels.h"

namespace penstock {

namespace {

void multiply_row(const std::int8_t* x, float x_scale, const std::int8_t* w, const float* w_scales,
                  int inputs, float* out) {
    std::int32_t sums[panel_features] = {};
    for (int k = 0; k < inputs; k += 4, w += panel_features * 4) {
        for (int f = 0; f < panel_features; ++f) {
            sums[f] +=
                x[k] * w[f * 4] + x[k + 1] * w[f * 4 + 1] + x[k + 2] * w[f * 4 + 2] + x[k + 3] * w[f * 4 + 3];
        }
    }
    for (int f = 0; f < panel_features; ++f) out[f] = static_cast<float>(sums[f]) * w_scales[f] * x_scale;
}

}  // namespace

void multiply_int8_scalar(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w, int panel,
                          float* out) {
    const auto* values = reinterpret_cast<const std::int8_t*>(w.values.data()) + panel * w.panel_bytes();
    const float* scales = reinterpret_cast<const float*>(w.scales.data()) + panel * panel_features;
    for (int r = 0; r < num_rows; ++r) {
        multiply_row(x.row<std::int8_t>(first_row + r), x.scale(first_row + r), values, scales,
                     w.padded_inputs, out + r * panel_features);
    }
}

}  // namespace penstock
