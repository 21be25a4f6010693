// Driver of the products on AMX tiles: the rows are packed, then blocks of the weight go over the threads.

#include "cpu/lowrank_transform_amx.h"

#include <algorithm>
#include <stdexcept>

#include "cpu/buffer.h"
#include "cpu/thread_pool.h"

namespace fastedit {

#ifdef FASTEDIT_AMX

void lowrank_product_amx(const ProductArgs& args) {
    if (args.n == 0 || args.outputs == 0) return;
    const std::int64_t steps = (args.depth + kProductDepth - 1) / kProductDepth;
    const std::int64_t tiles = (args.n + 15) / 16, passes = (tiles + kProductTiles - 1) / kProductTiles;
    const std::int64_t most = (tiles + passes - 1) / passes;
    const std::int64_t tasks = (args.outputs + kProductOutputs - 1) / kProductOutputs;
    const int threads = std::max(args.threads, 1);
    const Buffer<char> packed(static_cast<std::size_t>(steps * most * kProductPlanes * kProductTileBytes));
    const std::int64_t sums_size = kProductOutputs * 16 * kProductTiles;
    const Buffer<float> sums(static_cast<std::size_t>(sums_size) * threads);
    for (std::int64_t tile = 0; tile < tiles; tile += most) {
        const ProductPanel panel{packed.get(), 16 * tile, std::min(most, tiles - tile), steps};
        parallel_for(threads, steps,
                     [&](std::int64_t step, int) { amx::lowrank_product_pack(args, panel, step); });
        parallel_for(threads, tasks, [&](std::int64_t task, int worker) {
            const std::int64_t first = task * kProductOutputs;
            amx::lowrank_product_task(args, panel, first, std::min(first + kProductOutputs, args.outputs),
                                      sums.get() + worker * sums_size);
        });
    }
}

#else

void lowrank_product_amx(const ProductArgs&) {
    throw std::logic_error("built without AMX");
}

#endif

}  // namespace fastedit
