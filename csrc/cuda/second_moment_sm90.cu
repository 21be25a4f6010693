// C += K^T diag(m) K on the lower triangle with what sm_90 has: bulk tensor copies and asynchronous products.
//
// Two blocks form a cluster and share a 128 x 256 piece of C: both need the same 128 columns of keys on the
// left, of which each fetches half for both, and each its own 128 on the right. In a block one warp fetches
// and two warpgroups multiply, each 64 x 128. Keys stay [tokens, d]: the products read both operands
// transposed. The tensor cores' accumulators do not round to nearest and their bias grows with the chain, so
// every kPromote tokens they are added to a second set of fp32 registers, and that one goes to C every
// kFlush. Each piece of C is one block's: the result is the same on every run.
//
// Copies cannot skip rows, so masked keys are gathered into `staging` first, with zeros up to a whole step.

#include <algorithm>
#include <cstdint>

#include "cuda/launch.h"
#include "cuda/second_moment.h"
#include "cuda/wgmma.cuh"

namespace fastedit {
namespace {

constexpr int kTile = 128, kStep = kSecondMomentStep, kBox = 64, kStages = 6, kGroup = 8;
constexpr int kPromote = 1024 / kStep, kFlush = 8192 / kStep;  // steps
constexpr int kBoxBytes = kBox * kStep * 2;                    // 64 columns of a step
constexpr int kStageBytes = 4 * kBoxBytes;                     // left, left, right, right
constexpr int kThreads = 3 * 128;
constexpr int kShared = kStages * kStageBytes + 1024;  // the boxes' swizzle needs an alignment of 1,024

struct Piece {
    int row, column, layer;  // in keys; column: the block's own
};

// Pieces per group of kGroup rows of tiles. Blocks that run together then share columns on both sides, which
// stay in the second-level cache: row after row, each wave would read nearly all keys.
__device__ __forceinline__ int pieces_before(int group) {
    return 16 * group * group + 4 * group;
}

// Piece `index` of the triangle's; false: beyond the last row.
__device__ bool piece(int index, int tiles, int rank, Piece* found) {
    int group = static_cast<int>(sqrtf(static_cast<float>(index)) * 0.25f);
    while (pieces_before(group + 1) <= index) ++group;
    while (pieces_before(group) > index) --group;
    int rest = index - pieces_before(group), pair = 0, first = 0;
    // Pairs of tiles 0 to 4 group are there for all rows, later ones for two rows less each.
    const int whole = (4 * group + 1) * kGroup;
    if (rest < whole) {
        pair = rest / kGroup;
        rest %= kGroup;
    } else {
        rest -= whole;
        pair = 4 * group + 1;
        for (first = 2; rest >= kGroup - first; first += 2, ++pair) rest -= kGroup - first;
    }
    const int row = kGroup * group + first + rest;
    found->row = row * kTile;
    found->column = (2 * pair + rank) * kTile;
    return row < tiles;
}

__device__ __forceinline__ void add_pair(float* to, float x, float y, bool both) {
    to[0] += x;
    if (both) to[1] += y;
}

__device__ __forceinline__ void add_pair(double* to, float x, float y, bool both) {
    to[0] += static_cast<double>(x);
    if (both) to[1] += static_cast<double>(y);
}

template <typename Key, typename Master>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
    second_moment_sm90_kernel(const __grid_constant__ CUtensorMap keys,
                              const std::int32_t* __restrict__ count, int tokens, int d, int layers,
                              int pieces, Master* __restrict__ all_masters, std::int64_t master_stride,
                              std::int64_t master_layer_stride) {
    extern __shared__ unsigned char memory[];
    __shared__ __align__(8) std::uint64_t barriers[2 * kStages];
    const std::uint32_t stages = (sm90::shared_address(memory) + 1023) & ~1023u;
    const std::uint32_t full = sm90::shared_address(barriers), empty = full + 8 * kStages;

    const int rank = static_cast<int>(sm90::cluster_rank());
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            sm90::barrier_init(full + 8 * stage, 1);
            sm90::barrier_init(empty + 8 * stage, 4);  // two warpgroups of both blocks read what is fetched
        }
        sm90::barrier_init_fence();
    }
    sm90::cluster_sync();

