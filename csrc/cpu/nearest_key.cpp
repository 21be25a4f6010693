// Drivers of nearest_key and topk_keys. A task is a block of keys that all queries meet while it is in cache;
// what a block found is put together in the order of the blocks.

#include "cpu/nearest_key.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"

namespace fastedit {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int64_t kBlockNumbers = 1 << 16;  // of a block of keys: 256 KB in float32, for the L2 cache
constexpr std::int64_t kScores = std::int64_t{1} << 24;  // that are kept at a time: 64 MB

// The queries with zeros behind each up to the padded length.
void pad(const NearestKeyArgs& args, std::int64_t stride, float* padded) {
    std::memset(padded, 0, static_cast<std::size_t>(args.queries * stride) * sizeof(float));
    if (args.d == 0) return;  // the queries may then have no address
    for (std::int64_t r = 0; r < args.queries; ++r)
        std::memcpy(padded + r * stride, args.q + r * args.d,
                    static_cast<std::size_t>(args.d) * sizeof(float));
}

std::int64_t padded_length(const NearestKeyArgs& args) {
    return (args.d + kNearestPad - 1) / kNearestPad * kNearestPad;
}

std::int64_t block_of(const NearestKeyArgs& args) {
    const std::int64_t fit = kBlockNumbers / std::max<std::int64_t>(args.d, 1);
    return std::min(std::max<std::int64_t>(fit / 8 * 8, 8), kNearestKeys);
}

struct Least {
    float best = kInfinity, second = kInfinity;
    std::int64_t index = -1;

    // NaN and infinity are less than nothing.
    void see(float square, std::int64_t key) {
        if (square < best) {
            second = best, best = square, index = key;
        } else if (square < second) {
            second = square;
        }
    }
};

// A min-heap by this order has the worst score on top: the lower one, of equals the later key.
struct Scored {
    float score;
    std::int64_t index;

    bool operator<(const Scored& other) const {
        return score > other.score || (score == other.score && index < other.index);
    }
};

}  // namespace

void nearest_key(const NearestKeyArgs& args, std::int64_t* index, float* distance, float* second) {
    const auto sums = FASTEDIT_PICK(nearest_key_sums);
    const int threads = std::max(args.threads, 1);
    const std::int64_t stride = padded_length(args), block = block_of(args);
    const std::int64_t tasks = (args.count + block - 1) / block;
    const Buffer<float> q(static_cast<std::size_t>(args.queries * stride));
    pad(args, stride, q.get());
    const Buffer<float> scratch(static_cast<std::size_t>(threads * args.queries * block));
    std::vector<Least> found(static_cast<std::size_t>(tasks * args.queries));
    parallel_for(threads, tasks, [&](std::int64_t task, int worker) {
        const std::int64_t first = task * block, count = std::min(block, args.count - first);
        float* own = scratch.get() + worker * args.queries * block;
        sums(args, PairSum::kSquaredDifferences, q.get(), args.queries, first, count, own);
        for (std::int64_t r = 0; r < args.queries; ++r) {
            Least least;
            for (std::int64_t k = 0; k < count; ++k) least.see(own[r * count + k], first + k);
            found[task * args.queries + r] = least;
        }
    });
    for (std::int64_t r = 0; r < args.queries; ++r) {
        Least least;
        for (std::int64_t task = 0; task < tasks; ++task) {
            const Least& one = found[task * args.queries + r];
            least.see(one.best, one.index);
            least.see(one.second, one.index);
        }
        index[r] = least.index, distance[r] = std::sqrt(least.best), second[r] = std::sqrt(least.second);
    }
}

void topk_keys(const NearestKeyArgs& args, std::int64_t k, bool cosine, float* scores, std::int64_t* index) {
    const auto sums = FASTEDIT_PICK(nearest_key_sums);
    const auto squares = FASTEDIT_PICK(nearest_key_squares);
    const int threads = std::max(args.threads, 1);
    const std::int64_t stride = padded_length(args), block = block_of(args);
    const std::int64_t tasks = (args.count + block - 1) / block;
    const Buffer<float> q(static_cast<std::size_t>(args.queries * stride));
    pad(args, stride, q.get());
    const std::int64_t together = std::min(args.queries, std::max<std::int64_t>(kScores / args.count, 1));
    const Buffer<float> all(static_cast<std::size_t>(together * args.count));
    const Buffer<float> scratch(static_cast<std::size_t>(threads * (together + 1) * block));
    for (std::int64_t start = 0; start < args.queries; start += together) {
        const std::int64_t queries = std::min(together, args.queries - start);
        std::vector<float> own(static_cast<std::size_t>(queries), 1.0f);
        if (cosine)
            for (std::int64_t r = 0; r < queries; ++r) {
                const float* at = args.q + (start + r) * args.d;
                double square = 0.0;
                for (std::int64_t i = 0; i < args.d; ++i) square += static_cast<double>(at[i]) * at[i];
                own[r] = static_cast<float>(std::sqrt(square));
            }
        parallel_for(threads, tasks, [&](std::int64_t task, int worker) {
            const std::int64_t first = task * block, count = std::min(block, args.count - first);
            float* products = scratch.get() + worker * (together + 1) * block;
            float* norms = products + together * block;
            sums(args, PairSum::kProducts, q.get() + start * stride, queries, first, count, products);
            if (cosine) squares(args, first, count, norms);
            for (std::int64_t r = 0; r < queries; ++r)
                for (std::int64_t key = 0; key < count; ++key) {
                    float score = products[r * count + key];
                    if (cosine) {
                        // A zero vector's products are 0 and stay so. NaN is not above 0 either, but is its
                        // own score.
                        if (own[r] > 0.0f) score /= own[r];
                        if (norms[key] > 0.0f) score /= std::sqrt(norms[key]);
                    }
                    all.get()[r * args.count + first + key] = score == score ? score : -kInfinity;
                }
        });
        parallel_for(threads, queries, [&](std::int64_t r, int) {
            const float* row = all.get() + r * args.count;
            std::vector<Scored> heap;
            heap.reserve(static_cast<std::size_t>(k));
            for (std::int64_t key = 0; key < args.count; ++key) {
                if (static_cast<std::int64_t>(heap.size()) < k) {
                    heap.push_back({row[key], key});
                    std::push_heap(heap.begin(), heap.end());
                } else if (row[key] > heap.front().score) {  // a later key that is equal stays out
                    std::pop_heap(heap.begin(), heap.end());
                    heap.back() = {row[key], key};
                    std::push_heap(heap.begin(), heap.end());
                }
            }
            std::sort_heap(heap.begin(), heap.end());
            for (std::int64_t i = 0; i < k; ++i) {
                scores[(start + r) * k + i] = heap[i].score;
                index[(start + r) * k + i] = heap[i].index;
            }
        });
    }
}

}  // namespace fastedit
