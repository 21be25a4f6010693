// The inner kernels of the symmetric product, compiled once per instruction-set level (see cpu/isa.h).
//
// Register tile: kRows x 3 vectors, the shape that keeps two FMA units busy with 16 (AVX2) or 32 (AVX-512)
// registers. A panel is 3 vectors wide and kRows divides its width, so rows of the tile are broadcast from a
// panel and columns are loaded from one: both operands have one packed format.

#include <cstdint>

#include "cpu/half.h"
#include "cpu/second_moment.h"

namespace fastedit {
namespace FASTEDIT_LEVEL {
namespace {

constexpr int kLanes = FASTEDIT_LANES;
constexpr int kRows = kLanes == 16 ? 8 : 4;
constexpr int kWidth = 3 * kLanes;
constexpr int kBlock = 192;  // scratch of 192^2 floats and two strips of 192 x kChunk fit a 512 KB L2
constexpr int kChunk = 128;  // tokens per pass: two panels of 24 x 128 floats fit a 32 KB L1
static_assert(kWidth % kRows == 0 && kBlock % kWidth == 0,
              "panels must split into tiles and blocks into panels");

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vector load(const float* from) {
    return *reinterpret_cast<const Unaligned*>(from);
}
inline void store(float* to, Vector value) {
    *reinterpret_cast<Unaligned*>(to) = value;
}

// Starting each pass from zero and adding it as a whole keeps every fp32 chain at kChunk terms.
// out[r][:] += sum_t left[t][r] * right[t][:]; left and right are [tokens][kWidth], out has rows of kBlock
// floats.
inline void tile(const float* left, const float* right, std::int64_t tokens, float* out) {
    Vector sum[kRows][3] = {};
    for (std::int64_t t = 0; t < tokens; ++t, left += kWidth, right += kWidth) {
        const Vector r0 = load(right), r1 = load(right + kLanes), r2 = load(right + 2 * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const Vector l = left[r] - Vector{};  // broadcast
            sum[r][0] += l * r0;
            sum[r][1] += l * r1;
            sum[r][2] += l * r2;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
        float* to = out + r * kBlock;
        store(to, load(to) + sum[r][0]);
        store(to + kLanes, load(to + kLanes) + sum[r][1]);
        store(to + 2 * kLanes, load(to + 2 * kLanes) + sum[r][2]);
    }
}

template <typename Key>
inline void widen_row(const Key* from, float* to, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}
#ifdef __F16C__
inline void widen_row(const Float16* from, float* to, std::int64_t n) {
    std::int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(to + i,
                         _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    for (; i < n; ++i) to[i] = widen(from[i]);
}
#endif

template <typename Key>
void pack(const SecondMomentArgs& args, const SecondMomentLayer& layer, std::int64_t first, std::int64_t from,
          std::int64_t to, const SecondMomentPanels& panels) {
    const Key* keys = static_cast<const Key*>(layer.keys);
    for (std::int64_t p = 0; p < panels.count; ++p) {
        const std::int64_t column = p * kWidth;
        const std::int64_t columns = args.d - column < kWidth ? args.d - column : kWidth;
        float* out = panels.panel(p) + from * kWidth;
        for (std::int64_t t = from; t < to; ++t, out += kWidth) {
            const std::int64_t row = args.rows ? args.rows[first + t] : first + t;
            const Key* key = keys + row * layer.key_stride + column;
            if (columns == kWidth) {  // a constant count lets the compiler unroll
                widen_row(key, out, kWidth);
            } else {
                widen_row(key, out, columns);
                for (std::int64_t i = columns; i < kWidth; ++i) out[i] = 0.0f;
            }
        }
    }
}

// Adds the block to the master, at and below the diagonal only.
template <typename Master>
void flush(const SecondMomentArgs& args, const SecondMomentLayer& layer, std::int64_t row,
           std::int64_t column, const float* scratch) {
    const std::int64_t rows = args.d - row < kBlock ? args.d - row : kBlock;
    const std::int64_t columns = args.d - column < kBlock ? args.d - column : kBlock;
    for (std::int64_t i = 0; i < rows; ++i) {
        Master* out = static_cast<Master*>(layer.master) + (row + i) * layer.master_stride + column;
        const float* sums = scratch + i * kBlock;
        const std::int64_t below = row + i - column + 1;
        const std::int64_t n = below < columns ? below : columns;
        for (std::int64_t j = 0; j < n; ++j) out[j] += static_cast<Master>(sums[j]);
    }
}

}  // namespace

int second_moment_panel_width() {
    return kWidth;
}
int second_moment_block_width() {
    return kBlock;
}

void second_moment_pack(const SecondMomentArgs& args, const SecondMomentLayer& layer, std::int64_t first,
                        std::int64_t from, std::int64_t to, const SecondMomentPanels& panels) {
    switch (args.key_type) {
        case KeyType::kFloat32:
            return pack<float>(args, layer, first, from, to, panels);
        case KeyType::kBFloat16:
            return pack<BFloat16>(args, layer, first, from, to, panels);
        case KeyType::kFloat16:
            return pack<Float16>(args, layer, first, from, to, panels);
    }
}

void second_moment_block(const SecondMomentArgs& args, const SecondMomentLayer& layer,
                         const SecondMomentPanels& panels, std::int64_t row, std::int64_t column,
                         float* scratch) {
    constexpr std::int64_t kPanels = kBlock / kWidth;
    const std::int64_t left_end = (row + 1) * kPanels < panels.count ? (row + 1) * kPanels : panels.count;
    const std::int64_t right_end =
        (column + 1) * kPanels < panels.count ? (column + 1) * kPanels : panels.count;
    __builtin_memset(scratch, 0, sizeof(float) * kBlock * kBlock);
    for (std::int64_t t = 0; t < panels.tokens; t += kChunk) {
        const std::int64_t tokens = panels.tokens - t < kChunk ? panels.tokens - t : kChunk;
        for (std::int64_t right = column * kPanels; right < right_end; ++right) {
            const float* columns = panels.panel(right) + t * kWidth;
            const std::int64_t left_begin = row * kPanels > right ? row * kPanels : right;
            for (std::int64_t left = left_begin; left < left_end; ++left) {
                const float* rows = panels.panel(left) + t * kWidth;
                float* out =
                    scratch + (left - row * kPanels) * kWidth * kBlock + (right - column * kPanels) * kWidth;
                for (int r = 0; r < kWidth; r += kRows) tile(rows + r, columns, tokens, out + r * kBlock);
            }
        }
    }
    if (args.master_type == MasterType::kFloat64)
        return flush<double>(args, layer, row * kBlock, column * kBlock, scratch);
    flush<float>(args, layer, row * kBlock, column * kBlock, scratch);
}

}  // namespace FASTEDIT_LEVEL
}  // namespace fastedit