    if (count != nullptr) tokens = *count;
    const int steps = (tokens + kStep - 1) / kStep;
    const int tiles = (d + kTile - 1) / kTile;
    const int warpgroup = threadIdx.x / 128;
    const int clusters = gridDim.x / 2;
    int stage = 0;
    std::uint32_t phase = 0;
    const auto next = [&] {
        if (++stage == kStages) stage = 0, phase ^= 1;
    };

    if (warpgroup == 0) {
        sm90::give_registers<40>();
        if (threadIdx.x == 0) {
            for (int work = blockIdx.x / 2; work < pieces * layers; work += clusters) {
                Piece at;
                if (!piece(work % pieces, tiles, rank, &at)) continue;
                at.layer = work / pieces;
                for (int step = 0; step < steps; ++step, next()) {
                    sm90::barrier_wait(empty + 8 * stage, phase ^ 1);
                    const std::uint32_t ready = full + 8 * stage, to = stages + stage * kStageBytes;
                    sm90::barrier_expect(ready, kStageBytes);
                    sm90::copy_box_to(&keys, to + rank * kBoxBytes, ready, at.row + rank * kBox, step * kStep,
                                      at.layer, 3);
                    sm90::copy_box(&keys, to + 2 * kBoxBytes, ready, at.column, step * kStep, at.layer);
                    sm90::copy_box(&keys, to + 3 * kBoxBytes, ready, at.column + kBox, step * kStep,
                                   at.layer);
                }
            }
        }
        __syncwarp();  // what follows is for whole warps
    } else {
        sm90::take_registers<232>();
        const int half = warpgroup - 1;  // which 64 of the left columns
        const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
        const bool speaks = threadIdx.x % 128 == 0;
        const auto release = [&](int done) {
            if (speaks) {
                sm90::barrier_arrive(empty + 8 * done, 0);
                sm90::barrier_arrive(empty + 8 * done, 1);
            }
        };
        for (int work = blockIdx.x / 2; work < pieces * layers; work += clusters) {
            Piece at;
            if (!piece(work % pieces, tiles, rank, &at)) continue;
            at.layer = work / pieces;
            Master* master = all_masters + at.layer * master_layer_stride;
            const int row = at.row + half * 64 + warp * 16 + lane / 4;
            const int column = at.column + lane % 4 * 2;
            float sums[64], total[64];
#pragma unroll
            for (int i = 0; i < 64; ++i) sums[i] = 0.0f;
            for (int span = 0; span < steps; span += kFlush) {
                const int end = min(span + kFlush, steps);
#pragma unroll
                for (int i = 0; i < 64; ++i) total[i] = 0.0f;
                for (int first = span; first < end; first += kPromote) {
                    const int chain = min(kPromote, end - first);
                    int read = stage;
                    for (int step = 0; step < chain; ++step, next()) {
                        sm90::barrier_wait(full + 8 * stage, phase);
                        const std::uint32_t from = stages + stage * kStageBytes;
                        const std::uint64_t a = sm90::operand(from + half * kBoxBytes, kBoxBytes);
                        const std::uint64_t b = sm90::operand(from + 2 * kBoxBytes, kBoxBytes);
                        sm90::wgmma_fence();
#pragma unroll
                        for (int k = 0; k < kStep / 16; ++k)  // 16 k are 2,048 bytes
                            sm90::wgmma(sums, a + k * 128, b + k * 128, step > 0 || k > 0, Key());
                        sm90::wgmma_commit();
                        // The product before this one is done: what it read may be overwritten.
                        sm90::wgmma_wait<1>();
                        if (step > 0) release(read);
                        read = stage;
                    }
                    sm90::wgmma_wait<0>();
                    release(read);
#pragma unroll
                    for (int i = 0; i < 64; ++i) total[i] += sums[i];
                }
#pragma unroll
                for (int i = 0; i < 64; i += 2) {
                    // Of each 8 columns a thread holds two, in two rows 8 apart.
                    const int r = row + (i / 2 % 2) * 8, c = column + i / 4 * 8;
                    if (r < d && c <= r)
                        add_pair(master + r * master_stride + c, total[i], total[i + 1], c + 1 <= r);
                }
            }
        }
    }
    // A block that is done still receives what the other one fetches for both, and its arrivals.
    sm90::cluster_sync();
}

