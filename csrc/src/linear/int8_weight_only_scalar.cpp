// bf16 rows x int8 weights, plain C++. See weight_only.inl.
#include "weight_only.inl"

namespace penstock {

void multiply_int8_weight_only_scalar(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w,
                                     int panel, float* out) {
    multiply_weight_only(x, first_row, num_rows, int8_weights(w, panel), out);
}

}  // namespace penstock
