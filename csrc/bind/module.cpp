// The extension module: pools, programs and buffers; each room of kernels binds its own. Binding only.
#include "module.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>

#include "addresses.h"
#include "lists.h"
#include "penstock/linear.h"
#include "penstock/pool.h"
#include "penstock/program.h"

namespace penstock {

namespace {

using namespace nb::literals;

std::vector<std::string> supported_isa_names() {
    std::vector<std::string> names;
    for (Isa isa : supported_isas()) names.emplace_back(isa_name(isa));
    return names;
}

std::vector<std::string> op_names(const Program& program) {
    std::vector<std::string> names;
    for (std::string_view name : program.op_names()) names.emplace_back(name);
    return names;
}

AttentionInputs attention_inputs(std::int64_t num_seqs, std::uintptr_t query_start_loc,
                                 std::uintptr_t seq_lens, std::uintptr_t block_tables,
                                 std::int64_t max_num_blocks, std::uintptr_t slot_mapping) {
    return {num_seqs,
            at<const std::int32_t>(query_start_loc),
            at<const std::int32_t>(seq_lens),
            at<const std::int32_t>(block_tables),
            max_num_blocks,
            at<const std::int64_t>(slot_mapping)};
}

LayerKv layer_kv(std::uintptr_t keys, std::uintptr_t values, std::int64_t block_bytes, int group) {
    return {at<std::byte>(keys), at<std::byte>(values), block_bytes, group};
}

using ExternalList = std::vector<std::tuple<std::uintptr_t, std::int64_t>>;  // (address, bytes from row to row)

std::vector<Program::External> externals_of(const ExternalList& list) {
    std::vector<Program::External> externals;
    for (const auto& [address, row_bytes] : list) externals.push_back({at<std::byte>(address), row_bytes});
    return externals;
}

void run(Program& program, std::int64_t num_rows, const ExternalList& externals,
         const std::vector<AttentionInputs>& groups, const AdapterList& adapters) {
    const auto pointers = externals_of(externals);
    const auto segments = adapter_rows_of(adapters);
    nb::gil_scoped_release release;
    program.run(num_rows, pointers, groups, segments);
}

std::vector<double> profile(Program& program, std::int64_t num_rows, const ExternalList& externals,
                            const std::vector<AttentionInputs>& groups, int rounds,
                            const AdapterList& adapters) {
    const auto pointers = externals_of(externals);
    const auto segments = adapter_rows_of(adapters);
    std::vector<double> seconds;
    nb::gil_scoped_release release;
    for (int i = 0; i < rounds; ++i) program.profile(num_rows, pointers, groups, seconds, segments);
    for (double& value : seconds) value /= rounds;
    return seconds;
}

void bind_program(nb::module_& m) {
    nb::enum_<DType>(m, "DType")
        .value("bf16", DType::bf16)
        .value("f32", DType::f32)
        .value("i8", DType::i8)
        .value("i32", DType::i32)
        .value("i64", DType::i64);
    nb::class_<Pool>(m, "Pool")
        .def(nb::init<int, std::vector<int>, int>(), "threads"_a, "cpus"_a, "linger_us"_a)
        .def_prop_ro("num_threads", &Pool::num_threads);
    nb::class_<Ref>(m, "Ref")
        .def_ro("buffer", &Ref::buffer)
        .def_ro("cols", &Ref::cols)
        .def_ro("dtype", &Ref::dtype)
        .def_ro("col", &Ref::col)
        .def(
            "columns",
            [](const Ref& ref, int start, int cols) {
                return Ref{ref.buffer, ref.col + start, cols, ref.dtype};
            },
            "start"_a, "cols"_a);
    nb::class_<QuantizedRef>(m, "QuantizedRef")
        .def("__init__", [](QuantizedRef* self, Ref values, Ref scales, Ref sums) {
                 new (self) QuantizedRef{values, scales, sums};
             }, "values"_a, "scales"_a, "sums"_a);
    nb::class_<AttentionInputs>(m, "AttentionInputs")
        .def(
            "__init__",
            [](AttentionInputs* self, std::int64_t num_seqs, std::uintptr_t query_start_loc,
               std::uintptr_t seq_lens, std::uintptr_t block_tables, std::int64_t max_num_blocks,
               std::uintptr_t slot_mapping) {
                new (self) AttentionInputs(attention_inputs(num_seqs, query_start_loc, seq_lens, block_tables,
                                                            max_num_blocks, slot_mapping));
            },
            "num_seqs"_a, "query_start_loc"_a, "seq_lens"_a, "block_tables"_a, "max_num_blocks"_a,
            "slot_mapping"_a);
    nb::class_<LayerKv>(m, "LayerKv")
        .def(
            "__init__",
            [](LayerKv* self, std::uintptr_t keys, std::uintptr_t values, std::int64_t block_bytes,
               int group) { new (self) LayerKv(layer_kv(keys, values, block_bytes, group)); },
            "keys"_a, "values"_a, "block_bytes"_a, "group"_a);
    nb::class_<Program>(m, "Program")
        .def(
            "__init__",
            [](Program* self, std::shared_ptr<Pool> pool, const std::string& isa, bool deterministic) {
                new (self) Program(std::move(pool), isa_named(isa), deterministic);
            },
            "pool"_a, "isa"_a, "deterministic"_a)
        .def("add_buffer", &Program::add_buffer, "dtype"_a, "cols"_a)
        .def("add_external", &Program::add_external, "dtype"_a, "cols"_a)
        .def("set_layers", &Program::set_layers, "layers"_a)
        .def("set_next", &Program::set_next, "next"_a)
        .def("set_reads_ahead", &Program::set_reads_ahead, "reads_ahead"_a)
        .def("run", &run, "num_rows"_a, "externals"_a, "groups"_a, "adapters"_a = AdapterList())
        .def("profile", &profile, "num_rows"_a, "externals"_a, "groups"_a, "rounds"_a,
             "adapters"_a = AdapterList())
        .def("shrink", &Program::shrink)
        .def_prop_ro("op_names", &op_names)
        .def_prop_ro("buffer_bytes", &Program::buffer_bytes);
}

}  // namespace

NB_MODULE(_native, m) {
    // A process ends with its model alive, which the interpreter does not take down: no leak of ours.
    nb::set_leak_warnings(false);
    m.def("supported_isas", &supported_isa_names);
    bind_program(m);
    bind_linear(m);
    bind_attention(m);
    bind_dense(m);
    bind_lora(m);
    bind_sampling(m);
    bind_decode_pass(m);  // after the sampler and the programs, which it takes
    bind_probes(m);
}

}  // namespace penstock
