// Binding of adapters and their operation.
#include "penstock/lora.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>

#include "addresses.h"
#include "module.h"

namespace penstock {

namespace {

using namespace nb::literals;

void set_site(Adapter& adapter, int site, std::uintptr_t a, std::uintptr_t b, int rank, float scale) {
    if (site < 0 || site >= static_cast<int>(adapter.sites.size()))
        throw std::invalid_argument("no such site");
    if (rank < 1) throw std::invalid_argument("rank must be at least 1");
    adapter.sites[static_cast<std::size_t>(site)] = {at<const std::uint16_t>(a), at<const std::uint16_t>(b),
                                                     rank, scale};
}

void lora(Program& program, const Ref& x, const std::vector<int>& sites, const std::vector<Ref>& outs) {
    if (sites.size() != outs.size()) throw std::invalid_argument("one output for each site");
    std::vector<LoraSite> places;
    for (std::size_t i = 0; i < sites.size(); ++i) places.push_back({sites[i], outs[i]});
    add_lora(program, x, places);
}

}  // namespace

void bind_lora(nb::module_& m) {
    nb::class_<Adapter>(m, "Adapter")
        .def("__init__", [](Adapter* self, int num_sites) {
                 if (num_sites < 0) throw std::invalid_argument("num_sites must not be negative");
                 new (self) Adapter{std::vector<LowRank>(static_cast<std::size_t>(num_sites))};
             }, "num_sites"_a)
        .def("set_site", &set_site, "site"_a, nb::kw_only(), "a"_a, "b"_a, "rank"_a, "scale"_a);
    m.def("add_lora", &lora, "program"_a, nb::kw_only(), "x"_a, "sites"_a, "outs"_a);
}

}  // namespace penstock
