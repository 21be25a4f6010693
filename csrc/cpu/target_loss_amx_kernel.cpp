// The inner kernels of target_loss on AMX tiles (see cpu/target_loss_amx.h).
//
// A chunk of the head's rows is split into planes and laid out as tiles once, in a part of the L2 cache, and
// used twice: as left operands for the logits, whose tiles then are [vocabulary][rows], and, with pairs of
// rows interleaved, as right operands of the gradient's product with the weights e^z that the logits have
// become in between.

#include "cpu/target_loss_amx.h"

#include <cstdint>

#include "cpu/target_loss_amx_soften.h"
#include "cpu/target_loss_amx_tiles.h"

namespace fastedit {
namespace amx {
namespace {

constexpr std::int64_t kAhead = 1024;  // bytes of a row that are fetched early

template <typename Weight, int kPlanes>
void pack_head(const TargetLossArgs& args, std::int64_t first, std::int64_t n, const Chunk& chunk) {
    const std::int64_t steps = target_loss_width(args) / kTargetStep;
    const std::int64_t plane_bytes = chunk.columns * steps * kTargetStep * 2;
    const std::int64_t padded_columns = (n + kTargetStep - 1) / kTargetStep * kTargetStep;
    for (std::int64_t tile = 0; tile < padded_columns / kTargetTile; ++tile) {
        const Weight* rows[kTargetTile];
        for (std::int64_t r = 0; r < kTargetTile; ++r) {
            const std::int64_t v = tile * kTargetTile + r;
            rows[r] =
                static_cast<const Weight*>(args.weight) + (first + (v < n ? v : 0)) * args.weight_stride;
        }
        // Tile by tile, so that what is written is in the L1 cache; the reads are ahead of the sixteen rows.
        for (std::int64_t s = 0; s < steps; ++s) {
            char* to = chunk.head + (tile * steps + s) * kTileBytes;
            const __mmask32 some = some_of(args.d - s * kTargetStep);
            for (std::int64_t r = 0; r < kTargetTile; ++r) {
                const Weight* from = rows[r] + s * kTargetStep;
                for (std::int64_t line = 0; line < kTargetStep * std::int64_t{sizeof(Weight)}; line += 64)
                    __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead + line);
                __m512i planes[kPlanes];
                read<kPlanes>(from, tile * kTargetTile + r < n ? some : 0, planes);
                for (int plane = 0; plane < kPlanes; ++plane)
                    _mm512_store_si512(to + plane * plane_bytes + r * 64, planes[plane]);
            }
        }
    }
}

template <int kPlanes, int kHiddenPlanes, int kRight>
inline void logits_of(const TargetLossArgs& args, const TargetLossBlock& block, const Chunk& chunk,
                      std::int64_t v, std::int64_t tile, Ahead& ahead) {
    const std::int64_t steps = target_loss_width(args) / kTargetStep, line = steps * kTileBytes;
    const Operand left{chunk.head + v * line, line, chunk.columns / kTargetTile * line, kTileBytes};
    const Operand right{block.packed + tile * line, line, block.padded() / kTargetTile * line, kTileBytes};
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    multiply<2, kRight, kPlanes, kHiddenPlanes>(left, right, steps, ahead);
    float* to = chunk.sums + v * kTargetTile * block.padded() + tile * kTargetTile;
    const std::int64_t stride = block.padded() * 4;
    float* below = to + kTargetTile * block.padded();
    _tile_stored(0, to, stride);
    _tile_stored(2, below, stride);
    if (kRight == 2) {
        _tile_stored(1, to + kTargetTile, stride);
        _tile_stored(3, below + kTargetTile, stride);
    }
}

template <int kPlanes, int kHiddenPlanes>
void all_logits(const TargetLossArgs& args, const TargetLossBlock& block, const Chunk& chunk, std::int64_t n,
                Ahead& ahead) {
    const std::int64_t tiles = block.padded() / kTargetTile;
    for (std::int64_t v = 0; v * kTargetTile < n; v += 2) {
        std::int64_t tile = 0;
        for (; tile + 2 <= tiles; tile += 2)
            logits_of<kPlanes, kHiddenPlanes, 2>(args, block, chunk, v, tile, ahead);
        if (tile < tiles) logits_of<kPlanes, kHiddenPlanes, 1>(args, block, chunk, v, tile, ahead);
    }
    for (std::int64_t v = 0; v < n; v += kTargetTile)
        for (std::int64_t r = 0; r < block.padded(); r += kTargetTile)
            transpose(chunk.sums + v * block.padded() + r, block.padded(),
                      chunk.logits + r * chunk.columns + v, chunk.columns);
}

// Rows 2 i and 2 i + 1 of 32 columns of the head side by side: two right operands for each plane and 32
// columns.
template <int kPlanes>
void pack_pairs(const TargetLossArgs& args, std::int64_t n, std::int64_t step, const Chunk& chunk) {
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const std::int64_t steps = target_loss_width(args) / kTargetStep;
    for (int plane = 0; plane < kPlanes; ++plane) {
        const char* from = chunk.head + (plane * chunk.columns / kTargetTile * steps + step) * kTileBytes;
        char* to = chunk.pairs + plane * chunk.columns / kTargetStep * 2 * kTileBytes;
        for (std::int64_t v = 0; v < n; v += kTargetStep, to += 2 * kTileBytes) {
            for (std::int64_t pair = 0; pair < 16; ++pair) {
                const std::int64_t row = v + 2 * pair;
                const char* at = from + row / kTargetTile * steps * kTileBytes + row % kTargetTile * 64;
                const __m512i even = _mm512_load_si512(at), odd = _mm512_load_si512(at + 64);
                const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
                _mm512_store_si512(to + 64 * pair, _mm512_permutex2var_epi64(low, first, high));
                _mm512_store_si512(to + kTileBytes + 64 * pair, _mm512_permutex2var_epi64(low, second, high));
            }
        }
    }
}

template <int kPlanes, int kLeft>
inline void pull(const TargetLossArgs& args, const TargetLossBlock& block, const Chunk& chunk, std::int64_t n,
                 std::int64_t tile, std::int64_t step, float* pulls, Ahead& ahead) {
    const std::int64_t width = target_loss_width(args), steps = chunk.columns / kTargetStep;
    const Operand left{chunk.weights + tile * steps * kTileBytes, steps * kTileBytes,
                       block.pulled() * chunk.columns * 2, kTileBytes};
    const Operand right{chunk.pairs, kTileBytes, steps * 2 * kTileBytes, 2 * kTileBytes};
    float* at = pulls + tile * kTargetTile * width + step * kTargetStep;
    float* below = at + kTargetTile * width;
    _tile_loadd(0, at, width * 4);
    _tile_loadd(1, at + kTargetTile, width * 4);
    if (kLeft == 2) {
        _tile_loadd(2, below, width * 4);
        _tile_loadd(3, below + kTargetTile, width * 4);
    }
    multiply<kLeft, 2, 3, kPlanes>(left, right, (n + kTargetStep - 1) / kTargetStep, ahead);
    _tile_stored(0, at, width * 4);
    _tile_stored(1, at + kTargetTile, width * 4);
    if (kLeft == 2) {
        _tile_stored(2, below, width * 4);
        _tile_stored(3, below + kTargetTile, width * 4);
    }
}

template <int kPlanes>
void all_pulls(const TargetLossArgs& args, const TargetLossBlock& block, const Chunk& chunk, std::int64_t n,
               float* pulls, Ahead& ahead) {
    const std::int64_t tiles = block.pulled() / kTargetTile;
    for (std::int64_t step = 0; step < target_loss_width(args) / kTargetStep; ++step) {
        pack_pairs<kPlanes>(args, n, step, chunk);
        std::int64_t tile = 0;
        for (; tile + 2 <= tiles; tile += 2)
            pull<kPlanes, 2>(args, block, chunk, n, tile, step, pulls, ahead);
        if (tile < tiles) pull<kPlanes, 1>(args, block, chunk, n, tile, step, pulls, ahead);
    }
}

template <typename Weight, int kPlanes>
void part(const TargetLossArgs& args, const TargetLossBlock& block, std::int64_t first, std::int64_t last,
          const TargetLossSums& sums, const Chunk& chunk) {
    const UseTiles tiles;
    for (std::int64_t start = first; start < last; start += chunk.columns) {
        const std::int64_t n = last - start < chunk.columns ? last - start : chunk.columns;
        pack_head<Weight, kPlanes>(args, start, n, chunk);
        const std::int64_t next = start + n, left = last - next, stride = args.weight_stride;
        Ahead ahead{reinterpret_cast<const char*>(static_cast<const Weight*>(args.weight) + next * stride),
                    args.d * std::int64_t{sizeof(Weight)}, stride * std::int64_t{sizeof(Weight)},
                    left < chunk.columns ? left : chunk.columns, 0};
        switch (args.hidden_type) {
            case HeadType::kFloat32:
                all_logits<kPlanes, 3>(args, block, chunk, n, ahead);
                break;
            case HeadType::kBFloat16:
                all_logits<kPlanes, 1>(args, block, chunk, n, ahead);
                break;
            case HeadType::kFloat16:
                all_logits<kPlanes, 2>(args, block, chunk, n, ahead);
                break;
        }
        soften(args, block, start, n, chunk, sums);
        if (args.with_grad) all_pulls<kPlanes>(args, block, chunk, n, sums.pulls, ahead);
    }
}

}  // namespace

void target_loss_pack(const TargetLossArgs& args, std::int64_t first, std::int64_t rows, char* packed) {
    const std::int64_t steps = target_loss_width(args) / kTargetStep;
    const std::int64_t tiles = (rows + kTargetTile - 1) / kTargetTile;
    const int count = target_loss_planes(args.hidden_type);
    for (std::int64_t r = 0; r < tiles * kTargetTile; ++r)
        for (std::int64_t s = 0; s < steps; ++s) {
            __m512i planes[3];
            const float* from = args.hidden + (first + (r < rows ? r : 0)) * args.d + s * kTargetStep;
            read<3>(from, r < rows ? some_of(args.d - s * kTargetStep) : 0, planes);
            for (int plane = 0; plane < count; ++plane) {
                // Word i of the row is that of this row in line i of the tile.
                alignas(64) std::int32_t words[16];
                _mm512_store_si512(words, planes[plane]);
                char* to = packed + ((plane * tiles + r / kTargetTile) * steps + s) * kTileBytes;
                for (int i = 0; i < 16; ++i)
                    __builtin_memcpy(to + 64 * i + 4 * (r % kTargetTile), words + i, 4);
            }
        }
}

std::int64_t target_loss_scratch(const TargetLossArgs& args, const TargetLossBlock& block) {
    return Chunk::bytes(args, block);
}

void target_loss_part(const TargetLossArgs& args, const TargetLossBlock& block, std::int64_t first,
                      std::int64_t last, const TargetLossSums& sums, char* scratch) {
    const Chunk chunk(args, block, scratch);
    for (std::int64_t r = 0; r < block.padded(); ++r)
        sums.peak[r] = kLowest, sums.total[r] = 0.0f, sums.picked[r] = 0.0f;
    for (std::int64_t q = 0; q < block.kl_count; ++q) sums.gap[q] = 0.0f;
    if (args.with_grad) {
        for (std::int64_t i = 0; i < block.pulled() * target_loss_width(args); ++i) sums.pulls[i] = 0.0f;
        // Rows of padding weigh nothing in every chunk.
        for (std::int64_t i = 0; i < 3 * chunk.columns * block.pulled() * 2; ++i) chunk.weights[i] = 0;
    }
    switch (args.weight_type) {
        case HeadType::kFloat32:
            return part<float, 3>(args, block, first, last, sums, chunk);
        case HeadType::kBFloat16:
            return part<BFloat16, 1>(args, block, first, last, sums, chunk);
        case HeadType::kFloat16:
            return part<Float16, 2>(args, block, first, last, sums, chunk);
    }
}

}  // namespace amx
}  // namespace fastedit
