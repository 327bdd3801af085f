// Binding of the dense kernels.
#include "module.h"

namespace penstock {

void bind_dense(nb::module_&) {}

}  // namespace penstock
