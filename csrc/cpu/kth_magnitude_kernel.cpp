// The inner loops of kth_magnitude, compiled once per instruction-set level (see cpu/isa.h).

#include "cpu/kth_magnitude.h"

#include <cstdint>

#ifdef __AVX512F__
// GCC 12 warns of its own header, https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace fastedit {
namespace FASTEDIT_LEVEL {
namespace {

template <typename U>
struct Magnitude {
    U mask, nan;  // nan: the number of every NaN

    U operator()(U bits) const {
        const U size = bits & mask;
        return size < nan ? size : nan;
    }
};

template <typename U>
Magnitude<U> magnitude(U infinity) {
    return {static_cast<U>(static_cast<U>(~U{0}) >> 1), static_cast<U>(infinity + 1)};
}

Magnitude<std::uint16_t> magnitude16(MagnitudeType type) {
    return magnitude<std::uint16_t>(type == MagnitudeType::kBFloat16 ? 0x7f80 : 0x7c00);
}
Magnitude<std::uint32_t> magnitude32() {
    return magnitude<std::uint32_t>(0x7f800000u);
}
Magnitude<std::uint64_t> magnitude64() {
    return magnitude<std::uint64_t>(0x7ff0000000000000u);
}

#if defined(__AVX512F__)
struct Wide32 {
    typedef __m512i V;
    static constexpr int lanes = 16;
    static V set(std::uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
    static V least(V a, V b) { return _mm512_min_epu32(a, b); }
    static V minus(V a, V b) { return _mm512_sub_epi32(a, b); }
    static unsigned above(V a, V b) { return _mm512_cmpgt_epu32_mask(a, b); }
    static void put(std::uint32_t* to, unsigned where, V v) {
        _mm512_mask_compressstoreu_epi32(to, static_cast<__mmask16>(where), v);
    }
    static constexpr unsigned all = 0xffffu;
};
struct Wide64 {
    typedef __m512i V;
    static constexpr int lanes = 8;
    static V set(std::uint64_t v) { return _mm512_set1_epi64(static_cast<long long>(v)); }
    static V least(V a, V b) { return _mm512_min_epu64(a, b); }
    static V minus(V a, V b) { return _mm512_sub_epi64(a, b); }
    static unsigned above(V a, V b) { return _mm512_cmpgt_epu64_mask(a, b); }
    static void put(std::uint64_t* to, unsigned where, V v) {
        _mm512_mask_compressstoreu_epi64(to, static_cast<__mmask8>(where), v);
    }
    static constexpr unsigned all = 0xffu;
};
Wide32 wide(std::uint32_t) {
    return {};
}
Wide64 wide(std::uint64_t) {
    return {};
}
#endif

template <typename U>
void scan(const U* x, Magnitude<U> of, std::int64_t n, MagnitudeScan& result) {
    const U lo = static_cast<U>(result.lo), hi = static_cast<U>(result.hi), width = hi - lo;
    U* inside = static_cast<U*>(result.inside);
    std::int64_t i = 0, above = 0, count = 0;
#if defined(__AVX512F__)
    using W = decltype(wide(U{}));
    const typename W::V mask = W::set(of.mask), nan = W::set(of.nan), from = W::set(lo), to = W::set(hi),
                        range = W::set(width);
    for (; i + W::lanes <= n; i += W::lanes) {
        const typename W::V v = W::least(_mm512_and_si512(_mm512_loadu_si512(x + i), mask), nan);
        above += __builtin_popcount(W::above(v, to));
        // One unsigned comparison for both ends of the interval.
        const unsigned here = W::all & ~W::above(W::minus(v, from), range);
        if (here) W::put(inside + count, here, v);
        count += __builtin_popcount(here);
    }
#endif
    for (; i < n; ++i) {
        const U v = of(x[i]);
        above += v > hi;
        inside[count] = v;  // overwritten by the next one unless it counts
        count += static_cast<U>(v - lo) <= width;
    }
    for (std::int64_t j = 0; j < count; ++j) ++result.buckets[(inside[j] - lo) >> result.shift];
    result.above = above, result.count = count;
}

template <typename U>
std::int64_t equal(const U* x, Magnitude<U> of, std::int64_t n, std::uint64_t value) {
    const U wanted = static_cast<U>(value);
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < n; ++i) count += of(x[i]) == wanted;
    return count;
}

template <typename X, typename U>
void zero(X* x, const U* score, Magnitude<U> of, std::int64_t n, std::uint64_t least) {
    // `least` may be one more than the greatest number, which no type's width is exceeded by.
    const U from = static_cast<U>(least);
    if (static_cast<const void*>(x) == static_cast<const void*>(score)) {
        // One name for what is read and written, or the compiler cannot use vectors.
        U* const own = const_cast<U*>(score);
        for (std::int64_t i = 0; i < n; ++i) own[i] = of(own[i]) >= from ? own[i] : U{0};
        return;
    }
    for (std::int64_t i = 0; i < n; ++i) {
        const X value = x[i];
        x[i] = of(score[i]) >= from ? value : X{0};
    }
}

template <typename X>
void zero_by(X* x, const void* score, MagnitudeType type, std::int64_t n, std::uint64_t least) {
    switch (type) {
        case MagnitudeType::kFloat32:
            return zero(x, static_cast<const std::uint32_t*>(score), magnitude32(), n, least);
        case MagnitudeType::kFloat64:
            return zero(x, static_cast<const std::uint64_t*>(score), magnitude64(), n, least);
        case MagnitudeType::kBFloat16:
        case MagnitudeType::kFloat16:
            return zero(x, static_cast<const std::uint16_t*>(score), magnitude16(type), n, least);
    }
}

}  // namespace

void magnitude_scan(const void* x, MagnitudeType type, std::int64_t n, MagnitudeScan& result) {
    if (type == MagnitudeType::kFloat64)
        return scan(static_cast<const std::uint64_t*>(x), magnitude64(), n, result);
    scan(static_cast<const std::uint32_t*>(x), magnitude32(), n, result);
}

void magnitude_count(const void* x, MagnitudeType type, std::int64_t n, std::uint32_t* counts) {
    const std::uint16_t* bits = static_cast<const std::uint16_t*>(x);
    const Magnitude<std::uint16_t> of = magnitude16(type);
    for (std::int64_t i = 0; i < n; ++i) ++counts[of(bits[i])];
}

std::int64_t magnitude_equal(const void* x, MagnitudeType type, std::int64_t n, std::uint64_t value) {
    switch (type) {
        case MagnitudeType::kFloat32:
            return equal(static_cast<const std::uint32_t*>(x), magnitude32(), n, value);
        case MagnitudeType::kFloat64:
            return equal(static_cast<const std::uint64_t*>(x), magnitude64(), n, value);
        case MagnitudeType::kBFloat16:
        case MagnitudeType::kFloat16:
            return equal(static_cast<const std::uint16_t*>(x), magnitude16(type), n, value);
    }
    return 0;
}

void magnitude_zero(void* x, MagnitudeType type, const void* score, MagnitudeType score_type, std::int64_t n,
                    std::uint64_t least) {
    switch (type) {
        case MagnitudeType::kFloat32:
            return zero_by(static_cast<std::uint32_t*>(x), score, score_type, n, least);
        case MagnitudeType::kFloat64:
            return zero_by(static_cast<std::uint64_t*>(x), score, score_type, n, least);
        case MagnitudeType::kBFloat16:
        case MagnitudeType::kFloat16:
            return zero_by(static_cast<std::uint16_t*>(x), score, score_type, n, least);
    }
}

}  // namespace FASTEDIT_LEVEL
}  // namespace fastedit
