// int8 rows x int4 weights in plain C++: exact integers inside a group, float32 from group to group, then the
// row's scale.
//
// ```
// out[f] = (sum_g float(sum_{k in g} x[k] * (nibble[f][k] - 8)) * w_scale[g][f]) * x_scale
// ```
//
// The other instruction sets fuse the product and the sum over groups; otherwise they do the same.
#include "int4_panel.h"
#include "kernels.h"

namespace penstock {

namespace {

// Eight inputs of 32 features.
void multiply_step(const std::int8_t* x, const std::uint8_t* w, std::int32_t* sums) {
    for (int f = 0; f < panel_features; ++f) {
        for (int j = 0; j < 4; ++j) sums[f] += x[j] * (w[f * 4 + j] & 15) + x[j + 4] * (w[f * 4 + j] >> 4);
    }
}

void multiply_row(const std::int8_t* x, const std::int32_t* x_sums, float x_scale, const Int4Panel& panel,
                  float* out) {
    float totals[panel_features] = {};
    const std::uint8_t* w = panel.values;
    const Float16* scales = panel.scales;
    for (int k = 0; k < panel.inputs; scales += panel_features) {
        const int end = panel.group_end(k);
        std::int32_t sums[panel_features];
        std::fill_n(sums, panel_features, int4_offset(x_sums, k, end));
        for (; k < end; k += 8, w += panel_features * 4) multiply_step(x + k, w, sums);
        for (int f = 0; f < panel_features; ++f)
            totals[f] += static_cast<float>(sums[f]) * from_float16(scales[f]);
    }
    for (int f = 0; f < panel_features; ++f) out[f] = totals[f] * x_scale;
}

}  // namespace

void multiply_int4_scalar(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w, int panel,
                          float* out) {
    const Int4Panel bound = int4_panel(w, panel);
    for (std::int64_t r = first_row; r < first_row + num_rows; ++r, out += panel_features) {
        multiply_row(x.row<std::int8_t>(r), x.group_sums(r), x.scale(r), bound, out);
    }
}

}  // namespace penstock
