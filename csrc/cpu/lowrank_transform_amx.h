// The products of the editor network on AMX tiles: what the driver and the kernel share.
//
// Weights and rows become three planes of bf16 whose sum they are; the six products of planes that reach the
// digits of float32 are exact and are summed in float32. Infinities and float32 beyond 3.3e38 give NaN.
#pragma once

#include <cstdint>

#include "cpu/lowrank_transform.h"

namespace fastedit {

constexpr int kProductPlanes = 3;
constexpr std::int64_t kProductTileBytes = 1024;
constexpr std::int64_t kProductDepth = 32;     // of one step
constexpr std::int64_t kProductTiles = 3;      // of 16 rows each, that one pass over the weight takes
constexpr std::int64_t kProductOutputs = 256;  // of one task; a multiple of 32

// Up to 48 rows as right operands, [step][tile][plane] of 16 pairs along the depth by 16 rows.
struct ProductPanel {
    char* data;
    std::int64_t first, tiles;  // row, tiles of 16 rows from there
    std::int64_t steps;

    char* step(std::int64_t index) const { return data + index * tiles * kProductPlanes * kProductTileBytes; }
};

#ifdef FASTEDIT_AMX
namespace amx {
void lowrank_product_pack(const ProductArgs& args, const ProductPanel& panel, std::int64_t step);
// Outputs [first, last) of the panel's rows. sums: kProductOutputs * 16 * kProductTiles floats of scratch.
void lowrank_product_task(const ProductArgs& args, const ProductPanel& panel, std::int64_t first,
                          std::int64_t last, float* sums);
}  // namespace amx
#endif

void lowrank_product_amx(const ProductArgs& args);
// Bytes of args.scratch for products of n rows of this depth.
std::int64_t lowrank_product_amx_scratch(std::int64_t n, std::int64_t depth, int threads);

}  // namespace fastedit
