// Vectors of floats in the per-level kernels: sums over lanes, exponential and tanh, rows widened and
// narrowed.
//
// For csrc/cpu/<op>_kernel.cpp only, like cpu/half.h: everything is in an unnamed namespace of the level.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __AVX2__
// GCC 12 warns of its own header, https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "cpu/half.h"

namespace fastedit {
namespace FASTEDIT_LEVEL {
namespace {

constexpr int kLanes = FASTEDIT_LANES;

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef std::int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef std::uint16_t UnalignedHalves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

inline Vector load(const float* from) {
    return *reinterpret_cast<const Unaligned*>(from);
}
inline void store(float* to, Vector value) {
    *reinterpret_cast<Unaligned*>(to) = value;
}
inline Vector broadcast(float value) {
    return value - Vector{};
}
inline std::int64_t padded(std::int64_t n) {
    return (n + kLanes - 1) / kLanes * kLanes;
}

#if defined(__AVX512F__)
inline __m256 half_sum(__m512 v) {
    return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}
#endif
#ifdef __AVX2__
inline __m128 half_sum(__m256 v) {
    return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}
#endif

// to[i] = sum of the lanes of of[i], for i < 4.
inline void sum_lanes(const Vector* of, float* to) {
#if defined(__AVX512F__)
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(of[0], of[1]), _mm512_unpackhi_ps(of[0], of[1]));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(of[2], of[3]), _mm512_unpackhi_ps(of[2], of[3]));
    const __m512 sum = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    _mm_storeu_ps(to, half_sum(half_sum(sum)));
#elif defined(__AVX2__)
    __m256 folded[4];
    for (int i = 0; i < 4; ++i) {
        __m256 parts[kLanes / 8];
        __builtin_memcpy(parts, of + i, sizeof parts);
        folded[i] = kLanes == 16 ? _mm256_add_ps(parts[0], parts[kLanes / 8 - 1]) : parts[0];
    }
    const __m256 sum =
        _mm256_hadd_ps(_mm256_hadd_ps(folded[0], folded[1]), _mm256_hadd_ps(folded[2], folded[3]));
    _mm_storeu_ps(to, half_sum(sum));
#else
    for (int i = 0; i < 4; ++i) {
        float sum = 0.0f;
        for (int lane = 0; lane < kLanes; ++lane) sum += of[i][lane];
        to[i] = sum;
    }
#endif
}

inline float sum_of(Vector v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(v);
#else
    float sum = v[0];
    for (int lane = 1; lane < kLanes; ++lane) sum += v[lane];
    return sum;
#endif
}

inline float most_of(Vector v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(v);
#else
    float most = v[0];
    for (int lane = 1; lane < kLanes; ++lane) most = v[lane] > most ? v[lane] : most;
    return most;
#endif
}

// exp(x) = 2^n (1 + f) with |log(1 + f)| <= log(2) / 2, where the Taylor series to the eighth power is exact
// to 1e-9. x is in [-87, 88] or NaN.
struct Exponential {
    Vector power, f;

    explicit Exponential(Vector x) {
        // The sum with 1.5 * 2^23 has n in its low bits.
        const Vector shifted = x * 1.44269504f + 12582912.0f;
        const Vector n = shifted - 12582912.0f;
        const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
        Vector sum = r * (1.0f / 40320.0f) + 1.0f / 5040.0f;
        sum = sum * r + 1.0f / 720.0f;
        sum = sum * r + 1.0f / 120.0f;
        sum = sum * r + 1.0f / 24.0f;
        sum = sum * r + 1.0f / 6.0f;
        sum = sum * r + 0.5f;
        f = sum * r * r + r;
        power = reinterpret_cast<Vector>((reinterpret_cast<Words>(shifted) + 127u) << 23);
    }
};

// Below e^-87 it is 0; NaN stays NaN.
inline Vector exponential(Vector x) {
    x = x > 88.0f ? broadcast(88.0f) : x;
    const Exponential e(x < -87.0f ? broadcast(-87.0f) : x);
    return x < -87.0f ? Vector{} : e.f * e.power + e.power;
}

// From expm1(-2 |x|), so that small numbers keep their digits.
inline Vector tanh_of(Vector x) {
    Vector size = x < 0.0f ? -x : x;
    size = size > 20.0f ? broadcast(20.0f) : size;
    const Exponential e(-2.0f * size);
    const Vector less = e.f * e.power + (e.power - 1.0f);
    const Vector t = -less / (less + 2.0f);
    return x < 0.0f ? -t : t;
}

// Widens d numbers and pads them with zeros.
inline void widen_row(const BFloat16* from, float* to, std::int64_t d) {
    std::int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes) {
        const Halves bits = *reinterpret_cast<const UnalignedHalves*>(from + i);
        store(to + i, reinterpret_cast<Vector>(__builtin_convertvector(bits, Words) << 16));
    }
    for (; i < d; ++i) to[i] = widen(from[i]);
    for (; i < padded(d); ++i) to[i] = 0.0f;
}
inline void widen_row(const Float16* from, float* to, std::int64_t d) {
    std::int64_t i = 0;
#ifdef __F16C__
    for (; i + 8 <= d; i += 8)
        _mm256_storeu_ps(to + i,
                         _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
    for (; i < d; ++i) to[i] = widen(from[i]);
    for (; i < padded(d); ++i) to[i] = 0.0f;
}
inline void widen_row(const float* from, float* to, std::int64_t d) {
    __builtin_memcpy(to, from, static_cast<std::size_t>(d) * sizeof(float));
    for (std::int64_t i = d; i < padded(d); ++i) to[i] = 0.0f;
}

inline void narrow_row(const float* from, BFloat16* to, std::int64_t d) {
    std::int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes) {  // as narrow() of cpu/half.h
        const Vector value = load(from + i);
        const Words bits = reinterpret_cast<Words>(value);
        const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const Words result = value == value ? rounded : (bits >> 16) | 0x40u;
        *reinterpret_cast<UnalignedHalves*>(to + i) = __builtin_convertvector(result, Halves);
    }
    for (; i < d; ++i) narrow(from[i], to[i]);
}
inline void narrow_row(const float* from, Float16* to, std::int64_t d) {
    std::int64_t i = 0;
#ifdef __F16C__
    for (; i + 8 <= d; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < d; ++i) narrow(from[i], to[i]);
}

}  // namespace
}  // namespace FASTEDIT_LEVEL
}  // namespace fastedit
