// The inner kernels of the symmetric product on AMX tiles (see cpu/second_moment_amx.h).
//
// A task keeps the left operands of a few hundred columns in the L2 cache and takes blocks of right operands
// past them. Tokens come in strips whose two operands of a 32 x 32 square fit the L1 cache; the squares' sums
// wait in L2 for the next strip and go to the master once a flush.

#include <cstdint>

#include "cpu/planes.h"
#include "cpu/second_moment_amx.h"
#include "cpu/tiles.h"

namespace fastedit {
namespace amx {
namespace {

template <typename Key, int kPlanes>
void pack(const SecondMomentArgs& args, const SecondMomentLayer& layer, std::int64_t first,
          std::int64_t tokens, std::int64_t step, const AmxPanels& panels) {
    const Key* rows[kAmxPanel];
    const std::int64_t from = step * kAmxPanel;
    const std::int64_t there = tokens - from < kAmxPanel ? tokens - from : kAmxPanel;
    for (std::int64_t t = 0; t < kAmxPanel; ++t) {
        std::int64_t row = first + from + (t < there ? t : 0);
        if (args.rows) row = args.rows[row];
        rows[t] = static_cast<const Key*>(layer.keys) + row * layer.key_stride;
    }
    std::int64_t strip = 0;
    while (panels.strip_begin(strip + 1) <= step) ++strip;
    const std::int64_t begin = panels.strip_begin(strip);
    const std::int64_t plane_bytes = (panels.strip_begin(strip + 1) - begin) * kAmxStepBytes;
    const std::int64_t offset = begin * kPlanes * kAmxStepBytes + (step - begin) * kAmxStepBytes;
    for (std::int64_t p = 0; p < panels.count; ++p) {
        const std::int64_t columns = args.d - p * kAmxPanel;
        const __mmask32 mask = columns < kAmxPanel ? (1u << columns) - 1u : ~0u;
        char* out = panels.panel(p) + offset;
        for (std::int64_t pair = 0; pair < kAmxPanel / 2; ++pair) {
            __m512i even[kPlanes], odd[kPlanes], both[2];
            load_keys<kPlanes>(rows[2 * pair] + p * kAmxPanel, 2 * pair < there ? mask : 0, even);
            load_keys<kPlanes>(rows[2 * pair + 1] + p * kAmxPanel, 2 * pair + 1 < there ? mask : 0, odd);
            for (int plane = 0; plane < kPlanes; ++plane) {
                char* to = out + plane * plane_bytes + 64 * pair;
                interleave(even[plane], odd[plane], both);
                _mm512_store_si512(to, both[0]);
                _mm512_store_si512(to + 1024, both[1]);
            }
        }
    }
}

// Sums of a block of the master: squares of 32 x 32, column panel by column panel.
struct Sums {
    float* data;
    std::int64_t height;  // row panels

    float* square(std::int64_t row, std::int64_t column) const {
        return data + (column * height + row) * kAmxPanel * kAmxPanel;
    }
};

inline void add(double* to, const float* sums, __mmask8 mask) {
    const __m512d more = _mm512_maskz_cvtps_pd(0xff, _mm256_load_ps(sums));
    _mm512_mask_storeu_pd(to, mask, _mm512_add_pd(_mm512_maskz_loadu_pd(mask, to), more));
}
inline void add(float* to, const float* sums, __mmask16 mask) {
    const __m512 more = _mm512_load_ps(sums);
    _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), more));
}

// Adds a block of sums to the master, at and below the diagonal. row, column: where it starts, in panels.
template <typename Master>
void flush(const SecondMomentArgs& args, const SecondMomentLayer& layer, const Sums& sums, std::int64_t row,
           std::int64_t column, std::int64_t width) {
    constexpr int kLanes = 64 / sizeof(Master);
    const std::int64_t first = row * kAmxPanel, left = column * kAmxPanel;
    const std::int64_t rows =
        args.d - first < sums.height * kAmxPanel ? args.d - first : sums.height * kAmxPanel;
    for (std::int64_t r = 0; r < rows; ++r) {
        Master* to = static_cast<Master*>(layer.master) + (first + r) * layer.master_stride + left;
        std::int64_t n = first + r - left + 1;  // columns at and below the diagonal
        if (n > width * kAmxPanel) n = width * kAmxPanel;
        for (std::int64_t i = 0; i < n; i += kAmxPanel) {
            const float* from = sums.square(r / kAmxPanel, i / kAmxPanel) + r % kAmxPanel * kAmxPanel;
            const std::uint32_t mask = n - i >= kAmxPanel ? ~0u : (1u << (n - i)) - 1u;
            for (int lane = 0; lane < kAmxPanel; lane += kLanes)
                add(to + i + lane, from + lane, static_cast<std::uint16_t>(mask >> lane));
        }
    }
}

// Products of planes. Small ones first: they are lost in a large sum.
struct Pair {
    int left, right;
};
template <int kPlanes>
struct Pairs;
template <>
struct Pairs<1> {
    static constexpr Pair kAll[] = {{0, 0}};
};
template <>
struct Pairs<2> {
    static constexpr Pair kAll[] = {{1, 1}, {1, 0}, {0, 1}, {0, 0}};
};
template <>
struct Pairs<3> {  // what is left out is under 2^-24 of the whole
    static constexpr Pair kAll[] = {{2, 0}, {0, 2}, {1, 1}, {1, 0}, {0, 1}, {0, 0}};
};

