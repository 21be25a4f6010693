// The inner products of the packed triangular solves, compiled once per instruction-set level (see
// cpu/isa.h).
//
// One right-hand side is bound by reading the factor: eight rows at a time, prefetched. Several are register
// tiles of kTile factor entries by up to kMost vectors of right-hand sides, over a strip of the factor that
// stays in the second-level cache for all of them.

#include <cstdint>

#include "cpu/packed_solve.h"

namespace fastedit {
namespace FASTEDIT_LEVEL {
namespace {

constexpr int kLanes = FASTEDIT_LANES / 2;  // doubles in a vector
constexpr int kMost = kLanes >= 8 ? 4 : 2;  // vectors of right-hand sides in a tile
constexpr std::int64_t kStrip = 24;         // rows of the factor that are in cache while the next are fetched
constexpr std::int64_t kAhead = 2048;       // doubles between what is read and what is prefetched
constexpr int kRows = 8;                    // rows at a time for one right-hand side

typedef double Vector __attribute__((vector_size(8 * kLanes)));
typedef double Unaligned __attribute__((vector_size(8 * kLanes), aligned(8), may_alias));

inline Vector load(const double* from) {
    return *reinterpret_cast<const Unaligned*>(from);
}
inline void store(double* to, Vector value) {
    *reinterpret_cast<Unaligned*>(to) = value;
}
inline Vector broadcast(double value) {
    return value - Vector{};
}

// Factor entries per tile: with `vectors` right-hand sides their sums fill the registers.
constexpr int tile_of(int vectors) {
    return vectors == 4 ? 6 : vectors == 3 ? 8 : kLanes >= 8 ? 8 : 4;
}

// out[t][:] = sum over k < depth of a[t * across + k * along] y[k n ..], for t < T; added to x times Sign.
template <int T, int V, int Sign>
inline void tile(const double* a, std::int64_t across, std::int64_t along, std::int64_t depth,
                 const double* y, double* x, std::int64_t n, const double* ahead, std::int64_t ahead_step) {
    Vector sum[T][V] = {};
    for (std::int64_t k = 0; k < depth; ++k) {
        __builtin_prefetch(ahead + k * ahead_step, 0, 2);
        Vector right[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) right[v] = load(y + k * n + v * kLanes);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const Vector left = broadcast(a[t * across + k * along]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[t][v] += left * right[v];
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            double* to = x + t * n + v * kLanes;
            store(to, Sign > 0 ? load(to) + sum[t][v] : load(to) - sum[t][v]);
        }
}

// x [tiles, n] +- the product of a strip with y [depth, n], one group of V vectors.
template <int V, int Sign>
inline void group(const double* a, std::int64_t across, std::int64_t along, std::int64_t tiles,
                  std::int64_t depth, const double* y, double* x, std::int64_t n, const double* ahead,
                  std::int64_t ahead_across, std::int64_t ahead_along) {
    constexpr int T = tile_of(V);
    std::int64_t t = 0;
    for (; t + T <= tiles; t += T)
        tile<T, V, Sign>(a + t * across, across, along, depth, y, x + t * n, n, ahead + t * ahead_across,
                         ahead_along);
    for (; t < tiles; ++t)
        tile<1, V, Sign>(a + t * across, across, along, depth, y, x + t * n, n, ahead + t * ahead_across,
                         ahead_along);
}

template <int Sign>
inline void strip(const double* a, std::int64_t across, std::int64_t along, std::int64_t tiles,
                  std::int64_t depth, const double* y, double* x, std::int64_t n, const double* ahead,
                  std::int64_t ahead_across, std::int64_t ahead_along) {
    std::int64_t v = 0;
    for (; v + kMost * kLanes <= n; v += kMost * kLanes)
        group<kMost, Sign>(a, across, along, tiles, depth, y + v, x + v, n, ahead, ahead_across, ahead_along);
    if (kMost > 3 && v + 3 * kLanes <= n) {
        group<3, Sign>(a, across, along, tiles, depth, y + v, x + v, n, ahead, ahead_across, ahead_along);
        v += 3 * kLanes;
    }
    if (kMost > 2 && v + 2 * kLanes <= n) {
        group<2, Sign>(a, across, along, tiles, depth, y + v, x + v, n, ahead, ahead_across, ahead_along);
        v += 2 * kLanes;
    }
    if (v + kLanes <= n)
        group<1, Sign>(a, across, along, tiles, depth, y + v, x + v, n, ahead, ahead_across, ahead_along);
}

inline double sum_of(Vector v) {
    double sum = v[0];
    for (int lane = 1; lane < kLanes; ++lane) sum += v[lane];
    return sum;
}

template <int R>
inline void subtract_rows(const double* a, std::int64_t depth, const double* y, double* x) {
    Vector sum[R] = {};
    std::int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
        const Vector right = load(y + k);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            if (kLanes >= 8 || k % 8 == 0) __builtin_prefetch(a + r * depth + k + kAhead, 0, 2);
            sum[r] += load(a + r * depth + k) * right;
        }
    }
    for (int r = 0; r < R; ++r) {
        double total = sum_of(sum[r]);
        for (std::int64_t i = k; i < depth; ++i) total += a[r * depth + i] * y[i];
        x[r] -= total;
    }
}

template <int R>
inline void add_rows(const double* a, std::int64_t depth, const double* x, double* z) {
    Vector left[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) left[r] = broadcast(x[r]);
    std::int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
        Vector sum = load(z + k);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            if (kLanes >= 8 || k % 8 == 0) __builtin_prefetch(a + r * depth + k + kAhead, 0, 2);
            sum += load(a + r * depth + k) * left[r];
        }
        store(z + k, sum);
    }
    for (; k < depth; ++k)
        for (int r = 0; r < R; ++r) z[k] += a[r * depth + k] * x[r];
}

}  // namespace

std::int64_t packed_solve_lanes() {
    return kLanes;
}

void packed_solve_subtract(const double* a, std::int64_t rows, std::int64_t depth, const double* y, double* x,
                           std::int64_t n) {
    std::int64_t row = 0;
    if (n == 1) {
        for (; row + kRows <= rows; row += kRows) subtract_rows<kRows>(a + row * depth, depth, y, x + row);
        for (; row < rows; ++row) subtract_rows<1>(a + row * depth, depth, y, x + row);
        return;
    }
    for (; row < rows; row += kStrip) {
        const std::int64_t here = rows - row < kStrip ? rows - row : kStrip;
        const double* at = a + row * depth;
        strip<-1>(at, depth, 1, here, depth, y, x + row * n, n, at + kStrip * depth, depth, 8);
    }
}

void packed_solve_add_transposed(const double* a, std::int64_t rows, std::int64_t depth, const double* x,
                                 double* z, std::int64_t n) {
    std::int64_t row = 0;
    if (n == 1) {
        for (; row + kRows <= rows; row += kRows) add_rows<kRows>(a + row * depth, depth, x + row, z);
        for (; row < rows; ++row) add_rows<1>(a + row * depth, depth, x + row, z);
        return;
    }
    for (; row < rows; row += kStrip) {
        const std::int64_t here = rows - row < kStrip ? rows - row : kStrip;
        const double* at = a + row * depth;
        strip<1>(at, 1, depth, depth, here, x + row * n, z, n, at + kStrip * depth, kStrip, 8);
    }
}

}  // namespace FASTEDIT_LEVEL
}  // namespace fastedit
