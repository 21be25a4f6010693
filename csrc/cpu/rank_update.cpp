// Driver of the low-rank update: the right factor is packed once, then blocks of rows go over the threads.

#include "cpu/rank_update.h"

#include <algorithm>

#include "cpu/buffer.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"

namespace fastedit {

void rank_update(const RankUpdateArgs& args) {
    if (args.norms != nullptr) args.norms[0] = args.norms[1] = 0.0;
    if (args.rows == 0 || args.columns == 0 || args.rank == 0) return;
    const auto pack = FASTEDIT_PICK(rank_update_pack);
    const auto update = FASTEDIT_PICK(rank_update_rows);
    const std::int64_t width = FASTEDIT_PICK(rank_update_width)(args.factor_type);
    const std::int64_t panels = (args.columns + width - 1) / width;
    const std::int64_t size = args.factor_type == FactorType::kFloat64 ? 8 : 4;
    const int threads = std::max(args.threads, 1);

    const Buffer<char> packed(static_cast<std::size_t>(panels * width * args.rank * size));
    const std::size_t scratch_size = static_cast<std::size_t>(kRankUpdateRows * args.rank * size);
    const Buffer<char> scratch(scratch_size * threads);
    parallel_for(threads, panels, [&](std::int64_t panel, int) {
        pack(args, panel, packed.get() + panel * width * args.rank * size);
    });
    // Rows belong to one task each, so results do not depend on the number of threads.
    const std::int64_t tasks = (args.rows + kRankUpdateRows - 1) / kRankUpdateRows;
    const Buffer<double> norms(args.norms == nullptr ? 0 : 2 * tasks);
    parallel_for(threads, tasks, [&](std::int64_t task, int worker) {
        const std::int64_t first = task * kRankUpdateRows;
        update(args, first, std::min(first + kRankUpdateRows, args.rows), packed.get(),
               scratch.get() + worker * scratch_size,
               args.norms == nullptr ? nullptr : norms.get() + 2 * task);
    });
    for (std::int64_t task = 0; args.norms != nullptr && task < tasks; ++task)
        for (int i = 0; i < 2; ++i) args.norms[i] += norms.get()[2 * task + i];
}

}  // namespace fastedit