// Rows rows[0 .. count) of keys one after the other, then zeros up to a whole step.
__global__ void gather_kernel(const uint4* __restrict__ keys, std::int64_t stride, std::int64_t layer_stride,
                              const std::int32_t* __restrict__ rows, const std::int32_t* __restrict__ count,
                              int chunks, uint4* __restrict__ staging, std::int64_t staging_layer) {
    const int row = blockIdx.x, kept = *count;
    if (row >= (kept + kStep - 1) / kStep * kStep) return;
    const uint4* from = keys + blockIdx.y * layer_stride + (row < kept ? rows[row] * stride : 0);
    uint4* to = staging + blockIdx.y * staging_layer + static_cast<std::int64_t>(row) * chunks;
    for (int i = threadIdx.x; i < chunks; i += blockDim.x)
        to[i] = row < kept ? from[i] : make_uint4(0, 0, 0, 0);
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                            CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

cudaError_t tensor_map(const SecondMomentCuda& args, const void* keys, std::int64_t stride,
                       std::int64_t layer_stride, int tokens, CUtensorMap* map) {
    // Asked of the driver at run time: the module links no libcuda and imports where there is none.
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
    if (error != cudaSuccess) return cudaGetLastError(), error;
    if (status != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    const cuuint64_t size[] = {static_cast<cuuint64_t>(args.d), static_cast<cuuint64_t>(tokens),
                               static_cast<cuuint64_t>(args.layers)};
    // With one layer its stride is never followed, but must still be one that the driver takes.
    const std::int64_t outer = args.layers > 1 ? layer_stride : stride * tokens;
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride * 2), static_cast<cuuint64_t>(outer * 2)};
    const cuuint32_t box[] = {kBox, kStep, 1}, unit[] = {1, 1, 1};
    const CUresult made = reinterpret_cast<Encode>(found)(
        map, args.bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
        const_cast<void*>(keys), size, strides, box, unit, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return made == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename Key, typename Master>
cudaError_t launch(const SecondMomentCuda& args, const CUtensorMap& map, int multiprocessors,
                   cudaStream_t stream) {
    const auto kernel = second_moment_sm90_kernel<Key, Master>;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
    if (error != cudaSuccess) return cudaGetLastError(), error;
    const int tiles = (args.d + kTile - 1) / kTile, groups = (tiles + kGroup - 1) / kGroup;
    const int pieces = 16 * groups * groups + 4 * groups;
    const int clusters = std::min(multiprocessors / 2, pieces * args.layers);
    kernel<<<2 * clusters, kThreads, kShared, stream>>>(map, args.count, args.tokens, args.d, args.layers,
                                                        pieces, static_cast<Master*>(args.master),
                                                        args.master_stride, args.master_layer_stride);
    return launch_error();
}

}  // namespace

cudaError_t second_moment_sm90(const SecondMomentCuda& args, cudaStream_t stream) {
    if (args.tokens == 0 || args.d == 0 || args.layers == 0) return cudaSuccess;
    int device = 0, multiprocessors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return cudaGetLastError(), error;

    const void* keys = args.keys;
    std::int64_t stride = args.key_stride, layer_stride = args.key_layer_stride;
    int tokens = args.tokens;
    if (args.count != nullptr) {
        tokens = (args.tokens + kStep - 1) / kStep * kStep;
        const int chunks = args.d / 8;  // of 16 bytes; d is a multiple of 8
        gather_kernel<<<dim3(tokens, args.layers), 256, 0, stream>>>(
            static_cast<const uint4*>(args.keys), stride / 8, layer_stride / 8, args.rows, args.count, chunks,
            static_cast<uint4*>(args.staging), static_cast<std::int64_t>(tokens) * chunks);
        error = launch_error();
        if (error != cudaSuccess) return error;
        keys = args.staging;
        stride = args.d;
        layer_stride = static_cast<std::int64_t>(tokens) * args.d;
    }
    CUtensorMap map;
    error = tensor_map(args, keys, stride, layer_stride, tokens, &map);
    if (error != cudaSuccess) return error;
    if (args.bfloat16)
        return args.master_float64 ? launch<__nv_bfloat16, double>(args, map, multiprocessors, stream)
                                   : launch<__nv_bfloat16, float>(args, map, multiprocessors, stream);
    return args.master_float64 ? launch<__half, double>(args, map, multiprocessors, stream)
                               : launch<__half, float>(args, map, multiprocessors, stream);
}

}  // namespace fastedit
