// W += alpha left right with one rounding: what the driver and the per-level kernels share.
#pragma once

#include <cstdint>

#include "cpu/levels.h"

namespace fastedit {

enum class WeightType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
// Type of both factors and of the arithmetic. Half-precision weights take kFloat32 only.
enum class FactorType : int { kFloat32 = 0, kFloat64 = 1 };

struct RankUpdateArgs {
    void* weight;  // [rows, columns], unit column stride, rows `weight_stride` elements apart
    WeightType weight_type;
    std::int64_t weight_stride;
    const void* left;  // [rows, rank], any strides
    std::int64_t left_stride[2];
    const void* right;  // [rank, columns], any strides
    std::int64_t right_stride[2];
    FactorType factor_type;
    std::int64_t rows, columns, rank;
    double alpha;
    int threads;
    // Two numbers, or null: |W' - W|^2 and |alpha left right - (W' - W)|^2, Frobenius.
    double* norms;
};

// Rows of one task; a multiple of every level's tile height.
constexpr std::int64_t kRankUpdateRows = 96;

FASTEDIT_DECLARE_LEVELS(
    // Columns of a panel of the packed right factor, which is [panel][rank][width].
    std::int64_t rank_update_width(FactorType type);
    // Packs panel `panel` of the right factor, zero-padded on the right.
    void rank_update_pack(const RankUpdateArgs& args, std::int64_t panel, void* packed);
    // Updates rows [first, last). scratch: kRankUpdateRows * rank elements of the factor type; norms: as in
    // the arguments, of these rows, or null.
    void rank_update_rows(const RankUpdateArgs& args, std::int64_t first, std::int64_t last,
                          const void* packed, void* scratch, double* norms);)

void rank_update(const RankUpdateArgs& args);

}  // namespace fastedit
