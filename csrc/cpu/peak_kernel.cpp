// Multiply-adds in registers, compiled once per instruction-set level: sixteen chains hide the latency of two
// units, and each sum stays a number between 0 and 2.

#include <cstdint>

#include "cpu/peak.h"

namespace fastedit {
namespace FASTEDIT_LEVEL {
namespace {

constexpr int kBytes = 4 * FASTEDIT_LANES;
constexpr int kChains = FASTEDIT_LANES == 16 ? 16 : 12;  // of 32 or of 16 registers
constexpr std::int64_t kRounds = 200000;

template <typename Number>
double chains() {
    typedef Number Vector __attribute__((vector_size(kBytes)));
    Vector sum[kChains];
    Vector half = Vector{} + Number(0.5);
    for (int i = 0; i < kChains; ++i) sum[i] = Vector{} + Number(i) / kChains;
    for (std::int64_t round = 0; round < kRounds; ++round) {
#pragma GCC unroll 16
        for (int i = 0; i < kChains; ++i) sum[i] = sum[i] * half + half;
    }
    for (int i = 0; i < kChains; ++i) __asm__ volatile("" : : "m"(sum[i]));
    return 2.0 * kChains * (kBytes / sizeof(Number)) * kRounds;
}

}  // namespace

double peak_fma_f32() {
    return chains<float>();
}
double peak_fma_f64() {
    return chains<double>();
}

}  // namespace FASTEDIT_LEVEL
}  // namespace fastedit
