// Binding of packed matrices and the linear operations.
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "addresses.h"
#include "module.h"
#include "penstock/linear_op.h"

namespace penstock {

namespace {

using namespace nb::literals;

const char* format_name(WeightFormat format) {
    switch (format) {
        case WeightFormat::bf16: return "bf16";
        case WeightFormat::int8: return "int8";
        case WeightFormat::int4: return "int4";
    }
    return "unknown";
}

WeightFormat format_named(const std::string& name) {
    for (WeightFormat format : {WeightFormat::bf16, WeightFormat::int8, WeightFormat::int4}) {
        if (name == format_name(format)) return format;
    }
    throw std::invalid_argument("format '" + name + "': bf16, int8 or int4");
}

Gate gate_named(const std::string& name) {
    if (name == "silu") return Gate::silu;
    if (name == "gelu") return Gate::gelu;
    if (name == "gelu_tanh") return Gate::gelu_tanh;
    throw std::invalid_argument("activation '" + name + "': silu, gelu or gelu_tanh");
}

std::shared_ptr<Matrix> pack_plain(Pool& pool, std::uintptr_t data, DType dtype, std::int64_t row_stride,
                                   std::int64_t col_stride, int out_features, int in_features,
                                   const std::string& format, int group_size) {
    const Plain plain{at<const void>(data), dtype, row_stride, col_stride, out_features, in_features};
    const WeightFormat parsed = format_named(format);
    nb::gil_scoped_release release;
    return pack(plain, parsed, group_size, pool);
}

std::shared_ptr<Matrix> pack_rounded(Pool& pool, std::uintptr_t values, std::uintptr_t scales,
                                     int out_features, int in_features, const std::string& format,
                                     int group_size) {
    const Rounded rounded{at<const std::int8_t>(values), at<const void>(scales), out_features, in_features};
    const WeightFormat parsed = format_named(format);
    nb::gil_scoped_release release;
    return pack(rounded, parsed, group_size, pool);
}

Projection projection(const std::shared_ptr<Matrix>& matrix, std::uintptr_t bias) {
    return {matrix, at<const float>(bias)};
}

void linear(Program& program, const LinearInput& x, const std::vector<std::shared_ptr<Matrix>>& matrices,
            const std::vector<std::uintptr_t>& biases, const std::vector<Ref>& outs, bool add) {
    if (matrices.size() != biases.size())
        throw std::invalid_argument("one bias address (or 0) for each matrix");
    std::vector<Projection> projections;
    for (std::size_t i = 0; i < matrices.size(); ++i)
        projections.push_back(projection(matrices[i], biases[i]));
    add_linear(program, x, projections, outs, add);
}

void gated_linear(Program& program, const LinearInput& x, const std::shared_ptr<Matrix>& gate,
                  const std::shared_ptr<Matrix>& up, std::uintptr_t gate_bias, std::uintptr_t up_bias,
                  const std::string& activation, const Ref& out) {
    add_gated_linear(program, x, projection(gate, gate_bias), projection(up, up_bias), gate_named(activation),
                     out);
}

}  // namespace

void bind_linear(nb::module_& m) {
    nb::class_<Matrix>(m, "Matrix")
        .def_ro("out_features", &Matrix::out_features)
        .def_ro("in_features", &Matrix::in_features)
        .def_prop_ro("format", [](const Matrix& matrix) { return format_name(matrix.format); })
        .def_ro("group_size", &Matrix::group_size)
        .def_prop_ro("num_bytes", &Matrix::num_bytes)
        .def("unpack", [](const Matrix& matrix, std::uintptr_t out) {
                 nb::gil_scoped_release release;
                 unpack(matrix, at<float>(out));
             }, "out"_a);
    m.def("pack", &pack_plain, "pool"_a, nb::kw_only(), "data"_a, "dtype"_a, "row_stride"_a, "col_stride"_a,
          "out_features"_a, "in_features"_a, "format"_a, "group_size"_a);
    m.def("pack_rounded", &pack_rounded, "pool"_a, nb::kw_only(), "values"_a, "scales"_a, "out_features"_a,
          "in_features"_a, "format"_a, "group_size"_a);
    m.def("add_linear", &linear, "program"_a, nb::kw_only(), "x"_a, "matrices"_a, "biases"_a, "outs"_a,
          "add"_a);
    m.def("add_gated_linear", &gated_linear, "program"_a, nb::kw_only(), "x"_a, "gate"_a, "up"_a,
          "gate_bias"_a, "up_bias"_a, "activation"_a, "out"_a);
}

}  // namespace penstock
