// What happens between the two products of a chunk: bias, cap, online soft-max, and its weights as tiles. For
// csrc/cpu/target_loss_amx_kernel.cpp only.
#pragma once

#include <cstdint>

#include "cpu/target_loss_amx.h"
#include "cpu/target_loss_amx_tiles.h"
#include "cpu/vector.h"

namespace fastedit {
namespace amx {
namespace {

constexpr std::int64_t kHeadBytes = 320 * 1024;  // of a chunk of the head, in planes
constexpr std::int64_t kMostColumns = 512;       // of a chunk

constexpr float kLowest = -3.40282347e38f, kInfinity = __builtin_inff();

std::int64_t chunk_columns(const TargetLossArgs& args) {
    const std::int64_t row = target_loss_width(args) * 2 * target_loss_planes(args.weight_type);
    const std::int64_t there = (args.vocabulary + kTargetStep - 1) / kTargetStep * kTargetStep;
    const std::int64_t most = there < kMostColumns ? there : kMostColumns;
    if (row == 0) return most;  // d = 0: logits are the bias
    const std::int64_t fit = kHeadBytes / row / kTargetStep * kTargetStep;
    return fit < kTargetStep ? kTargetStep : fit > most ? most : fit;
}

// Where a chunk keeps what.
struct Chunk {
    std::int64_t columns;  // the stride: a multiple of 32, of which some may be padding
    char* head;            // [plane][tile of 16 columns][step along d] tiles
    char* pairs;           // [plane][32 columns][2] tiles of 32 of d
    float* sums;           // [columns][padded rows] as the tiles come
    float* logits;         // [padded rows][columns]
    char* weights;         // [plane][tile of 16 of pulled rows][32 columns] tiles

    Chunk(const TargetLossArgs& args, const TargetLossBlock& block, char* at) : columns(chunk_columns(args)) {
        const std::int64_t plane = columns * 2 * target_loss_planes(args.weight_type);
        head = at;
        sums = reinterpret_cast<float*>(head + plane * target_loss_width(args));
        logits = sums + columns * block.padded();
        // Only with a gradient.
        pairs = reinterpret_cast<char*>(logits + columns * block.padded());
        weights = pairs + plane * kTargetStep;
    }

