// The tiles of AMX: eight of 16 rows of 64 bytes, configured for the life of a `Tiles`.
//
// For csrc/cpu/<op>_amx_kernel.cpp only: everything is in an unnamed namespace.
#pragma once

// GCC 12 warns of its own header, https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>

namespace fastedit {
namespace amx {
namespace {

struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// In static memory: GCC's intrinsic tells the optimiser of the first 8 bytes only, and stores to the others
// of a local variable would be dropped.
constexpr TileConfig kTileConfig;

// Tiles are state of the thread: configured for one task and given back, so that a switch of threads does not
// save 8 KB for nothing.
class Tiles {
  public:
    Tiles() { _tile_loadconfig(&kTileConfig); }
    ~Tiles() { _tile_release(); }
};

}  // namespace
}  // namespace amx
}  // namespace fastedit
