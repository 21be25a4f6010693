// C += K^T K on the lower triangle of C with AMX tiles: what the driver and the kernel share.
//
// Keys become planes of bf16 whose sum they are: one plane for bf16, two for fp16 (exactly) and for fp32 (its
// first 16 bits), three for fp32 in full. Every product of two planes is exact in fp32.
#pragma once

#include <cstdint>

#include "cpu/second_moment.h"

namespace fastedit {

constexpr std::int64_t kAmxPanel = 32;  // columns of a panel, and tokens of one step of the tiles
// Bytes of one plane of one panel and one step: 32 tokens x 32 columns.
constexpr std::int64_t kAmxStepBytes = 2048;
constexpr std::int64_t kAmxBlockPanels = 8;  // panels of right operands that a task does together

// Steps of all planes in a strip: two panels of 16 KB fit the 48 KB of L1 that every CPU with AMX has.
constexpr std::int64_t kAmxStripSteps = 8;

// One layer and one flush, packed: panel p holds columns [32 p, 32 p + 32) in strips of steps, a strip as
// [planes][steps] of two tiles of right operands, whose rows are pairs of tokens.
struct AmxPanels {
    char* data;
    int planes;
    std::int64_t steps;  // of 32 tokens; the last is padded with zeros
    std::int64_t count;

    std::int64_t strips() const { return (steps * planes + kAmxStripSteps - 1) / kAmxStripSteps; }
    std::int64_t strip_begin(std::int64_t strip) const { return strip * steps / strips(); }
    std::int64_t panel_bytes() const { return planes * steps * kAmxStepBytes; }
    char* panel(std::int64_t index) const { return data + index * panel_bytes(); }
};

// Panels of rows and of columns of the master that one task computes: [row, row_end) x [column, column_end).
struct AmxTask {
    std::int64_t row, row_end, column, column_end;
};

#ifdef FASTEDIT_AMX
namespace amx {
// Packs tokens [32 step, 32 step + 32) of the flush that starts at row `first` and has `tokens`.
void second_moment_pack(const SecondMomentArgs& args, const SecondMomentLayer& layer, std::int64_t first,
                        std::int64_t tokens, std::int64_t step, const AmxPanels& panels);
// Adds the lower-triangle part of the task to the master. Scratch: left for (row_end - row) panels, sums for
// kAmxBlockPanels squares of each of them.
void second_moment_task(const SecondMomentArgs& args, const SecondMomentLayer& layer, const AmxPanels& panels,
                        const AmxTask& task, char* left, float* sums);
}  // namespace amx
#endif

// The driver. args.tokens and args.d are positive.
void second_moment_amx(const SecondMomentArgs& args);

}  // namespace fastedit