    static std::int64_t bytes(const TargetLossArgs& args, const TargetLossBlock& block) {
        const std::int64_t plane = 2 * target_loss_planes(args.weight_type);
        return chunk_columns(args) *
               (plane * (target_loss_width(args) + kTargetStep) + 8 * block.padded() + 6 * block.pulled());
    }
};

// Row `row` of the weights, columns [v, v + 32), as planes.
inline void put_weights(const TargetLossBlock& block, const Chunk& chunk, std::int64_t row, std::int64_t v,
                        Vector low, Vector high) {
    const std::int64_t steps = chunk.columns / kTargetStep;
    char* to =
        chunk.weights + (row / kTargetTile * steps + v / kTargetStep) * kTileBytes + row % kTargetTile * 64;
    __m512i planes[3];
    split<3>(low, high, planes);
    for (int plane = 0; plane < 3; ++plane)
        _mm512_store_si512(to + plane * block.pulled() * chunk.columns * 2, planes[plane]);
}

inline Vector slope_of(Vector z, float softcap) {
    const Vector share = z / softcap;
    return 1.0f - share * share;
}

// Numbers [v, v + 16) of n, `other` behind them.
inline Vector load_some(const float* from, std::int64_t v, std::int64_t n, float other) {
    const __mmask16 there = static_cast<__mmask16>(some_of(n - v));
    return _mm512_mask_loadu_ps(_mm512_set1_ps(other), there, from + v);
}

// The largest logit of a row, after bias and cap; columns behind n become -inf.
float finish_logits(const TargetLossArgs& args, std::int64_t first, std::int64_t n, float* z) {
    Vector most = broadcast(kLowest);
    for (std::int64_t v = 0; v < n; v += kLanes) {
        Vector value = load_some(z, v, n, -kInfinity);
        if (args.bias) value += load_some(args.bias + first, v, n, 0.0f);
        if (args.softcap != 0.0f) value = args.softcap * tanh_of(value / args.softcap);
        if (n - v < kLanes) {
            store(z + v, value);
            value = load_some(z, v, n, -kInfinity);
        }
        store(z + v, value);
        most = value > most ? value : most;
    }
    const std::int64_t padded_columns = (n + kTargetStep - 1) / kTargetStep * kTargetStep;
    for (std::int64_t v = (n + kLanes - 1) / kLanes * kLanes; v < padded_columns; v += kLanes)
        store(z + v, broadcast(-kInfinity));
    return most_of(most);
}

void scale_row(float* row, float factor, std::int64_t width) {
    for (std::int64_t i = 0; i < width; ++i) row[i] *= factor;
}

// From logits to weights e^z, with the sums so far moved to the new peaks.
void soften(const TargetLossArgs& args, const TargetLossBlock& block, std::int64_t first, std::int64_t n,
            const Chunk& chunk, const TargetLossSums& sums) {
    const std::int64_t width = target_loss_width(args);
    float rise[kTargetRows], fade[kTargetRows];
    for (std::int64_t r = 0; r < block.rows; ++r) {
        float* z = chunk.logits + r * chunk.columns;
        const float most = finish_logits(args, first, n, z), old = sums.peak[r];
        const float peak = most > old ? most : old;
        rise[r] = peak - old, fade[r] = exponential(broadcast(old - peak))[0];
        sums.peak[r] = peak;
        const std::int64_t target = args.targets[block.first + r] - first;
        if (0 <= target && target < n) sums.picked[r] = z[target];
    }
    for (std::int64_t q = 0; q < block.kl_count; ++q) {
        // The sums so far have a factor z - peak - log p0, which moves with the peak.
        const std::int64_t r = block.kl_place[q];
        const float* z = chunk.logits + r * chunk.columns;
        const float* logp = args.kl_logp + block.kl[q] * args.kl_stride + first;
        const Vector peak = broadcast(sums.peak[r]);
        Vector gap = {};
        for (std::int64_t v = 0; v < n; v += kTargetStep) {
            Vector part[2];
            for (int half = 0; half < 2; ++half) {
                const std::int64_t at = v + half * kLanes;
                const Vector value = load(z + at), shifted = value - peak, p = exponential(shifted);
                const Vector term = p * (shifted - load_some(logp, at, n, 0.0f));
                // Where p is 0 the term is 0, also for log p0 = -inf.
                part[half] = p == 0.0f ? Vector{} : term;
                gap += part[half];
                if (args.softcap != 0.0f)
                    part[half] = p == 0.0f ? Vector{} : part[half] * slope_of(value, args.softcap);
            }
            if (args.with_grad) put_weights(block, chunk, block.rows + q, v, part[0], part[1]);
        }
        if (rise[r] != 0.0f) {
            sums.gap[q] = (sums.gap[q] - rise[r] * sums.total[r]) * fade[r];
            if (args.with_grad) {
                float* own = sums.pulls + (block.rows + q) * width;
                const float* row = sums.pulls + r * width;
                for (std::int64_t i = 0; i < width; ++i) own[i] = (own[i] - rise[r] * row[i]) * fade[r];
            }
        }
        sums.gap[q] += sum_of(gap);
    }
    for (std::int64_t r = 0; r < block.rows; ++r) {
        const float* z = chunk.logits + r * chunk.columns;
        const Vector peak = broadcast(sums.peak[r]);
        Vector total = {};
        for (std::int64_t v = 0; v < n; v += kTargetStep) {
            Vector part[2];
            for (int half = 0; half < 2; ++half) {
                const Vector value = load(z + v + half * kLanes);
                part[half] = exponential(value - peak);
                total += part[half];
                // The padding is at -inf, where a slope would be NaN.
                if (args.softcap != 0.0f)
                    part[half] = part[half] == 0.0f ? Vector{} : part[half] * slope_of(value, args.softcap);
            }
            if (args.with_grad) put_weights(block, chunk, r, v, part[0], part[1]);
        }
        sums.total[r] = sums.total[r] * fade[r] + sum_of(total);
        if (args.with_grad && rise[r] != 0.0f) scale_row(sums.pulls + r * width, fade[r], width);
    }
}

}  // namespace
}  // namespace amx
}  // namespace fastedit
