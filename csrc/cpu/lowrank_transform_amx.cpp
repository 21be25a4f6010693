// Driver of the products on AMX tiles: the rows are packed, then blocks of the weight go over the threads.

#include "cpu/lowrank_transform_amx.h"

#include <algorithm>
#include <stdexcept>

#include "cpu/thread_pool.h"

namespace fastedit {

namespace {

constexpr std::int64_t kSums = kProductOutputs * 16 * kProductTiles;  // of a thread

struct Passes {
    std::int64_t steps, tiles, most;  // most: tiles of rows that one pass over the weight takes

    Passes(std::int64_t n, std::int64_t depth)
        : steps((depth + kProductDepth - 1) / kProductDepth), tiles((n + 15) / 16), most(0) {
        const std::int64_t passes = (tiles + kProductTiles - 1) / kProductTiles;
        if (passes > 0) most = (tiles + passes - 1) / passes;
    }
    std::int64_t packed_bytes() const { return steps * most * kProductPlanes * kProductTileBytes; }
};

}  // namespace

std::int64_t lowrank_product_amx_scratch(std::int64_t n, std::int64_t depth, int threads) {
    return Passes(n, depth).packed_bytes() + threads * kSums * static_cast<std::int64_t>(sizeof(float));
}

#ifdef FASTEDIT_AMX

void lowrank_product_amx(const ProductArgs& args) {
    if (args.depth == 0) {  // no step would ever set the sums
        for (std::int64_t row = 0; row < args.n; ++row)
            std::fill_n(args.out + row * args.out_stride, args.outputs, 0.0f);
        return;
    }
    const Passes passes(args.n, args.depth);
    const std::int64_t tasks = (args.outputs + kProductOutputs - 1) / kProductOutputs;
    float* sums = reinterpret_cast<float*>(args.scratch + passes.packed_bytes());
    for (std::int64_t tile = 0; tile < passes.tiles; tile += passes.most) {
        const ProductPanel panel{args.scratch, 16 * tile, std::min(passes.most, passes.tiles - tile),
                                 passes.steps};
        parallel_for(args.threads, passes.steps,
                     [&](std::int64_t step, int) { amx::lowrank_product_pack(args, panel, step); });
        parallel_for(args.threads, tasks, [&](std::int64_t task, int worker) {
            const std::int64_t first = task * kProductOutputs;
            amx::lowrank_product_task(args, panel, first, std::min(first + kProductOutputs, args.outputs),
                                      sums + worker * kSums);
        });
    }
}

#else

void lowrank_product_amx(const ProductArgs&) {
    throw std::logic_error("built without AMX");
}

#endif

}  // namespace fastedit
