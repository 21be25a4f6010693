// The inner kernels of the products on AMX tiles (see cpu/lowrank_transform_amx.h).
//
// The weight is read once, 32 of its rows at a time, and split into planes on the way: with a few dozen rows
// to transform, reading it is most of the work. Its planes are left operands as they lie in memory.

// GCC 12 warns of its own header, https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>

#include "cpu/lowrank_transform_amx.h"

namespace fastedit {
namespace amx {
namespace {

constexpr int kPlanes = kProductPlanes;
// Steps whose right operands, up to 9 KB each, stay in the L2 cache while the weight passes.
constexpr std::int64_t kSteps = 96;

struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// 32 numbers as three planes of bf16, exactly: a plane is the first 8 bits of what the ones before it leave.
// Number k lies beside number k + 16. Any order will do, as long as weights and rows share it, and this one
// takes two instructions.
inline __attribute__((always_inline)) void split(__m512 low, __m512 high, __m512i* planes) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    for (int plane = 0; plane < kPlanes; ++plane) {
        const __m512i l = _mm512_castps_si512(low), h = _mm512_castps_si512(high);
        // (h & upper) | (l >> 16)
        planes[plane] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(l, 16), h, upper, 0xf8);
        if (plane + 1 == kPlanes) break;
        low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_and_si512(l, upper)));
        high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_and_si512(h, upper)));
    }
}

inline void load_split(const float* from, std::int64_t count, __m512i* planes) {
    if (count >= 32) return split(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16), planes);
    const std::uint32_t mask = (1u << count) - 1;
    split(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from),
          _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), from + 16), planes);
}

// left: [2][kPlanes] tiles of 16 rows of the weight by 32 along the depth.
struct alignas(64) Left {
    char tile[2][kPlanes][kProductTileBytes];
};

// Splits rows [first, last) of 32 rows of the weight, of which there are `rows`, at one step along the depth.
inline __attribute__((always_inline)) void load_left(const float* weight, std::int64_t stride,
                                                     std::int64_t rows, std::int64_t count, int first,
                                                     int last, Left& left) {
    for (int row = first; row < last && row < rows; ++row) {
        const float* from = weight + row * stride;
        __m512i planes[kPlanes];
        load_split(from, count, planes);
        // One step further: with rows to come from 32 places, more than that leaves the first-level cache
        // before it is used.
        _mm_prefetch(reinterpret_cast<const char*>(from + 32), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(from + 48), _MM_HINT_T0);
        for (int plane = 0; plane < kPlanes; ++plane)
            _mm512_store_si512(left.tile[row / 16][plane] + row % 16 * 64, planes[plane]);
    }
    // The intrinsics that load tiles do not tell GCC 12 that they read memory.
    __asm__ volatile("" ::: "memory");
}

// One product of planes, of both halves of the 32 weight rows with every tile of rows. Tiles 0 to 2 are sums
// of the first half, 3 to 5 of the second.
template <int kTiles>
inline __attribute__((always_inline)) void pair(const Left& left, int p, const char* right, int q) {
    constexpr std::int64_t next = kPlanes * kProductTileBytes;
    right += q * kProductTileBytes;
    _tile_loadd(6, left.tile[0][p], 64);
    _tile_loadd(7, right, 64);
    _tile_dpbf16ps(0, 6, 7);
    if (kTiles > 1) {
        _tile_loadd(7, right + next, 64);
        _tile_dpbf16ps(1, 6, 7);
    }
    if (kTiles > 2) {
        _tile_loadd(7, right + 2 * next, 64);
        _tile_dpbf16ps(2, 6, 7);
    }
    _tile_loadd(6, left.tile[1][p], 64);
    if (kTiles > 2) {
        _tile_dpbf16ps(5, 6, 7);
        _tile_loadd(7, right + next, 64);
    }
    if (kTiles > 1) {
        _tile_dpbf16ps(4, 6, 7);
        _tile_loadd(7, right, 64);
    }
    _tile_dpbf16ps(3, 6, 7);
}

inline void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
}

