// C += K^T K on the lower triangle of C: what the driver and the per-level kernels share.
#pragma once

#include <cstdint>

#include "cpu/levels.h"

namespace fastedit {

enum class KeyType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum class MasterType : int { kFloat32 = 0, kFloat64 = 1 };

struct SecondMomentLayer {
    const void* keys;  // [rows, d], rows `key_stride` elements apart
    std::int64_t key_stride;
    void* master;  // [d, d], rows `master_stride` elements apart
    std::int64_t master_stride;
};

struct SecondMomentArgs {
    const SecondMomentLayer* layers;
    std::int64_t layer_count;
    KeyType key_type;
    MasterType master_type;
    const std::int64_t* rows;  // which rows of the keys count, or null for 0..tokens-1
    std::int64_t tokens;
    std::int64_t d;
    bool exact;  // fp32 keys in full; else AMX takes their first 16 bits
    int threads;
};

// Tokens summed in fp32 before they go to the master. Longer chains lose digits (the diagonal is a sum of
// positive terms), shorter ones pay for reading and writing the master more often.
constexpr std::int64_t kFlushTokens = 1024;
// A tile sums 32 tokens from zero and adds that to its chain, so its chains are 32 times shorter. Keys of
// several planes have several links for the same tokens.
constexpr std::int64_t kAmxFlushTokens = 2048;
constexpr std::int64_t kAmxSplitFlushTokens = 512;

// Packed keys: panel p holds columns [p * width, (p + 1) * width) as [tokens][width] floats, zero-padded on
// the right. The same panels serve as left and as right operand, which is what makes packing cheap for a
// symmetric product.
struct SecondMomentPanels {
    float* data;
    std::int64_t tokens;  // of this flush
    std::int64_t width;
    std::int64_t count;

    float* panel(std::int64_t index) const { return data + index * tokens * width; }
};

FASTEDIT_DECLARE_LEVELS(
    // Columns of a panel, and columns of a block: a block is what one task computes.
    int second_moment_panel_width(); int second_moment_block_width();
    // Packs tokens [from, to) of this flush, which starts at row `first` of args.
    void second_moment_pack(const SecondMomentArgs& args, const SecondMomentLayer& layer, std::int64_t first,
                            std::int64_t from, std::int64_t to, const SecondMomentPanels& panels);
    // Adds block (row, column), column <= row, of this flush to the master. scratch: block_width^2 floats.
    void second_moment_block(const SecondMomentArgs& args, const SecondMomentLayer& layer,
                             const SecondMomentPanels& panels, std::int64_t row, std::int64_t column,
                             float* scratch);)

void second_moment(const SecondMomentArgs& args);

}  // namespace fastedit
