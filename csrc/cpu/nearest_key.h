// Nearest keys and dot products of queries with keys: what the driver and the per-level kernels share.
#pragma once

#include <cstdint>

#include "cpu/levels.h"

namespace fastedit {

enum class KeyRowType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct NearestKeyArgs {
    const float* q;  // [queries, d] without gaps
    std::int64_t queries, d;
    const void* keys;  // [count, d], unit stride along a key, keys `key_stride` elements apart
    KeyRowType key_type;
    std::int64_t key_stride, count;
    int threads;
};

// Queries are padded to a multiple of 16 numbers, which every level's vectors divide.
constexpr std::int64_t kNearestPad = 16;
// Keys of one task, at most.
constexpr std::int64_t kNearestKeys = 128;

enum class PairSum : int { kSquaredDifferences = 0, kProducts = 1 };

FASTEDIT_DECLARE_LEVELS(
    // sums[query * count + key] for `count` <= kNearestKeys keys from `first` on; q: [queries, padded d],
    // zeros behind d. Which sum a pair gets depends on the pair alone.
    void nearest_key_sums(const NearestKeyArgs& args, PairSum what, const float* q, std::int64_t queries,
                          std::int64_t first, std::int64_t count, float* sums);
    // squares[key] = ||key||^2.
    void nearest_key_squares(const NearestKeyArgs& args, std::int64_t first, std::int64_t count,
                             float* squares);)

// Per query the key at the least distance (the first of equals; -1 if none is finite), that distance, and the
// next.
void nearest_key(const NearestKeyArgs& args, std::int64_t* index, float* distance, float* second);

// Per query the k keys of greatest product, or cosine, best first, the first of equals first: [queries, k]
// each.
void topk_keys(const NearestKeyArgs& args, std::int64_t k, bool cosine, float* scores, std::int64_t* index);

}  // namespace fastedit
