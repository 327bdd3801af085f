// Binding of the attention kernels.
#include <nanobind/stl/string.h>

#include <string>

#include "addresses.h"
#include "module.h"
#include "penstock/attention.h"

namespace penstock {

namespace {

using namespace nb::literals;

KvShape kv_shape(const std::string& kv_format, int block_size, int num_kv_heads, int head_dim) {
    const KvShape shape{kv_format_named(kv_format), block_size, num_kv_heads, head_dim};
    shape.check();
    return shape;
}

void bind_rope(nb::module_& m) {
    m.def(
        "add_rope_angles",
        [](Program& program, Ref positions, std::uintptr_t frequencies, int num_frequencies, float factor,
           Ref out) {
            const auto* table = at<const float>(frequencies);
            add_rope_angles(program, {positions, table, num_frequencies, factor, out});
        },
        "program"_a, nb::kw_only(), "positions"_a, "frequencies"_a, "num_frequencies"_a, "factor"_a, "out"_a);
    m.def("add_rope", [](Program& program, Ref x, int head_dim, Ref angles, Ref out) {
              add_rope(program, {x, head_dim, angles, out});
          }, "program"_a, nb::kw_only(), "x"_a, "head_dim"_a, "angles"_a, "out"_a);
}

void bind_writes(nb::module_& m) {
    m.def(
        "add_write_kv",
        [](Program& program, Ref keys, Ref values, int layer, int num_kv_heads, int head_dim, int block_size,
           const std::string& kv_format) {
            add_write_kv(program,
                         {keys, values, layer, kv_shape(kv_format, block_size, num_kv_heads, head_dim)});
        },
        "program"_a, nb::kw_only(), "keys"_a, "values"_a, "layer"_a, "num_kv_heads"_a, "head_dim"_a,
        "block_size"_a, "kv_format"_a);
    m.def(
        "add_rope_write_kv",
        [](Program& program, Ref query, Ref keys, Ref values, Ref angles, int layer, int num_kv_heads,
           int head_dim, int block_size, const std::string& kv_format) {
            const KvShape shape = kv_shape(kv_format, block_size, num_kv_heads, head_dim);
            add_rope_write_kv(program, query, angles, {keys, values, layer, shape});
        },
        "program"_a, nb::kw_only(), "query"_a, "keys"_a, "values"_a, "angles"_a, "layer"_a, "num_kv_heads"_a,
        "head_dim"_a, "block_size"_a, "kv_format"_a);
}

}  // namespace

void bind_attention(nb::module_& m) {
    m.def("kv_block_bytes", [](const std::string& kv_format, int block_size, int num_kv_heads, int head_dim) {
              return kv_shape(kv_format, block_size, num_kv_heads, head_dim).block_bytes();
          }, nb::kw_only(), "kv_format"_a, "block_size"_a, "num_kv_heads"_a, "head_dim"_a);
    bind_rope(m);
    bind_writes(m);
    m.def(
        "add_attention",
        [](Program& program, Ref query, int layer, int num_heads, int num_kv_heads, int head_dim,
           int block_size, const std::string& kv_format, float scale, int window, float softcap, Ref out) {
            const KvShape shape = kv_shape(kv_format, block_size, num_kv_heads, head_dim);
            add_attention(program, {query, layer, num_heads, shape, scale, window, softcap, out});
        },
        "program"_a, nb::kw_only(), "query"_a, "layer"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a,
        "block_size"_a, "kv_format"_a, "scale"_a, "window"_a, "softcap"_a, "out"_a);
}

}  // namespace penstock
