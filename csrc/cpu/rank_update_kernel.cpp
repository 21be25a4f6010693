// The inner kernels of the low-rank update, compiled once per instruction-set level (see cpu/isa.h).
//
// A register tile of kRows x 3 vectors is summed over the whole rank, then added to the widened weights and
// rounded: every weight is read and written once, whatever its type, and its wide copy never leaves the
// registers and the first-level cache.

#include <cstddef>
#include <cstdint>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "cpu/half.h"
#include "cpu/rank_update.h"

namespace fastedit {
namespace FASTEDIT_LEVEL {
namespace {

constexpr int kLanes = FASTEDIT_LANES;  // floats in a vector
constexpr int kRows = kLanes == 16 ? 8 : 4;
constexpr std::int64_t kPanelBytes = 24 * 1024;   // of one panel that stays in a 32 KB L1 under the row tiles
constexpr std::int64_t kBlockBytes = 192 * 1024;  // of the panels that stay in a 512 KB L2 between tasks
static_assert(kRankUpdateRows % kRows == 0, "a task must split into tiles");

template <typename T>
struct Simd {
    static constexpr int lanes = 4 * kLanes / static_cast<int>(sizeof(T));
    static constexpr int width = 3 * lanes;
    typedef T Vector __attribute__((vector_size(4 * kLanes)));
    typedef T Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

    static Vector load(const T* from) { return *reinterpret_cast<const Unaligned*>(from); }
    static void store(T* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }
};

// out[r][:] = sum_k left[k][r] * right[k][:]; left is [rank][kRows], right is [rank][width].
template <typename T>
inline void tile(const T* left, const T* right, std::int64_t rank, T* out) {
    using S = Simd<T>;
    typename S::Vector sum[kRows][3] = {};
    for (std::int64_t k = 0; k < rank; ++k, left += kRows, right += S::width) {
        const typename S::Vector r0 = S::load(right), r1 = S::load(right + S::lanes),
                                 r2 = S::load(right + 2 * S::lanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const typename S::Vector l = left[r] - typename S::Vector{};  // broadcast
            sum[r][0] += l * r0;
            sum[r][1] += l * r1;
            sum[r][2] += l * r2;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
        S::store(out + r * S::width, sum[r][0]);
        S::store(out + r * S::width + S::lanes, sum[r][1]);
        S::store(out + r * S::width + 2 * S::lanes, sum[r][2]);
    }
}

template <typename Weight, typename T>
inline void add_row(Weight* weight, const T* update, std::int64_t n) {
    for (std::int64_t j = 0; j < n; ++j) narrow(static_cast<T>(widen(weight[j])) + update[j], weight[j]);
}
#ifdef __AVX2__
// As narrow() of cpu/half.h; the compiler leaves the loop over it half scalar.
inline void add_row(BFloat16* weight, const float* update, std::int64_t n) {
    std::int64_t j = 0;
    for (; j + 8 <= n; j += 8) {
        __m128i* at = reinterpret_cast<__m128i*>(weight + j);
        const __m256i old = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(at)), 16);
        const __m256 sum = _mm256_add_ps(_mm256_castsi256_ps(old), _mm256_loadu_ps(update + j));
        const __m256i bits = _mm256_castps_si256(sum);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(sum, sum, _CMP_UNORD_Q));
        const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
        _mm_storeu_si128(at,
                         _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
    }
    for (; j < n; ++j) narrow(widen(weight[j]) + update[j], weight[j]);
}
#endif
#ifdef __F16C__
inline void add_row(Float16* weight, const float* update, std::int64_t n) {
    std::int64_t j = 0;
    for (; j + 8 <= n; j += 8) {
        __m128i* at = reinterpret_cast<__m128i*>(weight + j);
        const __m256 sum = _mm256_add_ps(_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_loadu_ps(update + j));
        _mm_storeu_si128(at, _mm256_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT));
    }
    for (; j < n; ++j) narrow(widen(weight[j]) + update[j], weight[j]);
}
#endif

// Sums the squares of what a row changed by and of what rounding kept from it, in lanes.
struct Norms {
    static constexpr int lanes = 8;
    double added[lanes] = {}, lost[lanes] = {};

    template <typename Weight, typename T>
    void add(const Weight* before, const Weight* after, const T* update, std::int64_t n) {
        std::int64_t j = 0;
        for (; j + lanes <= n; j += lanes) add_lanes(before + j, after + j, update + j, lanes);
        add_lanes(before + j, after + j, update + j, static_cast<int>(n - j));
    }

