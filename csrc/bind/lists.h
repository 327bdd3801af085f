// Lists that Python hands over, as what the kernels take.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <tuple>
#include <vector>

#include "penstock/program.h"

namespace penstock {

// First row, rows, whose.
using AdapterList = std::vector<std::tuple<std::int64_t, std::int64_t, std::shared_ptr<Adapter>>>;

inline std::vector<AdapterRows> adapter_rows_of(const AdapterList& list) {
    std::vector<AdapterRows> rows;
    for (const auto& [first_row, num_rows, adapter] : list)
        rows.push_back({first_row, num_rows, adapter->sites.data()});
    return rows;
}

}  // namespace penstock
