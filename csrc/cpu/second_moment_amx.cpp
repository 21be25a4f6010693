// Driver of the symmetric product on AMX tiles: flushes, packing, and the triangle of panels over the
// threads.

#include "cpu/second_moment_amx.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/thread_pool.h"

namespace fastedit {

#ifdef FASTEDIT_AMX
namespace {

// Left operands of a task: with a panel of right ones half of the 2 MB of L2 that every CPU with AMX has.
constexpr std::int64_t kLeftBytes = 1 << 20;
// Packed keys of the layers that are done together: small ones share the threads, large ones would push each
// other out of the cache.
constexpr std::int64_t kPackedBytes = 8 << 20;

int planes_of(const SecondMomentArgs& args) {
    switch (args.key_type) {
        case KeyType::kBFloat16:
            return 1;
        case KeyType::kFloat16:
            return 2;
        case KeyType::kFloat32:
            return args.exact ? 3 : 2;
    }
    throw std::invalid_argument("key_type is not a KeyType");
}

// The triangle in tasks, the longest first. Every block of the master is in one task, and its value depends
// on the packed keys alone, so neither the division nor the threads change a bit.
std::vector<AmxTask> divide(std::int64_t panels, std::int64_t height, std::int64_t width) {
    std::vector<AmxTask> tasks;
    for (std::int64_t row_end = panels; row_end > 0; row_end -= height) {
        const std::int64_t row = std::max<std::int64_t>(row_end - height, 0);
        for (std::int64_t column = 0; column < row_end; column += width)
            tasks.push_back({row, row_end, column, std::min(column + width, row_end)});
    }
    return tasks;
}

}  // namespace

void second_moment_amx(const SecondMomentArgs& args) {
    const int planes = planes_of(args);
    const std::int64_t panels = (args.d + kAmxPanel - 1) / kAmxPanel;
    const std::int64_t limit = planes == 1 ? kAmxFlushTokens : kAmxSplitFlushTokens;
    const std::int64_t flushes = (args.tokens + limit - 1) / limit;
    const std::int64_t longest =
        ((args.tokens + flushes - 1) / flushes + kAmxPanel - 1) / kAmxPanel * kAmxPanel;
    const std::int64_t panel_bytes = planes * (longest / kAmxPanel) * kAmxStepBytes;
    const int threads = std::max(args.threads, 1);

    const std::int64_t height =
        std::clamp<std::int64_t>(kLeftBytes / panel_bytes, 1, std::max<std::int64_t>(panels / threads, 1));
    const std::int64_t together = std::clamp<std::int64_t>(kPackedBytes / (panels * panel_bytes), 1,
                                                           static_cast<std::int64_t>(args.layer_count));
    const std::int64_t width = threads == 1 ? panels : std::max<std::int64_t>(2 * height, 1);
    const std::vector<AmxTask> tasks = divide(panels, height, width);
    const std::int64_t task_count = static_cast<std::int64_t>(tasks.size());
    const Buffer<char> packed(static_cast<std::size_t>(together * panels * panel_bytes));
    const Buffer<char> left(static_cast<std::size_t>(height * panel_bytes) * threads);
    const std::int64_t sums_size = height * kAmxBlockPanels * kAmxPanel * kAmxPanel;
    const Buffer<float> sums(static_cast<std::size_t>(sums_size) * threads);

    for (std::int64_t layer = 0; layer < args.layer_count; layer += together) {
        const std::int64_t layers = std::min(together, args.layer_count - layer);
        const SecondMomentLayer* group = args.layers + layer;
        for (std::int64_t first = 0; first < args.tokens; first += longest) {
            const std::int64_t tokens = std::min(longest, args.tokens - first);
            const std::int64_t steps = (tokens + kAmxPanel - 1) / kAmxPanel;
            const auto panels_of = [&](std::int64_t index) {
                return AmxPanels{packed.get() + index * panels * panel_bytes, planes, steps, panels};
            };
            parallel_for(threads, layers * steps, [&](std::int64_t task, int) {
                amx::second_moment_pack(args, group[task / steps], first, tokens, task % steps,
                                        panels_of(task / steps));
            });
            parallel_for(threads, layers * task_count, [&](std::int64_t task, int worker) {
                const std::int64_t index = task % layers;
                amx::second_moment_task(
                    args, group[index], panels_of(index), tasks[static_cast<std::size_t>(task / layers)],
                    left.get() + worker * height * panel_bytes, sums.get() + worker * sums_size);
            });
        }
    }
}
#else
void second_moment_amx(const SecondMomentArgs&) {
    throw std::logic_error("built without AMX");
}
#endif

}  // namespace fastedit
