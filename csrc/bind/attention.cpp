// Binding of the attention kernels.
#include "module.h"

namespace penstock {

void bind_attention(nb::module_&) {}

}  // namespace penstock
