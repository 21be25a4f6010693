// Running mean and squared deviations of rows: what the driver and the per-level kernels share.
#pragma once

#include <cstdint>

#include "cpu/levels.h"
#include "cpu/row_matrix.h"

namespace fastedit {

struct RowMomentsArgs {
    RowMatrix parts[2];           // the rows are [parts[0] | parts[1]]
    const std::uint8_t* mask;     // [n], rows that count, or null
    const std::int64_t* batches;  // rows of each
    std::int64_t batch_count;
    bool inflated;
    std::int64_t* count;  // one; 0: what the state holds is not read
    void *mean, *m2;      // [d] of the state's type, the strides below
    std::int64_t mean_stride, m2_stride;
    bool float64;
    // After each batch: [batch_count], and twice [batch_count, d] of the state's type.
    std::int64_t* counts;
    void *means, *m2s;
    int threads;
};

// Columns of one task.
constexpr std::int64_t kRowMomentsColumns = 128;

FASTEDIT_DECLARE_LEVELS(
    // Columns [first, last) of a part; args.count is still the old one.
    void row_moments_columns(const RowMomentsArgs& args, int part, std::int64_t first, std::int64_t last);)

void row_moments(const RowMomentsArgs& args);

}  // namespace fastedit
