// bf16 rows by bf16 weights with AVX2, which has no bf16 instruction. See bf16_widen.inl.
#include "bf16_widen.inl"

namespace penstock {

void multiply_bf16_avx2(const Operand& x, std::int64_t first_row, int num_rows, const Matrix& w, int panel,
                        float* out) {
    multiply_widened(x, first_row, num_rows, w, panel, out);
}

}  // namespace penstock
