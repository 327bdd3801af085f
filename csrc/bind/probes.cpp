// Binding of the probes kernels.
#include "module.h"

namespace penstock {

void bind_probes(nb::module_&) {}

}  // namespace penstock