// sums: [2][kProductTiles] tiles of 16 weight rows by 16 rows.
template <int kTiles>
inline void block(const float* weight, const ProductArgs& args, std::int64_t rows, const ProductPanel& panel,
                  std::int64_t first, std::int64_t last, float* sums) {
    if (first == 0) {
        clear();
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(3, sums + 768, 64);
        if (kTiles > 1) {
            _tile_loadd(1, sums + 256, 64);
            _tile_loadd(4, sums + 1024, 64);
        }
        if (kTiles > 2) {
            _tile_loadd(2, sums + 512, 64);
            _tile_loadd(5, sums + 1280, 64);
        }
    }
    Left left[2];
    if (rows < 32) __builtin_memset(left, 0, sizeof left);
    const float* from = weight + first * kProductDepth;
    load_left(from, args.weight_stride, rows, args.depth - first * kProductDepth, 0, 32, left[first & 1]);
    for (std::int64_t step = first; step < last; ++step) {
        const Left& now = left[step & 1];
        Left& then = left[~step & 1];
        const char* right = panel.step(step);
        // The next step is split a few rows at a time between products, so that both are in flight at once.
        const std::int64_t count = step + 1 < last ? args.depth - (step + 1) * kProductDepth : 0;
        const std::int64_t next = count > 0 ? rows : 0;
        from += kProductDepth;
        // The smallest products first.
        pair<kTiles>(now, 2, right, 0);
        load_left(from, args.weight_stride, next, count, 0, 6, then);
        pair<kTiles>(now, 1, right, 1);
        load_left(from, args.weight_stride, next, count, 6, 12, then);
        pair<kTiles>(now, 0, right, 2);
        load_left(from, args.weight_stride, next, count, 12, 17, then);
        pair<kTiles>(now, 1, right, 0);
        load_left(from, args.weight_stride, next, count, 17, 22, then);
        pair<kTiles>(now, 0, right, 1);
        load_left(from, args.weight_stride, next, count, 22, 27, then);
        pair<kTiles>(now, 0, right, 0);
        load_left(from, args.weight_stride, next, count, 27, 32, then);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(3, sums + 768, 64);
    if (kTiles > 1) {
        _tile_stored(1, sums + 256, 64);
        _tile_stored(4, sums + 1024, 64);
    }
    if (kTiles > 2) {
        _tile_stored(2, sums + 512, 64);
        _tile_stored(5, sums + 1280, 64);
    }
}

template <int kTiles>
void task(const ProductArgs& args, const ProductPanel& panel, std::int64_t first, std::int64_t last,
          float* sums) {
    constexpr std::int64_t kSums = 2 * kProductTiles * 256;
    for (std::int64_t step = 0; step < panel.steps; step += kSteps) {
        const std::int64_t end = step + kSteps < panel.steps ? step + kSteps : panel.steps;
        for (std::int64_t output = first; output < last; output += 32)
            block<kTiles>(args.weight + output * args.weight_stride, args,
                          last - output < 32 ? last - output : 32, panel, step, end,
                          sums + (output - first) / 32 * kSums);
    }
    const std::int64_t rows = args.n - panel.first < 16 * kTiles ? args.n - panel.first : 16 * kTiles;
    const __m512i down =
        _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
    for (std::int64_t output = first; output < last; output += 16) {
        const std::int64_t at = output - first;
        const __mmask16 mask =
            static_cast<__mmask16>(last - output < 16 ? (1 << (last - output)) - 1 : 0xffff);
        const float* tiles = sums + at / 32 * kSums + at % 32 / 16 * kProductTiles * 256;
        float* out = args.out + panel.first * args.out_stride + output;
        for (std::int64_t row = 0; row < rows; ++row, out += args.out_stride)
            _mm512_mask_storeu_ps(out, mask, _mm512_i32gather_ps(down, tiles + row / 16 * 256 + row % 16, 4));
    }
}

}  // namespace

void lowrank_product_pack(const ProductArgs& args, const ProductPanel& panel, std::int64_t step) {
    const __m512i column = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(16));
    const std::int64_t k = step * kProductDepth;
    char* out = panel.step(step);
    for (std::int64_t row = 0; row < 16 * panel.tiles; ++row) {
        __m512i planes[kPlanes] = {};
        if (panel.first + row < args.n)
            load_split(args.rows + (panel.first + row) * args.row_stride + k, args.depth - k, planes);
        char* tile = out + row / 16 * kPlanes * kProductTileBytes + row % 16 * 4;
        for (int plane = 0; plane < kPlanes; ++plane)
            _mm512_i32scatter_epi32(tile + plane * kProductTileBytes, column, planes[plane], 4);
    }
}

void lowrank_product_task(const ProductArgs& args, const ProductPanel& panel, std::int64_t first,
                          std::int64_t last, float* sums) {
    const TileConfig config;
    _tile_loadconfig(&config);
    if (panel.tiles == 1) task<1>(args, panel, first, last, sums);
    if (panel.tiles == 2) task<2>(args, panel, first, last, sums);
    if (panel.tiles == 3) task<3>(args, panel, first, last, sums);
    _tile_release();
}

}  // namespace amx
}  // namespace fastedit
