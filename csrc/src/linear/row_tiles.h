// Cuts rows into tiles whose height the compiler knows. Included by files of every instruction set, hence anonymous.
#pragma once

#include <cstring>
#include <utility>

namespace penstock {
namespace {

template <int most, class Function, int... heights>
[[gnu::always_inline]] inline void for_height(int height, int row, Function&& function,
                                              std::integer_sequence<int, heights...>) {
    ((height == heights + 1 ? function.template operator()<heights + 1>(row) : void()), ...);
}

// Call function.operator()<height>(row) for tiles of at most `most` rows that cover [0, num_rows): as few as possible,
// and as equal as possible (13 rows are 7 and 6, not 12 and 1: a low tile reads the weights for few rows).
template <int most, class Function>
[[gnu::always_inline]] inline void for_row_tiles(int num_rows, Function&& function) {
    for (int tiles = (num_rows + most - 1) / most, row = 0; tiles > 0; --tiles) {
        const int height = (num_rows - row + tiles - 1) / tiles;
        for_height<most>(height, row, function, std::make_integer_sequence<int, most>{});
        row += height;
    }
}

}  // namespace
}  // namespace penstock
