// Driver of the symmetric product: flushes of tokens, packing, and the triangle of blocks over the threads.

#include "cpu/second_moment.h"

#include <algorithm>

#include "cpu/buffer.h"
#include "cpu/isa.h"
#include "cpu/second_moment_amx.h"
#include "cpu/thread_pool.h"

namespace fastedit {
namespace {

constexpr std::int64_t kPackTokens =
    16;  // tokens per packing task: rows are read whole, panels written in runs
constexpr std::int64_t kPackedFloats = 2 << 20;  // packed keys of the layers that are done together

struct Block {
    std::int64_t row, column;
};

// The index-th block of the lower triangle, row by row.
Block block_at(std::int64_t index) {
    std::int64_t row = 0;
    while ((row + 1) * (row + 2) / 2 <= index) ++row;
    return {row, index - row * (row + 1) / 2};
}

}  // namespace

void second_moment(const SecondMomentArgs& args) {
    if (args.tokens == 0 || args.d == 0 || args.layer_count == 0) return;
    if (current_level() == Level::kAmx) return second_moment_amx(args);
    const auto pack = FASTEDIT_PICK(second_moment_pack);
    const auto block = FASTEDIT_PICK(second_moment_block);
    const std::int64_t width = FASTEDIT_PICK(second_moment_panel_width)();
    const std::int64_t block_width = FASTEDIT_PICK(second_moment_block_width)();
    const std::int64_t panels = (args.d + width - 1) / width;
    const std::int64_t blocks = (args.d + block_width - 1) / block_width;
    const std::int64_t triangle = blocks * (blocks + 1) / 2;
    const std::int64_t scratch_size = block_width * block_width;

    // Flushes of equal size, so that the last one is not a sliver.
    const std::int64_t flushes = (args.tokens + kFlushTokens - 1) / kFlushTokens;
    const std::int64_t longest = (args.tokens + flushes - 1) / flushes;
    const int threads = std::max(args.threads, 1);
    const std::int64_t together =
        std::clamp<std::int64_t>(kPackedFloats / (panels * longest * width), 1, args.layer_count);
    const Buffer<float> packed(static_cast<std::size_t>(together * panels * longest * width));
    const Buffer<float> scratch(static_cast<std::size_t>(scratch_size) * threads);

    for (std::int64_t layer = 0; layer < args.layer_count; layer += together) {
        const std::int64_t layers = std::min(together, args.layer_count - layer);
        const SecondMomentLayer* group = args.layers + layer;
        for (std::int64_t first = 0; first < args.tokens; first += longest) {
            const std::int64_t tokens = std::min(longest, args.tokens - first);
            const std::int64_t packs = (tokens + kPackTokens - 1) / kPackTokens;
            const auto panels_of = [&](std::int64_t index) {
                return SecondMomentPanels{packed.get() + index * panels * longest * width, tokens, width,
                                          panels};
            };
            parallel_for(threads, layers * packs, [&](std::int64_t task, int) {
                const std::int64_t index = task / packs, from = task % packs * kPackTokens;
                pack(args, group[index], first, from, std::min(from + kPackTokens, tokens), panels_of(index));
            });
            // Every block of the master belongs to one task, so results do not depend on the threads.
            parallel_for(threads, layers * triangle, [&](std::int64_t task, int worker) {
                const std::int64_t index = task / triangle;
                const Block at = block_at(task % triangle);
                block(args, group[index], panels_of(index), at.row, at.column,
                      scratch.get() + worker * scratch_size);
            });
        }
    }
}

}  // namespace fastedit