// sums (+)= left^T right over the steps of a strip. Every step asks for a bit of what comes from L3 next.
template <int kPlanes>
inline void square(const char* left, const char* right, std::int64_t steps, float* sums, bool first,
                   const char*& next) {
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 128);
        _tile_loadd(1, sums + 16, 128);
        _tile_loadd(2, sums + 16 * kAmxPanel, 128);
        _tile_loadd(3, sums + 16 * kAmxPanel + 16, 128);
    }
    for (const Pair& pair : Pairs<kPlanes>::kAll) {
        const char* a = left + pair.left * steps * kAmxStepBytes;
        const char* b = right + pair.right * steps * kAmxStepBytes;
        for (std::int64_t step = 0; step < steps; ++step, a += kAmxStepBytes, b += kAmxStepBytes) {
            _tile_loadd(4, a, 64);
            _tile_loadd(6, b, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b + 1024, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a + 1024, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
            // Every other line: the processor brings lines in pairs, and these requests hold buffers that the
            // tiles' own need.
            _mm_prefetch(next, _MM_HINT_T0);
            _mm_prefetch(next + 128, _MM_HINT_T0);
            next += 256;
        }
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 16 * kAmxPanel, 128);
    _tile_stored(3, sums + 16 * kAmxPanel + 16, 128);
}

// Steps [from, to) of a flush.
struct Strip {
    std::int64_t from, to;
    Strip(const AmxPanels& panels, std::int64_t index)
        : from(panels.strip_begin(index)), to(panels.strip_begin(index + 1)) {}
    std::int64_t steps() const { return to - from; }
};

// The left operands of a task, strip after strip, in them the row panels: what the inner loop walks through.
template <int kPlanes>
struct Left {
    char* data;
    std::int64_t height;

    char* at(const Strip& strip, std::int64_t row) const {
        return data + (strip.from * height + row * strip.steps()) * kPlanes * kAmxStepBytes;
    }
    void fill(const AmxPanels& panels, std::int64_t first) const {
        for (std::int64_t row = 0; row < height; ++row) {
            for (std::int64_t index = 0; index < panels.strips(); ++index) {
                const Strip strip(panels, index);
                const char* from = panels.panel(first + row) + strip.from * kPlanes * kAmxStepBytes;
                char* to = at(strip, row);
                for (std::int64_t tile = 0; tile < strip.steps() * kPlanes * kAmxStepBytes; tile += 1024)
                    transpose(from + tile, to + tile);
            }
        }
    }
};

template <int kPlanes, typename Master>
void run(const SecondMomentArgs& args, const SecondMomentLayer& layer, const AmxPanels& panels,
         const AmxTask& task, char* scratch, float* sums_scratch) {
    const std::int64_t height = task.row_end - task.row, strips = panels.strips();
    const Left<kPlanes> left{scratch, height};
    left.fill(panels, task.row);
    const Tiles tiles;
    const Sums sums{sums_scratch, height};
    for (std::int64_t column = task.column; column < task.column_end; column += kAmxBlockPanels) {
        const std::int64_t width =
            task.column_end - column < kAmxBlockPanels ? task.column_end - column : kAmxBlockPanels;
        for (std::int64_t index = 0; index < strips; ++index) {
            const Strip strip(panels, index);
            for (std::int64_t c = 0; c < width; ++c) {
                const char* right = panels.panel(column + c) + strip.from * kPlanes * kAmxStepBytes;
                const char* next = c + 1 < width ? right + panels.panel_bytes()
                                                 : panels.panel(column) + strip.to * kPlanes * kAmxStepBytes;
                const std::int64_t diagonal = column + c - task.row;
                for (std::int64_t row = diagonal > 0 ? diagonal : 0; row < height; ++row)
                    square<kPlanes>(left.at(strip, row), right, strip.steps(), sums.square(row, c),
                                    index == 0, next);
            }
        }
        flush<Master>(args, layer, sums, task.row, column, width);
    }
}

template <int kPlanes>
void run(const SecondMomentArgs& args, const SecondMomentLayer& layer, const AmxPanels& panels,
         const AmxTask& task, char* left, float* sums) {
    if (args.master_type == MasterType::kFloat64)
        return run<kPlanes, double>(args, layer, panels, task, left, sums);
    run<kPlanes, float>(args, layer, panels, task, left, sums);
}

}  // namespace

void second_moment_pack(const SecondMomentArgs& args, const SecondMomentLayer& layer, std::int64_t first,
                        std::int64_t tokens, std::int64_t step, const AmxPanels& panels) {
    switch (args.key_type) {
        case KeyType::kBFloat16:
            return pack<BFloat16, 1>(args, layer, first, tokens, step, panels);
        case KeyType::kFloat16:
            return pack<Float16, 2>(args, layer, first, tokens, step, panels);
        case KeyType::kFloat32:
            return panels.planes == 2 ? pack<float, 2>(args, layer, first, tokens, step, panels)
                                      : pack<float, 3>(args, layer, first, tokens, step, panels);
    }
}

void second_moment_task(const SecondMomentArgs& args, const SecondMomentLayer& layer, const AmxPanels& panels,
                        const AmxTask& task, char* left, float* sums) {
    if (panels.planes == 1) return run<1>(args, layer, panels, task, left, sums);
    if (panels.planes == 2) return run<2>(args, layer, panels, task, left, sums);
    run<3>(args, layer, panels, task, left, sums);
}

}  // namespace amx
}  // namespace fastedit
