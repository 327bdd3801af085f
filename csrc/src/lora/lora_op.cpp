// The adapters' operation: who computes which segment. The arithmetic is in kernels.inl.
//
// ```
// task = tile * sites + site        a tile is up to 8 rows of one segment
// ```
//
// A task does both products, so that nothing but the operation's own end needs a barrier. Tasks come to a
// thread in rising order: a cursor finds their segments without a list.
#include <algorithm>
#include <stdexcept>
#include <utility>

#include "kernels.h"

namespace penstock {

namespace {

void require(bool is_true, const char* message) {
    if (!is_true) throw std::invalid_argument(message);
}

std::int64_t num_tiles(const AdapterRows& segment) {
    return (segment.num_rows + adapter_tile_rows - 1) / adapter_tile_rows;
}

// Finds the segment of a tile, for tiles that only rise.
class TileCursor {
public:
    explicit TileCursor(std::span<const AdapterRows> segments) : segments_(segments) {}

    // Moves to the tile; the result is its number within `segment()`.
    std::int64_t seek(std::int64_t tile) {
        while (tile - first_ >= num_tiles(segment())) {
            first_ += num_tiles(segment());
            ++index_;
        }
        return tile - first_;
    }
    const AdapterRows& segment() const { return segments_[index_]; }

private:
    std::span<const AdapterRows> segments_;
    std::size_t index_ = 0;
    std::int64_t first_ = 0;
};

class LoraOp final : public Op {
public:
    LoraOp(const Ref& x, std::vector<LoraSite> sites, ApplyLowRank apply)
        : x_(x), sites_(std::move(sites)), apply_(apply) {}

    std::string_view name() const override { return "lora"; }

    void run(const Step& step, Worker& worker) const override {
        std::int64_t tiles = 0;
        for (const AdapterRows& segment : step.adapters) tiles += num_tiles(segment);
        const auto num_sites = static_cast<std::int64_t>(sites_.size());
        TileCursor cursor(step.adapters);
        worker.share(tiles * num_sites, [&](std::int64_t task) {
            const std::int64_t tile = cursor.seek(task / num_sites);
            run_tile(step, worker, cursor.segment(), tile,
                     sites_[static_cast<std::size_t>(task % num_sites)]);
        });
    }

    std::size_t scratch_bytes(const Step& step) const override {
        int rank = 0;
        for (const AdapterRows& segment : step.adapters) {
            for (const LoraSite& site : sites_) rank = std::max(rank, segment.sites[site.site].rank);
        }
        const auto floats = adapter_tile_rows * (padded_values(x_.cols) + padded_values(rank));
        return rank > 0 ? sizeof(float) * static_cast<std::size_t>(floats) : 0;
    }

private:
    void run_tile(const Step& step, Worker& worker, const AdapterRows& segment, std::int64_t tile,
                  const LoraSite& site) const {
        const LowRank& weights = segment.sites[site.site];
        if (weights.rank == 0) return;
        const std::int64_t first = tile * adapter_tile_rows;
        const int rows =
            static_cast<int>(std::min<std::int64_t>(adapter_tile_rows, segment.num_rows - first));
        auto* scratch = reinterpret_cast<float*>(worker.scratch());
        apply_({weights, step.at(x_), step.at(site.out), segment.first_row + first, rows, scratch});
    }

    Ref x_;
    std::vector<LoraSite> sites_;
    ApplyLowRank apply_;
};

}  // namespace

ApplyLowRank apply_low_rank(Isa isa) {
#if defined(__x86_64__)
    if (isa >= Isa::avx512) return apply_low_rank_avx512;
    if (isa == Isa::avx2) return apply_low_rank_avx2;
#else
    (void)isa;
#endif
    return apply_low_rank_scalar;
}

void add_lora(Program& program, const Ref& x, const std::vector<LoraSite>& sites) {
    require(x.dtype == DType::bf16, "the input of an adapter must be bf16");
    require(!sites.empty(), "an adapter's operation needs a site");
    for (const LoraSite& site : sites) {
        require(site.site >= 0, "a site's number must not be negative");
        require(site.out.dtype == DType::bf16 || site.out.dtype == DType::f32,
                "the output of an adapter must be bf16 or f32");
    }
    program.add(std::make_unique<LoraOp>(x, sites, apply_low_rank(program.isa())));
}

}  // namespace penstock
