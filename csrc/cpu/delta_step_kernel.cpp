// The inner kernel of the target optimisation's step, compiled once per instruction-set level (see
// cpu/isa.h).
//
// A row is read twice: for its norm, then for everything else. It is written a second time only where it left
// the ball.

#include <cstddef>
#include <cstdint>

#include "cpu/delta_step.h"
#include "cpu/vector.h"

namespace fastedit {
namespace FASTEDIT_LEVEL {
namespace {

// Numbers of a row that are at work at once.
constexpr std::int64_t kBlock = 256;

inline Vector root_of(Vector x) {
#if defined(__AVX512F__)
    return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
    __m256 parts[kLanes / 8];
    __builtin_memcpy(parts, &x, sizeof x);
    for (__m256& part : parts) part = _mm256_sqrt_ps(part);
    __builtin_memcpy(&x, parts, sizeof x);
    return x;
#else
    for (int lane = 0; lane < kLanes; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
    return x;
#endif
}

// Sums squares: float within a block of a row, double over blocks.
inline double squares(const float* x, std::int64_t n) {
    Vector sums[4] = {};
    std::int64_t j = 0;
    for (; j + 4 * kLanes <= n; j += 4 * kLanes)
        for (int i = 0; i < 4; ++i) {
            const Vector v = load(x + j + i * kLanes);
            sums[i] += v * v;
        }
    double total = static_cast<double>(sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])));
    for (; j < n; ++j) total += static_cast<double>(x[j]) * x[j];
    return total;
}

template <typename T>
void step_row(const DeltaStepArgs& args, std::int64_t row, DeltaStepRates rates) {
    const std::int64_t d = args.grad.width;
    float* delta = args.delta + row * args.delta_stride;
    float* exp_avg = args.exp_avg + row * args.exp_avg_stride;
    float* exp_avg_sq = args.exp_avg_sq + row * args.exp_avg_sq_stride;
    const T* grad = static_cast<const T*>(args.grad.data) + row * args.grad.stride;
    const float radius = args.init_norm[row];

    double total = 0.0;
    for (std::int64_t first = 0; first < d; first += kBlock)
        total += squares(delta + first, d - first < kBlock ? d - first : kBlock);
    const float norm = static_cast<float>(__builtin_sqrt(total));
    // 0 / 0 at delta = 0 is the kink of the norm, where the original code's autograd gives 0.
    const float decay = norm > 0.0f ? static_cast<float>(args.weight_decay) / (radius * radius * norm) : 0.0f;
    const float rise1 = static_cast<float>(1.0 - args.beta1), rise2 = static_cast<float>(1.0 - args.beta2);
    const float beta2 = static_cast<float>(args.beta2), eps = static_cast<float>(args.eps);

    total = 0.0;
    float g[kBlock + 16], x[kBlock + 16], m[kBlock + 16], v[kBlock + 16];
    for (std::int64_t first = 0; first < d; first += kBlock) {
        const std::int64_t n = d - first < kBlock ? d - first : kBlock;
        const std::size_t bytes = static_cast<std::size_t>(n) * sizeof(float);
        widen_row(grad + first, g, n);
        widen_row(delta + first, x, n);
        widen_row(exp_avg + first, m, n);
        widen_row(exp_avg_sq + first, v, n);
        for (std::int64_t j = 0; j < n; j += kLanes) {
            const Vector old = load(x + j), gradient = load(g + j) + decay * old;
            const Vector mean = load(m + j) + rise1 * (gradient - load(m + j));
            const Vector square = beta2 * load(v + j) + rise2 * (gradient * gradient);
            store(m + j, mean);
            store(v + j, square);
            store(x + j, old - rates.step_size * mean / (root_of(square) / rates.root + eps));
        }
        total += squares(x, n);
        __builtin_memcpy(delta + first, x, bytes);
        __builtin_memcpy(exp_avg + first, m, bytes);
        __builtin_memcpy(exp_avg_sq + first, v, bytes);
    }
    const float reached = static_cast<float>(__builtin_sqrt(total));
    const float limit = static_cast<float>(args.clamp) * radius;
    if (!(reached > limit)) return;
    const float back = limit / reached;
    for (std::int64_t j = 0; j < d; ++j) delta[j] *= back;
}

}  // namespace

void delta_step_row(const DeltaStepArgs& args, std::int64_t row, DeltaStepRates rates) {
    switch (args.grad.type) {
        case RowType::kFloat32:
            return step_row<float>(args, row, rates);
        case RowType::kBFloat16:
            return step_row<BFloat16>(args, row, rates);
        case RowType::kFloat16:
            return step_row<Float16>(args, row, rates);
        case RowType::kFloat64:  // left to the eager default
            return;
    }
}

}  // namespace FASTEDIT_LEVEL
}  // namespace fastedit
