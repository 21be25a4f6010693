// Tile products in registers: four accumulators, as the kernels have them.

#include <cstdint>

#include "cpu/peak.h"
#include "cpu/tiles.h"

namespace fastedit {
namespace amx {

double peak_bf16() {
    constexpr std::int64_t kRounds = 20000;
    const Tiles tiles;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (std::int64_t round = 0; round < kRounds; ++round) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    return 4.0 * 2 * 16 * 16 * 32 * kRounds;
}

}  // namespace amx
}  // namespace fastedit
