// Tiles of bf16 planes: products, splitting, transposing. For csrc/cpu/target_loss_amx_kernel.cpp only.
#pragma once

#define FASTEDIT_LEVEL amx

#include <cstdint>

#include "cpu/target_loss_amx.h"
#include "cpu/vector.h"

namespace fastedit {
namespace amx {
namespace {

constexpr std::int64_t kTileBytes = 1024;
constexpr int kLinesAhead = 16;  // that are fetched with every step of the tiles

struct alignas(64) TileShapes {
    std::uint8_t palette = 1, start = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles are state of the thread, given back at the end of a task.
class UseTiles {
  public:
    UseTiles() {
        const TileShapes shapes;
        _tile_loadconfig(&shapes);
    }
    ~UseTiles() { _tile_release(); }
};

// Walks along the rows of the head that come next, a few cache lines at a time, so that they arrive in the L2
// cache while the tiles are at work.
struct Ahead {
    const char* row;
    std::int64_t row_bytes, stride, rows, at;

    void fetch() {
        for (int i = 0; i < kLinesAhead && rows > 0; ++i) {
            __builtin_prefetch(row + at, 0, 2);
            at += 64;
            if (at >= row_bytes) at = 0, row += stride, --rows;
        }
    }
};

// Tiles 0 to 3 += the products of two left and kRight right operands, plane by plane, over `steps` steps.
// left, right: the first step of the first plane of the first tile.
struct Operand {
    const char* data;
    std::int64_t tile, plane, step;  // bytes from one to the next

    const char* at(std::int64_t which, int of_plane, std::int64_t of_step) const {
        return data + which * tile + of_plane * plane + of_step * step;
    }
};

template <int kLeft, int kRight, int kLeftPlanes, int kRightPlanes>
inline void multiply(const Operand& left, const Operand& right, std::int64_t steps, Ahead& ahead) {
    for (std::int64_t s = 0; s < steps; ++s) {
        ahead.fetch();
        for (int i = 0; i < kLeftPlanes; ++i) {
            _tile_loadd(4, left.at(0, i, s), 64);
            if (kLeft == 2) {
                _tile_loadd(5, left.at(1, i, s), 64);
            }
            for (int j = 0; j < kRightPlanes && i + j < 3; ++j) {
                _tile_loadd(6, right.at(0, j, s), 64);
                if (kRight == 2) {
                    _tile_loadd(7, right.at(1, j, s), 64);
                }
                _tile_dpbf16ps(0, 4, 6);
                if (kRight == 2) {
                    _tile_dpbf16ps(1, 4, 7);
                }
                if (kLeft == 2) {
                    _tile_dpbf16ps(2, 5, 6);
                }
                if (kLeft == 2 && kRight == 2) {
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
        }
    }
}

inline __m512 widened(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// 32 numbers as planes of bf16.
template <int kPlanes>
inline void split(__m512 low, __m512 high, __m512i* planes) {
    for (int plane = 0; plane < kPlanes; ++plane) {
        planes[plane] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
        if (plane + 1 == kPlanes) return;
        low = _mm512_sub_ps(low, widened(_mm512_castsi512_si256(planes[plane])));
        high = _mm512_sub_ps(high, widened(_mm512_extracti64x4_epi64(planes[plane], 1)));
    }
}

template <int kPlanes>
inline void read(const BFloat16* from, __mmask32 there, __m512i* planes) {
    planes[0] = _mm512_maskz_loadu_epi16(there, from);
}
template <int kPlanes>
inline void read(const Float16* from, __mmask32 there, __m512i* planes) {
    const __m512i bits = _mm512_maskz_loadu_epi16(there, from);
    split<kPlanes>(_mm512_cvtph_ps(_mm512_castsi512_si256(bits)),
                   _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1)), planes);
}
template <int kPlanes>
inline void read(const float* from, __mmask32 there, __m512i* planes) {
    split<kPlanes>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(there), from),
                   _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> 16), from + 16), planes);
}

inline __mmask32 some_of(std::int64_t n) {
    return n >= 32 ? ~0u : n > 0 ? (1u << n) - 1u : 0u;
}

// to[j][i] = from[i][j] for 16 x 16 words, rows `from_stride` and `to_stride` words apart.
inline void transpose(const float* from, std::int64_t from_stride, float* to, std::int64_t to_stride) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * from_stride);
    // Of four rows each: words 4 l + c of row r become word 4 l + r of b[4 g + c].
    for (int g = 0; g < 16; g += 4) {
        const __m512d low0 = _mm512_castps_pd(_mm512_unpacklo_ps(a[g], a[g + 1]));
        const __m512d high0 = _mm512_castps_pd(_mm512_unpackhi_ps(a[g], a[g + 1]));
        const __m512d low1 = _mm512_castps_pd(_mm512_unpacklo_ps(a[g + 2], a[g + 3]));
        const __m512d high1 = _mm512_castps_pd(_mm512_unpackhi_ps(a[g + 2], a[g + 3]));
        b[g] = _mm512_castpd_ps(_mm512_unpacklo_pd(low0, low1));
        b[g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low0, low1));
        b[g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high0, high1));
        b[g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high0, high1));
    }
    for (int c = 0; c < 4; ++c) {
        const __m512 even0 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88);
        const __m512 odd0 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
        const __m512 even1 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
        const __m512 odd1 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
        _mm512_storeu_ps(to + c * to_stride, _mm512_shuffle_f32x4(even0, even1, 0x88));
        _mm512_storeu_ps(to + (8 + c) * to_stride, _mm512_shuffle_f32x4(even0, even1, 0xdd));
        _mm512_storeu_ps(to + (4 + c) * to_stride, _mm512_shuffle_f32x4(odd0, odd1, 0x88));
        _mm512_storeu_ps(to + (12 + c) * to_stride, _mm512_shuffle_f32x4(odd0, odd1, 0xdd));
    }
}

}  // namespace
}  // namespace amx
}  // namespace fastedit
