// Binding of the probes.
#include "penstock/probes.h"

#include <nanobind/stl/string.h>

#include <stdexcept>

#include "module.h"

namespace penstock {

namespace {

using namespace nb::literals;

double bandwidth(Pool& pool, std::int64_t num_bytes, int passes) {
    nb::gil_scoped_release release;
    return read_bandwidth(pool, num_bytes, passes);
}

MultiplyType type_named(const std::string& name) {
    if (name == "bf16") return MultiplyType::bf16;
    if (name == "int8") return MultiplyType::int8;
    if (name == "f32") return MultiplyType::f32;
    throw std::invalid_argument("dtype must be bf16, int8 or f32, not " + name);
}

double peak(Pool& pool, const std::string& isa, const std::string& dtype, double seconds) {
    const Isa kernels = isa_named(isa);
    const MultiplyType type = type_named(dtype);
    nb::gil_scoped_release release;
    return multiply_peak(pool, kernels, type, seconds);
}

}  // namespace

void bind_probes(nb::module_& m) {
    m.def("read_bandwidth", &bandwidth, "pool"_a, nb::kw_only(), "num_bytes"_a, "passes"_a);
    m.def("multiply_peak", &peak, "pool"_a, nb::kw_only(), "isa"_a, "dtype"_a, "seconds"_a);
}

}  // namespace penstock