    template <typename Weight, typename T>
    inline __attribute__((always_inline)) void add_lanes(const Weight* before, const Weight* after,
                                                         const T* update, int n) {
        for (int lane = 0; lane < n; ++lane) {
            const double change = static_cast<double>(widen(after[lane])) - widen(before[lane]);
            const double rest = update[lane] - change;
            added[lane] += change * change;
            lost[lane] += rest * rest;
        }
    }
};

// As add_row, and measures.
template <typename Weight, typename T>
inline void add_row(Weight* weight, const T* update, std::int64_t n, Norms* norms) {
    Weight before[Simd<T>::width];
    __builtin_memcpy(before, weight, static_cast<std::size_t>(n) * sizeof(Weight));
    add_row(weight, update, n);
    norms->add(before, weight, update, n);
}

template <typename T>
void pack(const RankUpdateArgs& args, std::int64_t panel, T* out) {
    constexpr int width = Simd<T>::width;
    const std::int64_t column = panel * width;
    const std::int64_t columns = args.columns - column < width ? args.columns - column : width;
    const T* from = static_cast<const T*>(args.right) + column * args.right_stride[1];
    for (std::int64_t k = 0; k < args.rank; ++k, out += width) {
        const T* row = from + k * args.right_stride[0];
        for (std::int64_t j = 0; j < columns; ++j) out[j] = row[j * args.right_stride[1]];
        for (std::int64_t j = columns; j < width; ++j) out[j] = 0;
    }
}

// alpha left, as tiles of [rank][kRows], zero-padded at the bottom.
template <typename T>
void pack_left(const RankUpdateArgs& args, std::int64_t first, std::int64_t last, T* out) {
    const T alpha = static_cast<T>(args.alpha);
    const T* left = static_cast<const T*>(args.left);
    for (std::int64_t row = first; row < last; row += kRows, out += kRows * args.rank) {
        for (int r = 0; r < kRows; ++r) {
            const T* from = left + (row + r) * args.left_stride[0];
            for (std::int64_t k = 0; k < args.rank; ++k)
                out[k * kRows + r] = row + r < last ? alpha * from[k * args.left_stride[1]] : 0;
        }
    }
}

template <typename Weight, typename T>
void update(const RankUpdateArgs& args, std::int64_t first, std::int64_t last, const T* packed, T* left,
            double* norms) {
    constexpr int width = Simd<T>::width;
    const std::int64_t rank = args.rank, panels = (args.columns + width - 1) / width;
    const std::int64_t panel_bytes = rank * width * static_cast<std::int64_t>(sizeof(T));
    const std::int64_t block = kBlockBytes / panel_bytes > 1 ? kBlockBytes / panel_bytes : 1;
    // A few ranks are bound by memory: walk along rows of W, four or eight streams at a time. Many are bound
    // by arithmetic: keep a panel in L1 and walk down the rows of the task.
    const std::int64_t deep = panel_bytes * 8 > kPanelBytes ? kRankUpdateRows : kRows;
    pack_left(args, first, last, left);
    Weight* weight = static_cast<Weight*>(args.weight);
    T sums[kRows * width];
    Norms measured;
    for (std::int64_t begin = 0; begin < panels; begin += block) {
        const std::int64_t end = begin + block < panels ? begin + block : panels;
        for (std::int64_t strip = first; strip < last; strip += deep) {
            const std::int64_t strip_end = strip + deep < last ? strip + deep : last;
            for (std::int64_t p = begin; p < end; ++p) {
                const std::int64_t column = p * width;
                const std::int64_t columns = args.columns - column < width ? args.columns - column : width;
                for (std::int64_t row = strip; row < strip_end; row += kRows) {
                    const int rows = last - row < kRows ? static_cast<int>(last - row) : kRows;
                    Weight* at = weight + row * args.weight_stride + column;
                    for (int r = 0; r < rows; ++r)
                        __builtin_prefetch(at + r * args.weight_stride + (deep == kRows ? 256 : 0), 1);
                    tile(left + (row - first) * rank, packed + p * rank * width, rank, sums);
                    if (norms != nullptr) {
                        for (int r = 0; r < rows; ++r)
                            add_row(at + r * args.weight_stride, sums + r * width, columns, &measured);
                    } else if (columns == width) {  // a constant count lets the compiler unroll
                        for (int r = 0; r < rows; ++r)
                            add_row(at + r * args.weight_stride, sums + r * width, width);
                    } else {
                        for (int r = 0; r < rows; ++r)
                            add_row(at + r * args.weight_stride, sums + r * width, columns);
                    }
                }
            }
        }
    }
    if (norms == nullptr) return;
    norms[0] = norms[1] = 0.0;
    for (int lane = 0; lane < Norms::lanes; ++lane) {
        norms[0] += measured.added[lane];
        norms[1] += measured.lost[lane];
    }
}

}  // namespace

std::int64_t rank_update_width(FactorType type) {
    return type == FactorType::kFloat64 ? Simd<double>::width : Simd<float>::width;
}

void rank_update_pack(const RankUpdateArgs& args, std::int64_t panel, void* packed) {
    if (args.factor_type == FactorType::kFloat64) return pack(args, panel, static_cast<double*>(packed));
    pack(args, panel, static_cast<float*>(packed));
}

void rank_update_rows(const RankUpdateArgs& args, std::int64_t first, std::int64_t last, const void* packed,
                      void* scratch, double* norms) {
    if (args.factor_type == FactorType::kFloat64)
        return update<float>(args, first, last, static_cast<const double*>(packed),
                             static_cast<double*>(scratch), norms);
    const float* right = static_cast<const float*>(packed);
    float* left = static_cast<float*>(scratch);
    switch (args.weight_type) {
        case WeightType::kFloat32:
            return update<float>(args, first, last, right, left, norms);
        case WeightType::kBFloat16:
            return update<BFloat16>(args, first, last, right, left, norms);
        case WeightType::kFloat16:
            return update<Float16>(args, first, last, right, left, norms);
    }
}

}  // namespace FASTEDIT_LEVEL
}  // namespace fastedit
