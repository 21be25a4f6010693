// The inner kernels of target_loss on AMX tiles (see cpu/target_loss_amx.h).
//
// A chunk of the head's rows is split into planes and laid out as tiles once, in a part of the L2 cache, and
// used twice: as left operands for the logits, whose tiles then are [vocabulary][rows], and, with pairs of
// rows interleaved, as right operands of the gradient's product with the weights e^z that the logits have
// become in between.

#define FASTEDIT_LEVEL amx

#include "cpu/target_loss_amx.h"

#include <cstdint>

#include "cpu/vector.h"

namespace fastedit {
namespace amx {
namespace {

constexpr std::int64_t kTileBytes = 1024;
constexpr std::int64_t kHeadBytes = 320 * 1024;  // of a chunk of the head, in planes
constexpr std::int64_t kAhead = 1024;            // bytes of a row that are fetched early
constexpr std::int64_t kMostColumns = 512;       // of a chunk
constexpr int kLinesAhead = 8;                   // that are fetched with every step of the tiles
constexpr float kLowest = -3.40282347e38f, kInfinity = __builtin_inff();

// ---- tiles ------------------------------------------------------------------------------------------------

struct alignas(64) TileShapes {
    std::uint8_t palette = 1, start = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles are state of the thread, given back at the end of a task.
class UseTiles {
  public:
    UseTiles() {
        const TileShapes shapes;
        _tile_loadconfig(&shapes);
    }
    ~UseTiles() { _tile_release(); }
};

// Walks along the rows of the head that come next, a few cache lines at a time, so that they arrive in the L2
// cache while the tiles are at work.
struct Ahead {
    const char* row;
    std::int64_t row_bytes, stride, rows, at;

    void fetch() {
        for (int i = 0; i < kLinesAhead && rows > 0; ++i) {
            __builtin_prefetch(row + at, 0, 2);
            at += 64;
            if (at >= row_bytes) at = 0, row += stride, --rows;
        }
    }
};

// Tiles 0 to 3 += the products of two left and kRight right operands, plane by plane, over `steps` steps.
// left, right: the first step of the first plane of the first tile.
struct Operand {
    const char* data;
    std::int64_t tile, plane, step;  // bytes from one to the next

    const char* at(std::int64_t which, int of_plane, std::int64_t of_step) const {
        return data + which * tile + of_plane * plane + of_step * step;
    }
};

template <int kLeft, int kRight, int kLeftPlanes, int kRightPlanes>
inline void multiply(const Operand& left, const Operand& right, std::int64_t steps, Ahead& ahead) {
    for (std::int64_t s = 0; s < steps; ++s) {
        ahead.fetch();
        for (int i = 0; i < kLeftPlanes; ++i) {
            _tile_loadd(4, left.at(0, i, s), 64);
            if (kLeft == 2) {
                _tile_loadd(5, left.at(1, i, s), 64);
            }
            for (int j = 0; j < kRightPlanes && i + j < 3; ++j) {
                _tile_loadd(6, right.at(0, j, s), 64);
                if (kRight == 2) {
                    _tile_loadd(7, right.at(1, j, s), 64);
                }
                _tile_dpbf16ps(0, 4, 6);
                if (kRight == 2) {
                    _tile_dpbf16ps(1, 4, 7);
                }
                if (kLeft == 2) {
                    _tile_dpbf16ps(2, 5, 6);
                }
                if (kLeft == 2 && kRight == 2) {
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
        }
    }
}

// ---- planes -----------------------------------------------------------------------------------------------

inline __m512 widened(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// 32 numbers as planes of bf16.
template <int kPlanes>
inline void split(__m512 low, __m512 high, __m512i* planes) {
    for (int plane = 0; plane < kPlanes; ++plane) {
        planes[plane] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
        if (plane + 1 == kPlanes) return;
        low = _mm512_sub_ps(low, widened(_mm512_castsi512_si256(planes[plane])));
        high = _mm512_sub_ps(high, widened(_mm512_extracti64x4_epi64(planes[plane], 1)));
    }
}

template <int kPlanes>
inline void read(const BFloat16* from, __mmask32 there, __m512i* planes) {
    planes[0] = _mm512_maskz_loadu_epi16(there, from);
}
template <int kPlanes>
inline void read(const Float16* from, __mmask32 there, __m512i* planes) {
    const __m512i bits = _mm512_maskz_loadu_epi16(there, from);
    split<kPlanes>(_mm512_cvtph_ps(_mm512_castsi512_si256(bits)),
                   _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1)), planes);
}
template <int kPlanes>
inline void read(const float* from, __mmask32 there, __m512i* planes) {
    split<kPlanes>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(there), from),
                   _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> 16), from + 16), planes);
}

inline __mmask32 some_of(std::int64_t n) {
    return n >= 32 ? ~0u : n > 0 ? (1u << n) - 1u : 0u;
}

// to[j][i] = from[i][j] for 16 x 16 words, rows `from_stride` and `to_stride` words apart.
inline void transpose(const float* from, std::int64_t from_stride, float* to, std::int64_t to_stride) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * from_stride);
    // Of four rows each: words 4 l + c of row r become word 4 l + r of b[4 g + c].
    for (int g = 0; g < 16; g += 4) {
        const __m512d low0 = _mm512_castps_pd(_mm512_unpacklo_ps(a[g], a[g + 1]));
        const __m512d high0 = _mm512_castps_pd(_mm512_unpackhi_ps(a[g], a[g + 1]));
        const __m512d low1 = _mm512_castps_pd(_mm512_unpacklo_ps(a[g + 2], a[g + 3]));
        const __m512d high1 = _mm512_castps_pd(_mm512_unpackhi_ps(a[g + 2], a[g + 3]));
        b[g] = _mm512_castpd_ps(_mm512_unpacklo_pd(low0, low1));
        b[g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low0, low1));
        b[g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high0, high1));
        b[g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high0, high1));
    }
    for (int c = 0; c < 4; ++c) {
        const __m512 even0 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88);
        const __m512 odd0 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
        const __m512 even1 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
        const __m512 odd1 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
        _mm512_storeu_ps(to + c * to_stride, _mm512_shuffle_f32x4(even0, even1, 0x88));
        _mm512_storeu_ps(to + (8 + c) * to_stride, _mm512_shuffle_f32x4(even0, even1, 0xdd));
        _mm512_storeu_ps(to + (4 + c) * to_stride, _mm512_shuffle_f32x4(odd0, odd1, 0x88));
        _mm512_storeu_ps(to + (12 + c) * to_stride, _mm512_shuffle_f32x4(odd0, odd1, 0xdd));
    }
}

// ---- a chunk ----------------------------------------------------------------------------------------------

std::int64_t chunk_columns(const TargetLossArgs& args) {
    const std::int64_t row = target_loss_width(args) * 2 * target_loss_planes(args.weight_type);
    const std::int64_t fit = kHeadBytes / row / kTargetStep * kTargetStep;
    return fit < kTargetStep ? kTargetStep : fit > kMostColumns ? kMostColumns : fit;
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
        pairs = head + plane * target_loss_width(args);
        sums = reinterpret_cast<float*>(pairs + plane * kTargetStep);
        logits = sums + columns * block.padded();
        weights = reinterpret_cast<char*>(logits + columns * block.padded());
    }

    static std::int64_t bytes(const TargetLossArgs& args, const TargetLossBlock& block) {
        const std::int64_t plane = 2 * target_loss_planes(args.weight_type);
        return chunk_columns(args) *
               (plane * (target_loss_width(args) + kTargetStep) + 8 * block.padded() + 6 * block.pulled());
    }
};

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
