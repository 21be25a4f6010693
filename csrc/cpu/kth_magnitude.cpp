// Driver of kth_magnitude. A sample of the numbers tells where the k-th one lies, up to a few per cent of
// them; one look at all of them counts what is above, and collects what is in that interval. Counting in 2048
// parts of it narrows the interval until it is a single number, in the collected ones alone where they fit.
// The sample decides how fast that is, never what comes out: where the k-th is not in the interval, the
// search starts with all numbers.

#include "cpu/kth_magnitude.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"

namespace fastedit {
namespace {

constexpr std::int64_t kSamples = 1 << 14;
constexpr std::int64_t kKept = 8;  // up to one in so many numbers is collected

std::int64_t width_of(MagnitudeType type) {
    switch (type) {
        case MagnitudeType::kFloat32:
            return 4;
        case MagnitudeType::kFloat64:
            return 8;
        case MagnitudeType::kBFloat16:
        case MagnitudeType::kFloat16:
            break;
    }
    return 2;
}

// The greatest number, that of NaN.
std::uint64_t greatest(MagnitudeType type) {
    switch (type) {
        case MagnitudeType::kFloat32:
            return 0x7f800001u;
        case MagnitudeType::kFloat64:
            return 0x7ff0000000000001u;
        case MagnitudeType::kBFloat16:
            return 0x7f81u;
        case MagnitudeType::kFloat16:
            break;
    }
    return 0x7c01u;
}

struct Found {
    std::uint64_t number;
    std::int64_t above, equal;  // how many are greater, how many are the same
};

std::int64_t tasks_of(std::int64_t n) {
    return (n + kMagnitudeTask - 1) / kMagnitudeTask;
}
std::int64_t length_of(std::int64_t n, std::int64_t task) {
    return std::min(kMagnitudeTask, n - task * kMagnitudeTask);
}

// The bucket with the k-th greatest: buckets are left with how many lie above it.
std::int64_t bucket_of(const std::vector<std::int64_t>& counts, std::int64_t k, std::int64_t& above) {
    std::int64_t bucket = static_cast<std::int64_t>(counts.size()) - 1;
    while (above + counts[bucket] < k) above += counts[bucket--];
    return bucket;
}

Found select_half(const void* x, MagnitudeType type, std::int64_t n, std::int64_t k, int threads) {
    const auto count = FASTEDIT_PICK(magnitude_count);
    const Buffer<std::uint32_t> counts(static_cast<std::size_t>(threads) * kMagnitudeHalves);
    std::memset(counts.get(), 0, static_cast<std::size_t>(threads) * kMagnitudeHalves * 4);
    std::vector<std::int64_t> total(kMagnitudeHalves);
    // 32-bit counts: parts of less than 2^32 elements.
    constexpr std::int64_t kPart = std::int64_t{1} << 31;
    for (std::int64_t start = 0; start < n; start += kPart) {
        const std::int64_t size = std::min(kPart, n - start);
        const char* part = static_cast<const char*>(x) + 2 * start;
        parallel_for(threads, tasks_of(size), [&](std::int64_t task, int worker) {
            count(part + 2 * task * kMagnitudeTask, type, length_of(size, task),
                  counts.get() + worker * kMagnitudeHalves);
        });
        for (int worker = 0; worker < threads; ++worker)
            for (int i = 0; i < kMagnitudeHalves; ++i) {
                total[i] += counts.get()[worker * kMagnitudeHalves + i];
                counts.get()[worker * kMagnitudeHalves + i] = 0;
            }
    }
    std::int64_t above = 0;
    const std::int64_t bucket = bucket_of(total, k, above);
    return {static_cast<std::uint64_t>(bucket), above, total[bucket]};
}

// The interval that a sample of n numbers, at even distances but for a jitter, lets one expect the k-th
// greatest in.
template <typename U>
void guess(const U* x, std::int64_t n, std::int64_t k, std::uint64_t most, std::uint64_t& lo,
           std::uint64_t& hi) {
    constexpr U kMask = static_cast<U>(~U{0}) >> 1;
    std::vector<U> sample(kSamples);
    const std::int64_t step = n / kSamples;
    for (std::int64_t i = 0; i < kSamples; ++i) {
        const std::uint64_t hash = (static_cast<std::uint64_t>(i) * 0x9e3779b97f4a7c15u) >> 32;
        const U size = x[i * step + static_cast<std::int64_t>(hash % step)] & kMask;
        sample[i] = std::min(size, static_cast<U>(most));
    }
    const double share = static_cast<double>(k) / static_cast<double>(n);
    const double spread = 4.0 * std::sqrt(kSamples * share * (1.0 - share)) + 4.0;
    const std::int64_t first = static_cast<std::int64_t>(share * kSamples - spread);
    const std::int64_t last = static_cast<std::int64_t>(share * kSamples + spread);
    const auto down = [](U a, U b) { return a > b; };
    lo = 0, hi = most;
    if (last < kSamples) {
        std::nth_element(sample.begin(), sample.begin() + last, sample.end(), down);
        lo = sample[last];
    }
    if (first >= 0) {
        const auto end = last < kSamples ? sample.begin() + last : sample.end();
        std::nth_element(sample.begin(), sample.begin() + first, end, down);
        hi = sample[first];
    }
}

Found select_wide(const void* x, MagnitudeType type, std::int64_t n, std::int64_t k, int threads) {
    const auto scan = FASTEDIT_PICK(magnitude_scan);
    const std::int64_t width = width_of(type);
    const std::uint64_t most = greatest(type);
    std::uint64_t lo = 0, hi = most;
    if (n >= 4 * kSamples) {
        if (type == MagnitudeType::kFloat64)
            guess(static_cast<const std::uint64_t*>(x), n, k, most, lo, hi);
        else
            guess(static_cast<const std::uint32_t*>(x), n, k, most, lo, hi);
    }
    const std::int64_t room = std::max(n / kKept, kMagnitudeTask);
    Buffer<char> kept[2] = {Buffer<char>(static_cast<std::size_t>(room * width)),
                            Buffer<char>(static_cast<std::size_t>(room * width))};
    const Buffer<char> scratch(static_cast<std::size_t>(threads * (kMagnitudeTask + 16) * width));
    const Buffer<std::uint32_t> buckets(static_cast<std::size_t>(threads) * kMagnitudeBuckets);
    const char* source = static_cast<const char*>(x);
    std::int64_t size = n, beyond = 0;  // numbers looked at; numbers above those, which are looked at no more
    for (int round = 0;; ++round) {
        int shift = 0;
        while ((hi - lo) >> shift >= kMagnitudeBuckets) ++shift;
        std::memset(buckets.get(), 0, static_cast<std::size_t>(threads) * kMagnitudeBuckets * 4);
        std::atomic<std::int64_t> above{beyond}, inside{0};
        std::vector<std::atomic<std::int64_t>> counts(kMagnitudeBuckets);
        char* const to = kept[round % 2].get();
        parallel_for(threads, tasks_of(size), [&](std::int64_t task, int worker) {
            std::uint32_t* own = buckets.get() + worker * kMagnitudeBuckets;
            char* found = scratch.get() + worker * (kMagnitudeTask + 16) * width;
            MagnitudeScan result{lo, hi, shift, own, found, 0, 0};
            scan(source + task * kMagnitudeTask * width, type, length_of(size, task), result);
            above += result.above;
            // In any order: only how many there are of each number matters.
            const std::int64_t at = inside.fetch_add(result.count);
            if (at + result.count <= room)
                std::memcpy(to + at * width, found, static_cast<std::size_t>(result.count * width));
            for (int i = 0; i < kMagnitudeBuckets; ++i)
                if (own[i]) counts[i] += own[i], own[i] = 0;
        });
        std::int64_t greater = above;
        if (k <= greater || k > greater + inside) {
            lo = 0, hi = most;  // the sample was not like the rest
            continue;
        }
        const std::vector<std::int64_t> total(counts.begin(), counts.end());
        if (inside <= room) {
            // What is above the interval is not among those kept.
            beyond = greater;
            source = to, size = inside;
        }
        const std::int64_t bucket = bucket_of(total, k, greater);
        const std::uint64_t base = lo + (static_cast<std::uint64_t>(bucket) << shift);
        if (shift == 0) return {base, greater, total[bucket]};
        hi = std::min(hi, base + (std::uint64_t{1} << shift) - 1), lo = base;
    }
}

Found select(const void* x, MagnitudeType type, std::int64_t n, std::int64_t k, int threads) {
    return width_of(type) == 2 ? select_half(x, type, n, k, threads) : select_wide(x, type, n, k, threads);
}

template <typename U>
void write(void* out, std::uint64_t number) {
    const U bits = static_cast<U>(number);
    std::memcpy(out, &bits, sizeof bits);
}

}  // namespace

void kth_magnitude(const void* x, MagnitudeType type, std::int64_t n, std::int64_t k, void* out,
                   int threads) {
    const Found found = select(x, type, n, k, std::max(threads, 1));
    // A NaN like torch's: quiet.
    const bool nan = found.number == greatest(type);
    switch (type) {
        case MagnitudeType::kFloat32:
            return write<std::uint32_t>(out, nan ? 0x7fc00000u : found.number);
        case MagnitudeType::kFloat64:
            return write<std::uint64_t>(out, nan ? 0x7ff8000000000000u : found.number);
        case MagnitudeType::kBFloat16:
            return write<std::uint16_t>(out, nan ? 0x7fc0u : found.number);
        case MagnitudeType::kFloat16:
            return write<std::uint16_t>(out, nan ? 0x7e00u : found.number);
    }
}

void magnitude_mask(void* x, MagnitudeType type, const void* score, MagnitudeType score_type, std::int64_t n,
                    std::int64_t k, bool all_ties, int threads) {
    if (n == 0) return;
    threads = std::max(threads, 1);
    const auto zero = FASTEDIT_PICK(magnitude_zero);
    const auto equal = FASTEDIT_PICK(magnitude_equal);
    const std::int64_t width = width_of(type), score_width = width_of(score_type);
    const char* scores = static_cast<const char*>(score);
    std::uint64_t number = greatest(score_type) + 1;  // k = 0: nothing reaches it
    std::int64_t end = n;                             // equals before it stay
    if (k > 0) {
        const Found found = select(score, score_type, n, k, threads);
        number = found.number;
        std::int64_t room = k - found.above;
        if (!all_ties && room < found.equal) {
            std::vector<std::int64_t> counts(static_cast<std::size_t>(tasks_of(n)));
            parallel_for(threads, tasks_of(n), [&](std::int64_t task, int) {
                counts[task] = equal(scores + task * kMagnitudeTask * score_width, score_type,
                                     length_of(n, task), number);
            });
            std::int64_t task = 0;
            while (counts[task] < room) room -= counts[task++];
            // The shortest beginning of this task with `room` equals, by bisection.
            std::int64_t low = 0, high = length_of(n, task);
            while (low < high) {
                const std::int64_t middle = (low + high) / 2;
                const char* from = scores + task * kMagnitudeTask * score_width;
                if (equal(from, score_type, middle, number) < room)
                    low = middle + 1;
                else
                    high = middle;
            }
            end = task * kMagnitudeTask + low;
        }
    }
    // A score that is x is read before it is written, element by element.
    parallel_for(threads, tasks_of(n), [&](std::int64_t task, int) {
        const std::int64_t first = task * kMagnitudeTask, last = first + length_of(n, task);
        const std::int64_t middle = std::min(std::max(end, first), last);
        char* at = static_cast<char*>(x);
        zero(at + first * width, type, scores + first * score_width, score_type, middle - first, number);
        zero(at + middle * width, type, scores + middle * score_width, score_type, last - middle, number + 1);
    });
}

}  // namespace fastedit
