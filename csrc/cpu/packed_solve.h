// Few-right-hand-side solves with a packed triangular factor: what the driver and the per-level kernels
// share.
#pragma once

#include <cstdint>

#include "cpu/levels.h"

namespace fastedit {

// Columns of a block column of the packed factor; fastedit/ops/packed_solve.py packs it. Block column j is a
// row-major [width - 128 j, 128] matrix (the last one is narrower): the inverse of the diagonal block, zeros
// above its diagonal, then the blocks of L below it. Block columns follow each other without gaps.
constexpr std::int64_t kPackedBlock = 128;
// Right-hand sides that a kernel takes at a time: their part of one block is 32 KB and stays in the L1 cache.
constexpr std::int64_t kPackedGroup = 32;
// Groups that share one pass over the factor.
constexpr std::int64_t kPackedGroups = 4;

struct PackedSolveArgs {
    const double* packed;
    std::int64_t width;
    double* rows;  // [count, width], unit column stride: each row is a right-hand side, solved in place
    std::int64_t row_stride;
    std::int64_t count;
    bool transposed;  // solve with L^T instead of L
    int threads;
};

FASTEDIT_DECLARE_LEVELS(
    // n below is 1 or a multiple of this, and at most kPackedGroup.
    std::int64_t packed_solve_lanes();
    // x [rows, n] -= a [rows, depth] y [depth, n]; all row-major without gaps.
    void packed_solve_subtract(const double* a, std::int64_t rows, std::int64_t depth, const double* y,
                               double* x, std::int64_t n);
    // z [depth, n] += a^T x for a [rows, depth], x [rows, n]; all row-major without gaps.
    void packed_solve_add_transposed(const double* a, std::int64_t rows, std::int64_t depth, const double* x,
                                     double* z, std::int64_t n);)

void packed_solve(const PackedSolveArgs& args);

}  // namespace fastedit
