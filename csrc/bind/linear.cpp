// Binding of the linear kernels.
#include "module.h"

namespace penstock {

void bind_linear(nb::module_&) {}

}  // namespace penstock
