// The instruction sets that the kernels are compiled for, and which of them this CPU may use.
//
// Each is a superset of the one before it. `amx_emulated` runs the tile kernels with tiles in plain C++:
// slow, chosen only by name, so that their layouts and loops are tested on machines without tiles.
#pragma once

#include <string_view>
#include <vector>

namespace penstock {

enum class Isa { scalar, avx2, avx512, amx_emulated, amx };

// "scalar", "avx2", "avx512", "amx_emulated" or "amx".
std::string_view isa_name(Isa isa);

// The instruction set of that name; throws std::invalid_argument where there is none or this CPU does not run
// it.
Isa isa_named(std::string_view name);

// What this CPU runs, the slowest first. avx512 means F, BW, VL, DQ, VNNI and BF16; amx means that and the
// tiles, which the operating system must have permitted (asked for here, once).
std::vector<Isa> supported_isas();

}  // namespace penstock
