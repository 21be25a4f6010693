// Driver of the editor network: rows are normalised, then every layer is two products and one pass over rows.

#include "cpu/lowrank_transform.h"

#include <algorithm>
#include <cstring>

#include "cpu/buffer.h"
#include "cpu/isa.h"
#include "cpu/lowrank_transform_amx.h"
#include "cpu/thread_pool.h"

namespace fastedit {
namespace {

// Columns of a product that one task computes.
constexpr std::int64_t kColumns = 64;

void product(const ProductArgs& args) {
    if (current_level() == Level::kAmx) return lowrank_product_amx(args);
    const auto columns = FASTEDIT_PICK(lowrank_product_columns);
    parallel_for(args.threads, (args.outputs + kColumns - 1) / kColumns, [&](std::int64_t task, int) {
        columns(args, task * kColumns, std::min((task + 1) * kColumns, args.outputs));
    });
}

}  // namespace

void lowrank_transform(const LowrankTransformArgs& args) {
    if (args.n == 0 || args.d == 0) return;
    const auto normalise_row = FASTEDIT_PICK(lowrank_normalise_row);
    const auto residual_row = FASTEDIT_PICK(lowrank_residual_row);
    float* z = args.start.z;
    const std::int64_t n = args.n, d = args.d;
    const int threads = std::max(args.threads, 1);
    // One for all products: fresh pages cost as much as packing into them.
    std::int64_t bytes = 0;
    for (std::int64_t index = 0; current_level() == Level::kAmx && index < args.count; ++index)
        bytes = std::max({bytes, lowrank_product_amx_scratch(n, d, threads),
                          lowrank_product_amx_scratch(n, args.layers[index].rank, threads)});
    const Buffer<char> scratch(static_cast<std::size_t>(bytes));
    parallel_for(threads, n, [&](std::int64_t row, int) { normalise_row(args.start, row); });
    for (std::int64_t index = 0; index < args.count; ++index) {
        const LowrankLayer& layer = args.layers[index];
        if (layer.input != nullptr)
            std::memcpy(layer.input, z, static_cast<std::size_t>(n * d) * sizeof(float));
        product({layer.V, layer.V_stride, z, d, layer.hidden, layer.hidden_stride, n, layer.rank, d, threads,
                 scratch.get()});
        product({layer.U, layer.U_stride, layer.hidden, layer.hidden_stride, layer.a, d, n, d, layer.rank,
                 threads, scratch.get()});
        const ResidualArgs residual{z,           layer.a,         layer.bias, layer.scale,
                                    layer.shift, args.start.mode, d,          args.clamp_first};
        parallel_for(threads, n, [&](std::int64_t row, int) { residual_row(residual, row); });
    }
}

void lowrank_residual_backward(const ResidualBackwardArgs& args) {
    const auto columns = FASTEDIT_PICK(lowrank_residual_backward_columns);
    constexpr std::int64_t kBlock = 256;
    parallel_for(args.threads, (args.d + kBlock - 1) / kBlock, [&](std::int64_t task, int) {
        columns(args, task * kBlock, std::min((task + 1) * kBlock, args.d));
    });
}

}  // namespace fastedit
