// What the binding's files share.
#pragma once

#include <nanobind/nanobind.h>

#include "penstock/isa.h"

namespace penstock {

namespace nb = nanobind;

// Each adds its room's functions to the module.
void bind_linear(nb::module_& m);
void bind_attention(nb::module_& m);
void bind_dense(nb::module_& m);
void bind_lora(nb::module_& m);
void bind_sampling(nb::module_& m);
void bind_decode_pass(nb::module_& m);
void bind_probes(nb::module_& m);

}  // namespace penstock
