// Driver of the target optimisation's step: active rows go over the threads.

#include "cpu/delta_step.h"

#include <algorithm>
#include <cmath>

#include "cpu/isa.h"
#include "cpu/thread_pool.h"

namespace fastedit {

void delta_step(const DeltaStepArgs& args) {
    const auto step_row = FASTEDIT_PICK(delta_step_row);
    // Below a few thousand numbers waking threads costs more than the step.
    const int threads = args.rows * args.grad.width < 32768 ? 1 : std::max(args.threads, 1);
    parallel_for(threads, args.rows, [&](std::int64_t row, int) {
        if (args.active[row] == 0) return;
        const double t = static_cast<double>(++args.step[row]);
        const double step_size = args.lr / (1.0 - std::pow(args.beta1, t));
        const double root = std::sqrt(1.0 - std::pow(args.beta2, t));
        step_row(args, row, {static_cast<float>(step_size), static_cast<float>(root)});
    });
}

}  // namespace fastedit
