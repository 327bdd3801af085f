// Cuts rows into tiles whose height the compiler knows, and says what each asks memory for. Included by files
// of every instruction set, hence anonymous.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

namespace penstock {
namespace {

// A tile of the rows, and how many there are.
struct RowTile {
    int first_row;
    int index;
    int count;

    operator int() const { return first_row; }  // for kernels that only need to know which rows
};

template <int most, class Function, int... heights>
[[gnu::always_inline]] inline void for_height(int height, const RowTile& tile, Function&& function,
                                              std::integer_sequence<int, heights...>) {
    ((height == heights + 1 ? function.template operator()<heights + 1>(tile) : void()), ...);
}

// Call function.operator()<height>(tile) for tiles of at most `most` rows that cover [0, num_rows): as few as
// possible, and as equal as possible (13 rows are 7 and 6, not 12 and 1: a low tile reads the weights for few
// rows).
template <int most, class Function>
[[gnu::always_inline]] inline void for_row_tiles(int num_rows, Function&& function) {
    RowTile tile{0, 0, (num_rows + most - 1) / most};
    for (; tile.index < tile.count; ++tile.index) {
        const int left = tile.count - tile.index;
        const int height = (num_rows - tile.first_row + left - 1) / left;
        for_height<most>(height, tile, function, std::make_integer_sequence<int, most>{});
        tile.first_row += height;
    }
}

// Lines of weights to ask for, two for each 128 bytes that are multiplied.
//
// A single tile asks for what it needs itself, a page ahead (4 KiB and 8 KiB measure alike). Of several, only
// the first would have to wait for memory; so each asks for its share of the next panel, which the same
// thread takes next:
//
// ```
// next panel   | tile 0: from here .. and here .. | tile 1: from here .. and here .. | ...
// ```
class Ahead {
public:
    Ahead(const void* panel, std::size_t panel_bytes, const RowTile& tile)
        : line_(static_cast<const char*>(panel)) {
        if (tile.count == 1) {
            line_ += page;
            return;
        }
        const auto share = static_cast<std::int64_t>(panel_bytes) / tile.count;
        line_ += static_cast<std::int64_t>(panel_bytes) + share * tile.index;
        gap_ = share / 2;
        step_ = line / tile.count;
    }

    [[gnu::always_inline]] void ask() {
        __builtin_prefetch(line_);
        __builtin_prefetch(line_ + gap_);
        line_ += step_;
    }

private:
    static constexpr int line = 64, page = 4096;
    const char* line_;
    std::int64_t gap_ = line;
    std::int64_t step_ = 2 * line;
};

}  // namespace
}  // namespace penstock
