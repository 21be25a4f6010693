// Driver of target_loss: rows in blocks, and for each the vocabulary in parts that are put together in their
// order.

#include "cpu/target_loss_amx.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"

namespace fastedit {

#ifdef FASTEDIT_AMX
namespace {

constexpr std::int64_t kPart = 4096, kMostParts = 16;

struct Part {
    TargetLossSums sums;
    std::int64_t first, last;
};

// Adds the parts of a block up and writes them to their places of the result.
void put_together(const TargetLossArgs& args, const TargetLossBlock& block, const std::vector<Part>& parts,
                  const TargetLossSums& out) {
    const std::int64_t width = target_loss_width(args), d = args.d;
    std::vector<double> scale(parts.size()), shift(parts.size());
    const auto weigh = [&](std::int64_t r) {
        float peak = std::numeric_limits<float>::lowest();
        for (const Part& part : parts) peak = std::max(peak, part.sums.peak[r]);
        for (std::size_t p = 0; p < parts.size(); ++p) {
            shift[p] = static_cast<double>(peak) - parts[p].sums.peak[r];
            scale[p] = std::exp(-shift[p]);
        }
        return peak;
    };
    for (std::int64_t r = 0; r < block.rows; ++r) {
        const std::int64_t row = block.first + r, target = args.targets[row];
        out.peak[row] = weigh(r), out.picked[row] = 0.0f;
        double total = 0.0;
        for (std::size_t p = 0; p < parts.size(); ++p) {
            total += scale[p] * parts[p].sums.total[r];
            if (parts[p].first <= target && target < parts[p].last) out.picked[row] = parts[p].sums.picked[r];
        }
        out.total[row] = static_cast<float>(total);
        if (!args.with_grad || d == 0) continue;  // of width 0 there is nothing to write, perhaps nowhere to
        float* to = out.pulls + row * d;
        std::memset(to, 0, static_cast<std::size_t>(d) * sizeof(float));
        for (std::size_t p = 0; p < parts.size(); ++p) {
            const float* from = parts[p].sums.pulls + r * width;
            const float factor = static_cast<float>(scale[p]);
            for (std::int64_t i = 0; i < d; ++i) to[i] += factor * from[i];
        }
    }
    for (std::int64_t q = 0; q < block.kl_count; ++q) {
        const std::int64_t r = block.kl_place[q], at = block.kl[q];
        weigh(r);
        double gap = 0.0;
        for (std::size_t p = 0; p < parts.size(); ++p)
            gap += scale[p] * (parts[p].sums.gap[q] - shift[p] * parts[p].sums.total[r]);
        out.gap[at] = static_cast<float>(gap);
        if (!args.with_grad || d == 0) continue;  // of width 0 there is nothing to write, perhaps nowhere to
        float* to = out.pulls + (args.rows + at) * d;
        std::memset(to, 0, static_cast<std::size_t>(d) * sizeof(float));
        for (std::size_t p = 0; p < parts.size(); ++p) {
            const float* from = parts[p].sums.pulls + (block.rows + q) * width;
            const float* own = parts[p].sums.pulls + r * width;
            const float factor = static_cast<float>(scale[p]), less = static_cast<float>(shift[p]);
            for (std::int64_t i = 0; i < d; ++i) to[i] += factor * (from[i] - less * own[i]);
        }
    }
}

}  // namespace

void target_loss(const TargetLossArgs& args, const TargetLossSums& out) {
    if (current_level() != Level::kAmx)
        throw std::runtime_error("target_loss needs the instruction-set level amx");
    const std::int64_t width = target_loss_width(args);
    // Parts are a matter of the vocabulary alone, so results do not depend on the number of threads.
    const std::int64_t count = std::min(std::max<std::int64_t>(args.vocabulary / kPart, 1), kMostParts);
    const std::int64_t steps = (args.vocabulary + kTargetStep - 1) / kTargetStep;
    for (std::int64_t first = 0; first < args.rows; first += kTargetRows) {
        TargetLossBlock block{first, std::min(kTargetRows, args.rows - first), nullptr, nullptr, 0, nullptr};
        std::vector<std::int64_t> kl, place;
        for (std::int64_t q = 0; q < args.kl; ++q) {
            const std::int64_t r = args.kl_rows[q] - first;
            if (0 <= r && r < block.rows) kl.push_back(q), place.push_back(r);
        }
        block.kl = kl.data(), block.kl_place = place.data();
        block.kl_count = static_cast<std::int64_t>(kl.size());
        const Buffer<char> packed(
            static_cast<std::size_t>(target_loss_planes(args.hidden_type) * block.padded() * width * 2));
        amx::target_loss_pack(args, block.first, block.rows, packed.get());
        block.packed = packed.get();

        const std::int64_t numbers = 3 * block.padded() + (block.kl_count + 15) / 16 * 16;
        const std::int64_t size = numbers + (args.with_grad ? block.pulled() * width : 0);
        const Buffer<float> state(static_cast<std::size_t>(count * size));
        const std::int64_t scratch_size = amx::target_loss_scratch(args, block);
        const int threads = std::max(args.threads, 1);
        const Buffer<char> scratch(static_cast<std::size_t>(threads * scratch_size));
        std::vector<Part> parts(static_cast<std::size_t>(count));
        for (std::int64_t p = 0; p < count; ++p) {
            float* at = state.get() + p * size;
            const std::int64_t rows = block.padded();
            parts[p] = {{at, at + rows, at + 2 * rows, at + 3 * rows, at + numbers},
                        steps * p / count * kTargetStep,
                        std::min(steps * (p + 1) / count * kTargetStep, args.vocabulary)};
        }
        parallel_for(threads, count, [&](std::int64_t p, int worker) {
            amx::target_loss_part(args, block, parts[p].first, parts[p].last, parts[p].sums,
                                  scratch.get() + worker * scratch_size);
        });
        put_together(args, block, parts, out);
    }
}
#else
void target_loss(const TargetLossArgs&, const TargetLossSums&) {
    throw std::runtime_error("target_loss needs the instruction-set level amx, which this build has not");
}
#endif

}  // namespace fastedit
