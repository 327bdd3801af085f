// Binding of the sampler.
#include "penstock/sampling.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <utility>

#include "addresses.h"
#include "module.h"
#include "penstock/program.h"

namespace penstock {

namespace {

using namespace nb::literals;

void make_edits(RowEdits* self, std::uintptr_t mask, std::uintptr_t banned, std::size_t num_banned,
                std::uintptr_t biased, std::uintptr_t biases, std::size_t num_biased, std::uintptr_t prompt,
                std::size_t num_prompt, std::uintptr_t answer, std::uintptr_t counts, std::size_t num_answer,
                float repetition, float presence, float frequency) {
    new (self) RowEdits{at<const std::int32_t>(mask),
                        span_at<std::int64_t>(banned, num_banned),
                        span_at<std::int64_t>(biased, num_biased),
                        span_at<float>(biases, num_biased),
                        span_at<std::int64_t>(prompt, num_prompt),
                        span_at<std::int64_t>(answer, num_answer),
                        span_at<float>(counts, num_answer),
                        repetition,
                        presence,
                        frequency};
}

using EditList = std::vector<std::pair<std::int64_t, RowEdits>>;  // row, its edits

void sample(TokenSampler& sampler, std::uintptr_t logits, std::int64_t row_stride, std::int64_t vocab,
            std::int64_t num_rows, std::uintptr_t rows, std::uintptr_t temperatures, std::uintptr_t top_k,
            std::uintptr_t top_p, std::uintptr_t min_p, std::uintptr_t uniforms, const EditList& edits,
            std::uintptr_t num_top, std::int64_t max_top, std::uintptr_t tokens, std::uintptr_t statuses,
            std::uintptr_t logprobs, std::uintptr_t ranks, std::uintptr_t top_ids,
            std::uintptr_t top_logprobs) {
    std::vector<const RowEdits*> edits_of(edits.empty() ? 0 : static_cast<std::size_t>(num_rows));
    for (const auto& [row, edit] : edits) edits_of.at(static_cast<std::size_t>(row)) = &edit;
    const SampleCall call{at<const float>(logits),
                          row_stride,
                          vocab,
                          num_rows,
                          at<const std::int64_t>(rows),
                          at<const double>(temperatures),
                          at<const double>(top_k),
                          at<const double>(top_p),
                          at<const double>(min_p),
                          at<const double>(uniforms),
                          edits_of,
                          at<const std::int64_t>(num_top),
                          max_top,
                          at<std::int64_t>(tokens),
                          at<SampleStatus>(statuses),
                          at<double>(logprobs),
                          at<std::int64_t>(ranks),
                          at<std::int64_t>(top_ids),
                          at<double>(top_logprobs)};
    nb::gil_scoped_release release;
    sampler.sample(call);
}

void are_finite(Pool& pool, const std::string& isa, std::uintptr_t data, DType dtype, std::int64_t num_rows,
                std::int64_t cols, std::int64_t row_bytes, std::uintptr_t out) {
    if (dtype != DType::bf16 && dtype != DType::f32) throw nb::value_error("dtype must be bf16 or f32");
    const Isa kernels = isa_named(isa);
    nb::gil_scoped_release release;
    rows_are_finite(pool, kernels, at<const std::byte>(data), dtype == DType::bf16, num_rows, cols, row_bytes,
                    at<std::uint8_t>(out));
}

}  // namespace

void bind_sampling(nb::module_& m) {
    nb::class_<RowEdits>(m, "RowEdits")
        .def("__init__", &make_edits, nb::kw_only(), "mask"_a, "banned"_a, "num_banned"_a, "biased"_a,
             "biases"_a, "num_biased"_a, "prompt"_a, "num_prompt"_a, "answer"_a, "counts"_a, "num_answer"_a,
             "repetition"_a, "presence"_a, "frequency"_a);
    nb::class_<TokenSampler>(m, "TokenSampler")
        .def(
            "__init__",
            [](TokenSampler* self, std::shared_ptr<Pool> pool, const std::string& isa) {
                new (self) TokenSampler(std::move(pool), isa_named(isa));
            },
            "pool"_a, "isa"_a)
        .def("sample", &sample, nb::kw_only(), "logits"_a, "row_stride"_a, "vocab"_a, "num_rows"_a, "rows"_a,
             "temperatures"_a, "top_k"_a, "top_p"_a, "min_p"_a, "uniforms"_a, "edits"_a, "num_top"_a,
             "max_top"_a, "tokens"_a, "statuses"_a, "logprobs"_a, "ranks"_a, "top_ids"_a, "top_logprobs"_a)
        .def_prop_ro("num_bytes", &TokenSampler::num_bytes);
    m.def("rows_are_finite", &are_finite, "pool"_a, nb::kw_only(), "isa"_a, "data"_a, "dtype"_a, "num_rows"_a,
          "cols"_a, "row_bytes"_a, "out"_a);
}

}  // namespace penstock
