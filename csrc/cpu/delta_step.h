// One step of the target optimisation for many edits: what the driver and the per-level kernels share.
#pragma once

#include <cstdint>

#include "cpu/levels.h"
#include "cpu/row_matrix.h"

namespace fastedit {

// Matrices [E, d] of unit column stride, vectors [E] without gaps.
struct DeltaStepArgs {
    float* delta;
    std::int64_t delta_stride;
    RowMatrix grad;  // grad.width is d
    float* exp_avg;
    std::int64_t exp_avg_stride;
    float* exp_avg_sq;
    std::int64_t exp_avg_sq_stride;
    std::int64_t* step;
    const float* init_norm;
    const std::uint8_t* active;
    std::int64_t rows;
    double lr, weight_decay, clamp, beta1, beta2, eps;
    int threads;
};

// What depends on a row's number of steps: lr / (1 - beta1^t) and sqrt(1 - beta2^t).
struct DeltaStepRates {
    float step_size, root;
};

FASTEDIT_DECLARE_LEVELS(void delta_step_row(const DeltaStepArgs& args, std::int64_t row,
                                            DeltaStepRates rates);)

void delta_step(const DeltaStepArgs& args);

}  // namespace fastedit
