// Driver of the running moments: blocks of columns go over the threads, each through all batches in order.

#include "cpu/row_moments.h"

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/thread_pool.h"

namespace fastedit {

void row_moments(const RowMomentsArgs& args) {
    const auto columns = FASTEDIT_PICK(row_moments_columns);
    std::int64_t tasks[2];
    for (int part = 0; part < 2; ++part)
        tasks[part] = (args.parts[part].width + kRowMomentsColumns - 1) / kRowMomentsColumns;
    parallel_for(std::max(args.threads, 1), tasks[0] + tasks[1], [&](std::int64_t task, int) {
        const int part = task < tasks[0] ? 0 : 1;
        const std::int64_t first = (part == 0 ? task : task - tasks[0]) * kRowMomentsColumns;
        columns(args, part, first, std::min(first + kRowMomentsColumns, args.parts[part].width));
    });
    const std::uint8_t* mask = args.mask;
    for (std::int64_t batch = 0; batch < args.batch_count; ++batch) {
        std::int64_t rows = args.batches[batch];
        if (mask != nullptr) {
            const std::uint8_t* end = mask + rows;
            rows -= std::count(mask, end, std::uint8_t{0});
            mask = end;
        }
        args.counts[batch] = *args.count += rows;
    }
}

}  // namespace fastedit
