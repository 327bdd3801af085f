// Binding of the sampling kernels.
#include "module.h"

namespace penstock {

void bind_sampling(nb::module_&) {}

}  // namespace penstock
