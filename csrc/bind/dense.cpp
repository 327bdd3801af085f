// Binding of the dense kernels.
#include "penstock/dense.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "addresses.h"
#include "module.h"
#include "penstock/moe.h"

namespace penstock {

namespace {

using namespace nb::literals;

const std::uint16_t* bf16_at(std::uintptr_t address) {
    return at<const std::uint16_t>(address);
}

void embedding(Program& program, const Ref& ids, std::uintptr_t table, std::int64_t num_rows,
               std::int64_t row_stride, float scale, const Ref& out) {
    add_embedding(program, {ids, bf16_at(table), num_rows, row_stride, scale, out});
}

void rms_norm(Program& program, const Ref& x, std::uintptr_t weight, float eps, float weight_offset,
              int group, const std::optional<Ref>& residual, const std::optional<Ref>& sum,
              const RowsOut& out) {
    add_rms_norm(program, {x, bf16_at(weight), nullptr, eps, weight_offset, group, residual, sum, out});
}

void layer_norm(Program& program, const Ref& x, std::uintptr_t weight, std::uintptr_t bias, float eps,
                const std::optional<Ref>& residual, const std::optional<Ref>& sum, const RowsOut& out) {
    add_layer_norm(program, {x, bf16_at(weight), bf16_at(bias), eps, 0.0f, x.cols, residual, sum, out});
}

void activation(Program& program, const Ref& x, const std::string& name, const RowsOut& out) {
    add_activation(program, x, activation_named(name), out);
}

void gated_activation(Program& program, const Ref& gate, const Ref& up, const std::string& name,
                      const RowsOut& out) {
    add_gated_activation(program, gate, up, activation_named(name), out);
}

using ExpertTuple = std::tuple<std::shared_ptr<Matrix>, std::shared_ptr<Matrix>, std::shared_ptr<Matrix>>;

void moe(Program& program, const Ref& x, std::uintptr_t router, int num_experts,
         const std::vector<ExpertTuple>& experts, int top_k, bool renormalize, const std::string& name,
         bool quantize, const Ref& out, bool add) {
    if (num_experts != static_cast<int>(experts.size()))
        throw std::invalid_argument("num_experts must count the experts");
    MoeArgs args{x, bf16_at(router), {}, top_k, renormalize, activation_named(name), quantize, out, add};
    for (const auto& [gate, up, down] : experts) args.experts.push_back({gate, up, down});
    add_moe(program, args);
}

}  // namespace

void bind_dense(nb::module_& m) {
    m.def("add_embedding", &embedding, "program"_a, nb::kw_only(), "ids"_a, "table"_a, "num_rows"_a,
          "row_stride"_a, "scale"_a, "out"_a);
    m.def("add_rms_norm", &rms_norm, "program"_a, nb::kw_only(), "x"_a, "weight"_a, "eps"_a,
          "weight_offset"_a, "group"_a, "residual"_a.none(), "sum"_a.none(), "out"_a);
    m.def("add_layer_norm", &layer_norm, "program"_a, nb::kw_only(), "x"_a, "weight"_a, "bias"_a, "eps"_a,
          "residual"_a.none(), "sum"_a.none(), "out"_a);
    m.def("add_quantize", &add_quantize, "program"_a, nb::kw_only(), "x"_a, "out"_a);
    m.def("add_convert", &add_convert, "program"_a, nb::kw_only(), "x"_a, "out"_a);
    m.def("add_sum", &add_sum, "program"_a, nb::kw_only(), "a"_a, "b"_a, "out"_a);
    m.def("add_scale", &add_scale, "program"_a, nb::kw_only(), "x"_a, "factor"_a, "out"_a);
    m.def("add_activation", &activation, "program"_a, nb::kw_only(), "x"_a, "activation"_a, "out"_a);
    m.def("add_gated_activation", &gated_activation, "program"_a, nb::kw_only(), "gate"_a, "up"_a,
          "activation"_a, "out"_a);
    m.def("add_moe", &moe, "program"_a, nb::kw_only(), "x"_a, "router"_a, "num_experts"_a, "experts"_a,
          "top_k"_a, "renormalize"_a, "activation"_a, "quantize"_a, "out"_a, "add"_a);
    m.def("add_softcap", &add_softcap, "program"_a, nb::kw_only(), "x"_a, "cap"_a);
}

}  // namespace penstock
