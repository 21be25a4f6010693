// The editor network of MEND and MALMEN on rows [x | d]: what the driver and the per-level kernels share.
#pragma once

#include <cstdint>

#include "cpu/levels.h"
#include "cpu/row_matrix.h"

namespace fastedit {

// z = ([x | d] - mean) / deviation: row i takes row mode[i] of the tables, row 0 without modes.
struct NormaliseArgs {
    RowMatrix parts[2];
    const float* mean;  // [modules, d], or null
    const float* deviation;
    const std::int64_t* mode;  // null: every row takes row 0
    float* z;                  // [n, d]
};

// out [n, outputs] = rows [n, depth] weight^T, all of unit column stride.
struct ProductArgs {
    const float* weight;  // [outputs, depth]
    std::int64_t weight_stride;
    const float* rows;
    std::int64_t row_stride;
    float* out;
    std::int64_t out_stride;
    std::int64_t n, outputs, depth;
    int threads;
    char* scratch;  // lowrank_product_amx_scratch() bytes where the tiles are used
};

// a += bias; z += max(scale a + shift, 0), or with clamp_first z += scale max(a, 0) + shift.
struct ResidualArgs {
    float *z, *a;  // [n, d]
    const float *bias, *scale, *shift;
    const std::int64_t* mode;
    std::int64_t d;
    bool clamp_first;
};

// The way back through a layer's last step, from the gradient dz of its output. Sums over rows in their
// order.
struct ResidualBackwardArgs {
    const float *dz, *a;             // [n, d]
    const float *scale, *shift;      // [modules, d]
    const std::int64_t* mode;        // null: every row is module 0
    float* da;                       // [n, d]
    float *dbias, *dscale, *dshift;  // [d], [modules, d], [modules, d]
    std::int64_t n, d, modules;
    bool clamp_first;
    int threads;
};

struct LowrankLayer {
    const float *V, *U, *bias, *scale, *shift;  // rows of V and U: V_stride and U_stride apart
    std::int64_t V_stride, U_stride, rank;
    float *input, *a;  // [n, d]: a copy of the layer's input, or null; U (V z) + bias
    float* hidden;     // [n, rank], hidden_stride apart
    std::int64_t hidden_stride;
};

struct LowrankTransformArgs {
    NormaliseArgs start;
    const LowrankLayer* layers;
    std::int64_t count, n, d;
    bool clamp_first;
    int threads;
};

FASTEDIT_DECLARE_LEVELS(void lowrank_normalise_row(const NormaliseArgs& args, std::int64_t row);
                        void lowrank_residual_row(const ResidualArgs& args, std::int64_t row);
                        void lowrank_residual_backward_columns(const ResidualBackwardArgs& args,
                                                               std::int64_t first, std::int64_t last);
                        // Columns [first, last) of the product.
                        void lowrank_product_columns(const ProductArgs& args, std::int64_t first,
                                                     std::int64_t last);)

void lowrank_transform(const LowrankTransformArgs& args);
void lowrank_residual_backward(const ResidualBackwardArgs& args);

}  // namespace fastedit
