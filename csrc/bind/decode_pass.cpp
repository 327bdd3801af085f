// Binding of the decode pass and its draws.
#include "penstock/decode_pass.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <utility>

#include "addresses.h"
#include "lists.h"
#include "module.h"

namespace penstock {

namespace {

using namespace nb::literals;

using Place = std::pair<std::uintptr_t, std::int64_t>;  // address, bytes from row to row

Program::External external(const Place& place) { return {at<std::byte>(place.first), place.second}; }

void make_draws(PreparedDraws* self, TokenSampler& sampler, std::int64_t vocab, std::int64_t num_rows,
                std::uintptr_t starts, std::uintptr_t rows, std::uintptr_t temperatures, std::uintptr_t top_k,
                std::uintptr_t top_p, std::uintptr_t min_p, std::uintptr_t uniforms, std::uintptr_t num_top,
                std::int64_t max_top, std::uintptr_t tokens, std::uintptr_t statuses, std::uintptr_t logprobs,
                std::uintptr_t ranks, std::uintptr_t top_ids, std::uintptr_t top_logprobs) {
    const SampleCall call{nullptr,
                          0,
                          vocab,
                          num_rows,
                          at<const std::int64_t>(rows),
                          at<const double>(temperatures),
                          at<const double>(top_k),
                          at<const double>(top_p),
                          at<const double>(min_p),
                          at<const double>(uniforms),
                          {},
                          at<const std::int64_t>(num_top),
                          max_top,
                          at<std::int64_t>(tokens),
                          at<SampleStatus>(statuses),
                          at<double>(logprobs),
                          at<std::int64_t>(ranks),
                          at<std::int64_t>(top_ids),
                          at<double>(top_logprobs)};
    new (self) PreparedDraws{&sampler, call, at<const std::uint64_t>(starts), at<double>(uniforms)};
}

void number(const PreparedDraws& draws, const std::vector<std::int64_t>& output_idxs) {
    if (static_cast<std::int64_t>(output_idxs.size()) != draws.call.num_rows)
        throw std::invalid_argument("output_idxs must have one number a draw");
    number_draws(draws, output_idxs);
}

std::optional<std::vector<std::int64_t>> tokens_of(const PreparedDraws& draws) {
    const SampleCall& call = draws.call;
    const auto is_drawn = [](SampleStatus status) { return status == SampleStatus::drawn; };
    if (!std::all_of(call.statuses, call.statuses + call.num_rows, is_drawn)) return std::nullopt;
    return std::vector<std::int64_t>(call.tokens, call.tokens + call.num_rows);
}

void make_pass(DecodePass* self, std::int64_t num_rows, const Place& token_ids, const Place& positions,
               const Place& hidden, DType hidden_dtype, std::int64_t hidden_cols, const Place& logits,
               std::int64_t logits_cols, const std::vector<AttentionInputs>& groups) {
    if (hidden_dtype != DType::bf16 && hidden_dtype != DType::f32)
        throw nb::value_error("hidden_dtype must be bf16 or f32");
    new (self) DecodePass({num_rows, external(token_ids), external(positions), external(hidden), hidden_dtype,
                           hidden_cols, external(logits), logits_cols, groups});
}

std::vector<std::int64_t> run(DecodePass& pass, Program& layers, Program& head, const AdapterList& adapters,
                              const PreparedDraws* draws) {
    const auto segments = adapter_rows_of(adapters);
    {
        nb::gil_scoped_release release;
        pass.run(layers, head, segments, draws);
    }
    std::vector<std::int64_t> bad_rows;
    const std::vector<std::uint8_t>& are_finite = pass.are_finite();
    for (std::size_t r = 0; r < are_finite.size(); ++r) {
        if (!are_finite[r]) bad_rows.push_back(static_cast<std::int64_t>(r));
    }
    return bad_rows;
}

}  // namespace

void bind_decode_pass(nb::module_& m) {
    nb::class_<PreparedDraws>(m, "PreparedDraws")
        .def("__init__", &make_draws, nb::keep_alive<1, 2>(), "sampler"_a, nb::kw_only(), "vocab"_a,
             "num_rows"_a, "starts"_a, "rows"_a, "temperatures"_a, "top_k"_a, "top_p"_a, "min_p"_a, "uniforms"_a,
             "num_top"_a, "max_top"_a, "tokens"_a, "statuses"_a, "logprobs"_a, "ranks"_a, "top_ids"_a,
             "top_logprobs"_a)
        .def("number", &number, "output_idxs"_a)
        .def("tokens", &tokens_of);
    nb::class_<DecodePass>(m, "DecodePass")
        .def("__init__", &make_pass, nb::kw_only(), "num_rows"_a, "token_ids"_a, "positions"_a, "hidden"_a,
             "hidden_dtype"_a, "hidden_cols"_a, "logits"_a, "logits_cols"_a, "groups"_a)
        .def("run", &run, "layers"_a, "head"_a, "adapters"_a, "draws"_a.none())
        .def_prop_ro("program_seconds", &DecodePass::program_seconds);
}

}  // namespace penstock
