// The k-th greatest magnitude and the masked write: what the driver and the per-level kernels share.
//
// Magnitudes are compared as integers: the bits of |x|, with every NaN as the one number above infinity.
#pragma once

#include <cstdint>

#include "cpu/levels.h"

namespace fastedit {

enum class MagnitudeType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// Candidates are counted in this many intervals at a time; half-precision magnitudes one by one.
constexpr int kMagnitudeBuckets = 2048, kMagnitudeHalves = 1 << 15;
// Elements of one task.
constexpr std::int64_t kMagnitudeTask = 1 << 16;

// One look at some numbers: those in [lo, hi] go to `inside` in their order and are counted by (number - lo)
// >> shift.
struct MagnitudeScan {
    std::uint64_t lo, hi;
    int shift;
    std::uint32_t* buckets;     // kMagnitudeBuckets, added to
    void* inside;               // as many as are looked at, of the width of the type
    std::int64_t above, count;  // results: numbers above hi, numbers in [lo, hi]
};

FASTEDIT_DECLARE_LEVELS(
    // x: n elements of a type of four or eight bytes, or what an earlier scan put inside: a number is its
    // own.
    void magnitude_scan(const void* x, MagnitudeType type, std::int64_t n, MagnitudeScan& scan);
    // counts: kMagnitudeHalves, added to; for the types of two bytes.
    void magnitude_count(const void* x, MagnitudeType type, std::int64_t n, std::uint32_t* counts);
    // How many of n numbers are `value`.
    std::int64_t magnitude_equal(const void* x, MagnitudeType type, std::int64_t n, std::uint64_t value);
    // Sets x[i] to zero where the number of score[i] is below `least`.
    void magnitude_zero(void* x, MagnitudeType type, const void* score, MagnitudeType score_type,
                        std::int64_t n, std::uint64_t least);)

// Writes the k-th largest of n magnitudes to `out`, of x's type; 1 <= k <= n.
void kth_magnitude(const void* x, MagnitudeType type, std::int64_t n, std::int64_t k, void* out, int threads);

// Sets all but the k entries of x with the largest numbers of score to zero; of equals the first ones stay,
// or all.
void magnitude_mask(void* x, MagnitudeType type, const void* score, MagnitudeType score_type, std::int64_t n,
                    std::int64_t k, bool all_ties, int threads);

}  // namespace fastedit
