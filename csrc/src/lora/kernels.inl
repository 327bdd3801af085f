// The kernel of lora.h, once for every instruction set: the file that includes this one decides which.
//
// ```
// scratch   x rows widened to float32 [num_rows][in, padded] | h [num_rows][rank, padded]
// shrink    blocks of rows of A by rows of x, one vector of sums each
// expand    a panel of B at a time, for all rows: the panel stays in the L1 cache
// ```
#include "kernels.h"
#include "penstock/simd.h"

namespace penstock {
namespace {

constexpr int panel_vectors = adapter_panel / lanes;

PENSTOCK_INLINE void widen_row(const std::uint16_t* from, int n, float* row) {
    int i = 0;
    for (; i + lanes <= n; i += lanes) store(row + i, load(from + i));
    if (i < n) store(row + i, load_first(from + i, n - i));
}

// h[r][j] = scale * dot(A[j], x[r]) for `num_a` rows of A and `num_x` rows of x. The sums' order is that of i
// alone.
template <int num_a, int num_x>
PENSTOCK_INLINE void dots(const std::uint16_t* a, const float* x, int x_stride, int in, float scale, float* h,
                          int h_stride) {
    F32 sums[num_a][num_x] = {};
    int i = 0;
    for (; i + lanes <= in; i += lanes) {
        F32 values[num_x];
        for (int r = 0; r < num_x; ++r) values[r] = load(x + r * x_stride + i);
        for (int j = 0; j < num_a; ++j) {
            const F32 weights = load(a + static_cast<std::int64_t>(j) * in + i);
            for (int r = 0; r < num_x; ++r) sums[j][r] += weights * values[r];
        }
    }
    if (i < in) {
        for (int j = 0; j < num_a; ++j) {
            const F32 weights = load_first(a + static_cast<std::int64_t>(j) * in + i, in - i);
            for (int r = 0; r < num_x; ++r) sums[j][r] += weights * load(x + r * x_stride + i);
        }
    }
    for (int j = 0; j < num_a; ++j) {
        for (int r = 0; r < num_x; ++r) h[r * h_stride + j] = scale * sum_of(sums[j][r]);
    }
}

template <int num_x>
PENSTOCK_INLINE void shrink(const LowRankTask& task, const float* x, int x_stride, float* h, int h_stride) {
    constexpr int at_once = num_x == 1 ? 8 : 4;
    const LowRank& w = task.weights;
    const int in = task.x.cols;
    int j = 0;
    for (; j + at_once <= w.rank; j += at_once) {
        dots<at_once, num_x>(w.a + static_cast<std::int64_t>(j) * in, x, x_stride, in, w.scale, h + j,
                             h_stride);
    }
    for (; j < w.rank; ++j) {
        dots<1, num_x>(w.a + static_cast<std::int64_t>(j) * in, x, x_stride, in, w.scale, h + j, h_stride);
    }
}

template <class T>
PENSTOCK_INLINE void add_panel(const std::uint16_t* b, int rank, const float* h, int n, T* y) {
    F32 sums[panel_vectors] = {};
    for (int j = 0; j < rank; ++j) {
        for (int v = 0; v < panel_vectors; ++v) sums[v] += load(b + j * adapter_panel + v * lanes) * h[j];
    }
    for (int v = 0; v < panel_vectors; ++v) {
        const int left = n - v * lanes;
        T* at = y + v * lanes;
        if (left >= lanes) {
            store(at, load(at) + sums[v]);
        } else if (left > 0) {
            store_first(at, load_first(at, left) + sums[v], left);
        }
    }
}

template <class T>
PENSTOCK_INLINE void expand(const LowRankTask& task, const float* h, int h_stride) {
    const LowRank& w = task.weights;
    const std::int64_t panel_values = static_cast<std::int64_t>(w.rank) * adapter_panel;
    const std::uint16_t* b = w.b;
    for (int first = 0; first < task.y.cols; first += adapter_panel, b += panel_values) {
        const int n = task.y.cols - first < adapter_panel ? task.y.cols - first : adapter_panel;
        for (int r = 0; r < task.num_rows; ++r) {
            add_panel(b, w.rank, h + r * h_stride, n, task.y.row<T>(task.first_row + r) + first);
        }
    }
}

void apply(const LowRankTask& task) {
    const int x_stride = padded_values(task.x.cols), h_stride = padded_values(task.weights.rank);
    float* x = task.scratch;
    float* h = x + task.num_rows * x_stride;
    for (int r = 0; r < task.num_rows; ++r) {
        widen_row(task.x.row<std::uint16_t>(task.first_row + r), task.x.cols, x + r * x_stride);
    }
    int r = 0;
    for (; r + 4 <= task.num_rows; r += 4)
        shrink<4>(task, x + r * x_stride, x_stride, h + r * h_stride, h_stride);
    for (; r < task.num_rows; ++r) shrink<1>(task, x + r * x_stride, x_stride, h + r * h_stride, h_stride);
    if (task.y.dtype == DType::f32) return expand<float>(task, h, h_stride);
    expand<std::uint16_t>(task, h, h_stride);
}

}  // namespace
}  // namespace penstock
