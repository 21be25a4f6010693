// Rows of numbers as operands of tiles: planes of bf16 whose sum they are, pairs of rows side by side.
//
// For csrc/cpu/<op>_amx_kernel.cpp only: everything is in an unnamed namespace.
#pragma once

#include <cstdint>

#include "cpu/tiles.h"

namespace fastedit {
namespace amx {
namespace {

struct BFloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

// 32 keys as planes of bf16; a plane is what the ones before it leave of the key.
template <int kPlanes>
inline void split(__m512 low, __m512 high, __m512i* planes) {
    for (int plane = 0; plane < kPlanes; ++plane) {
        const __m512i bits = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
        planes[plane] = bits;
        if (plane + 1 == kPlanes) break;
        const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits));
        const __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits, 1));
        low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_slli_epi32(first, 16)));
        high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_slli_epi32(second, 16)));
    }
}

// `mask`: which of the 32 keys there are.
template <int kPlanes>
inline void load_keys(const BFloat16* keys, __mmask32 mask, __m512i* planes) {
    static_assert(kPlanes == 1, "bf16 keys are one plane");
    planes[0] = _mm512_maskz_loadu_epi16(mask, keys);
}
template <int kPlanes>
inline void load_keys(const Float16* keys, __mmask32 mask, __m512i* planes) {
    const __m512i bits = _mm512_maskz_loadu_epi16(mask, keys);
    split<kPlanes>(_mm512_cvtph_ps(_mm512_castsi512_si256(bits)),
                   _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1)), planes);
}
template <int kPlanes>
inline void load_keys(const float* keys, __mmask32 mask, __m512i* planes) {
    split<kPlanes>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), keys),
                   _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), keys + 16), planes);
}

// Pairs of tokens side by side: out[0] has columns 0 to 15, out[1] columns 16 to 31.
inline void interleave(__m512i even, __m512i odd, __m512i* out) {
    const __m512i low = _mm512_unpacklo_epi16(even, odd);
    const __m512i high = _mm512_unpackhi_epi16(even, odd);
    out[0] = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high);
    out[1] = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high);
}

// A left tile is a right one with its 16 x 16 words transposed.
inline void transpose(const char* from, char* to) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_load_si512(from + 64 * i);
    for (int i = 0; i < 8; ++i) {
        b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
        a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        _mm512_store_si512(to + 64 * i, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_store_si512(to + 64 * (i + 8), _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
        _mm512_store_si512(to + 64 * (i + 4), _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_store_si512(to + 64 * (i + 12), _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
}

}  // namespace
}  // namespace amx
}  // namespace fastedit
