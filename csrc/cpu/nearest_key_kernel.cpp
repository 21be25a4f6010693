// Sums over pairs of queries and keys, compiled once per instruction-set level (see cpu/isa.h).
//
// A tile is eight pairs, each with one vector of partial sums that runs along d from front to back: enough
// chains to keep the units busy, and the same order of additions for a pair in whatever tile it is.

#include "cpu/nearest_key.h"

#include <cstdint>

#include "cpu/vector.h"

namespace fastedit {
namespace FASTEDIT_LEVEL {
namespace {

inline Vector take(const float* from) {
    return load(from);
}
inline Vector take(const BFloat16* from) {
    const Halves bits = *reinterpret_cast<const UnalignedHalves*>(from);
    return reinterpret_cast<Vector>(__builtin_convertvector(bits, Words) << 16);
}
inline Vector take(const Float16* from) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
    float wide[kLanes];
    widen_row(from, wide, kLanes);
    return load(wide);
#endif
}

// The last, partial vector of a key.
template <typename Key>
inline Vector take_some(const Key* from, std::int64_t n) {
    float wide[kLanes] = {};
    for (std::int64_t i = 0; i < n; ++i) wide[i] = widen(from[i]);
    return load(wide);
}

template <bool kDifferences>
inline void add(Vector& sum, Vector q, Vector key) {
    if (kDifferences) {
        const Vector gap = q - key;
        sum += gap * gap;
    } else {
        sum += q * key;
    }
}

template <int kQueries, int kKeys, bool kDifferences, typename Key>
inline void tile(const float* q, std::int64_t q_stride, const Key* const* keys, std::int64_t d, float* sums,
                 std::int64_t stride) {
    Vector sum[kKeys][kQueries] = {};
    std::int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes) {
        Vector key[kKeys];
#pragma GCC unroll 8
        for (int k = 0; k < kKeys; ++k) key[k] = take(keys[k] + i);
#pragma GCC unroll 8
        for (int r = 0; r < kQueries; ++r) {
            const Vector query = load(q + r * q_stride + i);
#pragma GCC unroll 8
            for (int k = 0; k < kKeys; ++k) add<kDifferences>(sum[k][r], query, key[k]);
        }
    }
    if (i < d) {
        for (int k = 0; k < kKeys; ++k) {
            const Vector key = take_some(keys[k] + i, d - i);
            for (int r = 0; r < kQueries; ++r) add<kDifferences>(sum[k][r], load(q + r * q_stride + i), key);
        }
    }
    Vector all[8];
    for (int k = 0; k < kKeys; ++k)
        for (int r = 0; r < kQueries; ++r) all[r * kKeys + k] = sum[k][r];
    float out[8];
    sum_lanes(all, out), sum_lanes(all + 4, out + 4);
    for (int r = 0; r < kQueries; ++r)
        for (int k = 0; k < kKeys; ++k) sums[r * stride + k] = out[r * kKeys + k];
}

template <int kQueries, bool kDifferences, typename Key>
void rows(const NearestKeyArgs& args, const float* q, std::int64_t q_stride, const Key* keys,
          std::int64_t count, float* sums) {
    constexpr int kKeys = 8 / kQueries;
    for (std::int64_t first = 0; first < count; first += kKeys) {
        const Key* at[kKeys];
        if (first + kKeys <= count) {
            for (int k = 0; k < kKeys; ++k) at[k] = keys + (first + k) * args.key_stride;
            tile<kQueries, kKeys, kDifferences>(q, q_stride, at, args.d, sums + first, count);
            continue;
        }
        // The last keys, the last of them several times.
        float some[kQueries * kKeys];
        for (int k = 0; k < kKeys; ++k) {
            const std::int64_t key = first + k < count ? first + k : count - 1;
            at[k] = keys + key * args.key_stride;
        }
        tile<kQueries, kKeys, kDifferences>(q, q_stride, at, args.d, some, kKeys);
        for (int r = 0; r < kQueries; ++r)
            for (std::int64_t k = 0; first + k < count; ++k)
                sums[r * count + first + k] = some[r * kKeys + k];
    }
}

template <bool kDifferences, typename Key>
void all_sums(const NearestKeyArgs& args, const float* q, std::int64_t queries, const Key* keys,
              std::int64_t count, float* sums) {
    const std::int64_t stride = (args.d + kNearestPad - 1) / kNearestPad * kNearestPad;
    std::int64_t r = 0;
    for (; r + 4 <= queries; r += 4)
        rows<4, kDifferences>(args, q + r * stride, stride, keys, count, sums + r * count);
    for (; r + 2 <= queries; r += 2)
        rows<2, kDifferences>(args, q + r * stride, stride, keys, count, sums + r * count);
    if (r < queries) rows<1, kDifferences>(args, q + r * stride, stride, keys, count, sums + r * count);
}

template <typename Key>
void sums_of(const NearestKeyArgs& args, PairSum what, const float* q, std::int64_t queries,
             std::int64_t first, std::int64_t count, float* sums) {
    const Key* keys = static_cast<const Key*>(args.keys) + first * args.key_stride;
    if (what == PairSum::kSquaredDifferences) return all_sums<true>(args, q, queries, keys, count, sums);
    all_sums<false>(args, q, queries, keys, count, sums);
}

template <typename Key>
void squares_of(const NearestKeyArgs& args, std::int64_t first, std::int64_t count, float* squares) {
    const Key* keys = static_cast<const Key*>(args.keys) + first * args.key_stride;
    for (std::int64_t k = 0; k < count; ++k) {
        const Key* key = keys + k * args.key_stride;
        Vector sum[4] = {};
        std::int64_t i = 0;
        for (; i + 4 * kLanes <= args.d; i += 4 * kLanes)
            for (int j = 0; j < 4; ++j) {
                const Vector some = take(key + i + j * kLanes);
                sum[j] += some * some;
            }
        for (; i < args.d; i += kLanes) {
            const Vector some = take_some(key + i, args.d - i < kLanes ? args.d - i : kLanes);
            sum[0] += some * some;
        }
        squares[k] = sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
}

}  // namespace

void nearest_key_sums(const NearestKeyArgs& args, PairSum what, const float* q, std::int64_t queries,
                      std::int64_t first, std::int64_t count, float* sums) {
    switch (args.key_type) {
        case KeyRowType::kFloat32:
            return sums_of<float>(args, what, q, queries, first, count, sums);
        case KeyRowType::kBFloat16:
            return sums_of<BFloat16>(args, what, q, queries, first, count, sums);
        case KeyRowType::kFloat16:
            return sums_of<Float16>(args, what, q, queries, first, count, sums);
    }
}

void nearest_key_squares(const NearestKeyArgs& args, std::int64_t first, std::int64_t count, float* squares) {
    switch (args.key_type) {
        case KeyRowType::kFloat32:
            return squares_of<float>(args, first, count, squares);
        case KeyRowType::kBFloat16:
            return squares_of<BFloat16>(args, first, count, squares);
        case KeyRowType::kFloat16:
            return squares_of<Float16>(args, first, count, squares);
    }
}

}  // namespace FASTEDIT_LEVEL
}  // namespace fastedit
