// Allocates a packed matrix and hands it to its format. See matrix.h.
#include "pack.h"

#include <stdexcept>
#include <string>

namespace penstock {

namespace {

// |dot| <= 127 * 128 * K has to fit an int32: the kernels add a whole int8 row up exactly.
constexpr int most_rounded_inputs = 131072;

void check(int out_features, int in_features, WeightFormat format, int group_size) {
    if (out_features < 1 || in_features < 1) {
        throw std::invalid_argument("a weight has at least one input and one output feature, not [" +
                                    std::to_string(out_features) + ", " + std::to_string(in_features) + "]");
    }
    const bool is_group = group_size == 32 || group_size == 64 || group_size == 128;
    if (format == WeightFormat::int4 ? !is_group : group_size != 0) {
        throw std::invalid_argument("group_size " + std::to_string(group_size) +
                                    ": int4 takes 32, 64 or 128, the other formats 0");
    }
}

std::size_t value_bytes(WeightFormat format, std::size_t count) {
    switch (format) {
        case WeightFormat::bf16: return count * 2;
        case WeightFormat::int8: return count;
        case WeightFormat::int4: return count / 2;
    }
    return 0;
}

std::size_t scale_bytes(const Matrix& matrix) {
    const auto features = static_cast<std::size_t>(matrix.num_panels) * panel_features;
    switch (matrix.format) {
        case WeightFormat::bf16: return 0;
        case WeightFormat::int8: return features * sizeof(float);
        case WeightFormat::int4:
            return features * static_cast<std::size_t>(matrix.num_groups()) * sizeof(std::uint16_t);
    }
    return 0;
}

std::shared_ptr<Matrix> allocate(int out_features, int in_features, WeightFormat format, int group_size) {
    auto matrix = std::make_shared<Matrix>();
    matrix->format = format;
    matrix->out_features = out_features;
    matrix->in_features = in_features;
    matrix->padded_inputs = (in_features + input_alignment - 1) / input_alignment * input_alignment;
    matrix->num_panels = (out_features + panel_features - 1) / panel_features;
    matrix->group_size = group_size;
    const auto features = static_cast<std::size_t>(matrix->num_panels) * panel_features;
    matrix->values =
        HugeBuffer::part(value_bytes(format, features * static_cast<std::size_t>(matrix->padded_inputs)));
    matrix->scales = HugeBuffer::part(scale_bytes(*matrix));
    return matrix;
}

}  // namespace

std::shared_ptr<Matrix> pack(const Plain& plain, WeightFormat format, int group_size, Pool& pool) {
    if (plain.dtype != DType::bf16 && plain.dtype != DType::f32) {
        throw std::invalid_argument("a weight is packed from bf16 or f32 values");
    }
    check(plain.out_features, plain.in_features, format, group_size);
    auto matrix = allocate(plain.out_features, plain.in_features, format, group_size);
    switch (format) {
        case WeightFormat::bf16: pack_bf16(plain, *matrix, pool); break;
        case WeightFormat::int8: pack_int8(plain, *matrix, pool); break;
        case WeightFormat::int4: pack_int4(plain, *matrix, pool); break;
    }
    return matrix;
}

std::shared_ptr<Matrix> pack(const Rounded& rounded, WeightFormat format, int group_size, Pool& pool) {
    if (format == WeightFormat::bf16)
        throw std::invalid_argument("rounded values are packed as int8 or int4");
    check(rounded.out_features, rounded.in_features, format, group_size);
    if (rounded.in_features > most_rounded_inputs) {
        throw std::invalid_argument("rounded weights have at most " + std::to_string(most_rounded_inputs) +
                                    " input features, not " + std::to_string(rounded.in_features));
    }
    auto matrix = allocate(rounded.out_features, rounded.in_features, format, group_size);
    if (format == WeightFormat::int8) {
        pack_rounded_int8(rounded, *matrix, pool);
    } else {
        pack_rounded_int4(rounded, *matrix, pool);
    }
    return matrix;
}

void unpack(const Matrix& matrix, float* out) {
    switch (matrix.format) {
        case WeightFormat::bf16: return unpack_bf16(matrix, out);
        case WeightFormat::int8: return unpack_int8(matrix, out);
        case WeightFormat::int4: return unpack_int4(matrix, out);
    }
}

}  // namespace penstock
