// bf16 rows by bf16 weights with tiles; included by bf16_amx.cpp and bf16_amx_emulated.cpp after
// tiles/tile.h.
#include "kernels.h"
#include "tile_product.inl"

namespace penstock {
namespace {

constexpr int step_inputs = step_bytes / 2;

void multiply_bf16_range(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w, int panel,
                         const InputRange& inputs, float* out) {
    const StoredPanel values{w.values.data() + w.panel_bytes() * static_cast<std::size_t>(panel)};
    multiply_panel<Bf16Dot>(
        x, first_row, num_rows, values,
        {inputs.first / step_inputs, inputs.end / step_inputs, w.padded_inputs / step_inputs}, out,
        [](int, int) {});
}

}  // namespace
}  // namespace penstock
