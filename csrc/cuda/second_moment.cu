// C += K^T diag(m) K on the lower triangle, bf16 or fp16 keys, fp32 or fp64 C, tensor cores from sm_80 on.
//
// One block per 128 x 128 tile of the triangle and layer. Both operands are slices of the same [tokens, d]
// keys, so nothing is transposed: the left one is read as column-major, the right one as row-major. Masked
// rows are skipped by a list of row numbers. Tensor-core accumulators do not round to nearest and their bias
// grows with the length of the chain, so every kPromote tokens they are added to a second fp32 accumulator in
// registers, and that one goes to C every kFlush tokens. Tiles own their part of C: the result is the same on
// every run.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <mma.h>

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/second_moment.h"

namespace fastedit {
namespace {

namespace wmma = nvcuda::wmma;

constexpr int kTile = 128, kDepth = 32, kStages = 4, kThreads = 256;
constexpr int kPromote = 1024, kFlush = 8192;
constexpr int kPitch = kTile + 8;          // of a row in shared memory: 8 more keys, against bank conflicts
constexpr int kOperand = kDepth * kPitch;  // keys of one operand and stage
constexpr int kOutPitch = kTile + 4;
constexpr int kWarpRows = 32, kWarpColumns = 64;
constexpr int kShared = std::max(kStages * 2 * kOperand * 2, kTile * kOutPitch * 4);

template <typename Key>
__device__ void load_tile(const Key* keys, std::int64_t stride, const std::int32_t* rows, int tokens,
                          int first, int d, int column, Key* shared) {
    constexpr int kChunk = 8, kChunks = kTile / kChunk;  // 16-byte copies
    for (int i = threadIdx.x; i < kDepth * kChunks; i += kThreads) {
        const int t = i / kChunks, c = i % kChunks * kChunk;
        const bool inside = first + t < tokens && column + c < d;  // d is a multiple of kChunk
        const std::int64_t row = !inside ? 0 : rows != nullptr ? rows[first + t] : first + t;
        const Key* from = keys + (inside ? row * stride + column + c : 0);
        __pipeline_memcpy_async(shared + t * kPitch + c, from, 16, inside ? 0 : 16);
    }
}

template <typename Key, typename Master>
__global__ void __launch_bounds__(kThreads)
    second_moment_kernel(const Key* __restrict__ all_keys, std::int64_t stride, std::int64_t layer_stride,
                         const std::int32_t* __restrict__ rows, const std::int32_t* __restrict__ count,
                         int tokens, int d, Master* __restrict__ all_masters, std::int64_t master_stride,
                         std::int64_t master_layer_stride) {
    extern __shared__ __align__(128) unsigned char memory[];
    Key* operands = reinterpret_cast<Key*>(memory);
    float* out = reinterpret_cast<float*>(memory);

    // Tile (row, column) of the triangle from its number; the float root is corrected to be exact.
    const int index = blockIdx.x;
    int row = static_cast<int>((sqrtf(8.0f * index + 1.0f) - 1.0f) * 0.5f);
    while ((row + 1) * (row + 2) / 2 <= index) ++row;
    while (row * (row + 1) / 2 > index) --row;
    const int left = row * kTile, right = (index - row * (row + 1) / 2) * kTile;
    const bool diagonal = left == right;

    const Key* keys = all_keys + blockIdx.y * layer_stride;
    Master* master = all_masters + blockIdx.y * master_layer_stride;
    if (count != nullptr) tokens = *count;

    const int warp = threadIdx.x / 32;
    const int warp_row = warp % 4 * kWarpRows, warp_column = warp / 4 * kWarpColumns;
    constexpr int kM = kWarpRows / 16, kN = kWarpColumns / 16;
    using Sum = wmma::fragment<wmma::accumulator, 16, 16, 16, float>;

    for (int span = 0; span < tokens; span += kFlush) {
        const int end = min(span + kFlush, tokens);
        const int steps = (end - span + kDepth - 1) / kDepth;
        Sum sums[kM][kN], total[kM][kN];
        for (int m = 0; m < kM; ++m)
            for (int n = 0; n < kN; ++n) {
                wmma::fill_fragment(sums[m][n], 0.0f);
                wmma::fill_fragment(total[m][n], 0.0f);
            }

        const auto fetch = [&](int step) {
            if (step < steps) {
                Key* stage = operands + step % kStages * 2 * kOperand;
                load_tile(keys, stride, rows, end, span + step * kDepth, d, left, stage);
                if (!diagonal)
                    load_tile(keys, stride, rows, end, span + step * kDepth, d, right, stage + kOperand);
            }
            __pipeline_commit();  // an empty group keeps the count of groups in flight constant
        };
        for (int step = 0; step < kStages - 1; ++step) fetch(step);

        for (int step = 0; step < steps; ++step) {
            __pipeline_wait_prior(kStages - 2);
            __syncthreads();  // this stage has arrived for all, and the one fetched next is read by none
            fetch(step + kStages - 1);
            const Key* a = operands + step % kStages * 2 * kOperand;
            const Key* b = diagonal ? a : a + kOperand;
            for (int k = 0; k < kDepth; k += 16) {
                wmma::fragment<wmma::matrix_a, 16, 16, 16, Key, wmma::col_major> fa[kM];
                for (int m = 0; m < kM; ++m)
                    wmma::load_matrix_sync(fa[m], a + k * kPitch + warp_row + 16 * m, kPitch);
                for (int n = 0; n < kN; ++n) {
                    wmma::fragment<wmma::matrix_b, 16, 16, 16, Key, wmma::row_major> fb;
                    wmma::load_matrix_sync(fb, b + k * kPitch + warp_column + 16 * n, kPitch);
                    for (int m = 0; m < kM; ++m) wmma::mma_sync(sums[m][n], fa[m], fb, sums[m][n]);
                }
            }
            if ((step + 1) % (kPromote / kDepth) == 0 || step + 1 == steps) {
                for (int m = 0; m < kM; ++m)
                    for (int n = 0; n < kN; ++n) {
                        for (int i = 0; i < sums[m][n].num_elements; ++i) total[m][n].x[i] += sums[m][n].x[i];
                        wmma::fill_fragment(sums[m][n], 0.0f);
                    }
            }
        }

        __pipeline_wait_prior(0);
        __syncthreads();
        for (int m = 0; m < kM; ++m)
            for (int n = 0; n < kN; ++n)
                wmma::store_matrix_sync(out + (warp_row + 16 * m) * kOutPitch + warp_column + 16 * n,
                                        total[m][n], kOutPitch, wmma::mem_row_major);
        __syncthreads();
        for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
            const int r = i / kTile, c = i % kTile;
            const int gr = left + r, gc = right + c;
            if (gr < d && gc <= gr)
                master[gr * master_stride + gc] += static_cast<Master>(out[r * kOutPitch + c]);
        }
        __syncthreads();  // before the next span writes the same memory
    }
}

template <typename Key, typename Master>
cudaError_t launch(const SecondMomentCuda& args, cudaStream_t stream) {
    const auto kernel = second_moment_kernel<Key, Master>;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
    if (error != cudaSuccess) return cudaGetLastError(), error;
    const int tiles = (args.d + kTile - 1) / kTile;
    const dim3 grid(tiles * (tiles + 1) / 2, args.layers);
    kernel<<<grid, kThreads, kShared, stream>>>(
        static_cast<const Key*>(args.keys), args.key_stride, args.key_layer_stride, args.rows, args.count,
        args.tokens, args.d, static_cast<Master*>(args.master), args.master_stride, args.master_layer_stride);
    return launch_error();
}

}  // namespace

cudaError_t second_moment(const SecondMomentCuda& args, cudaStream_t stream) {
    if (args.tokens == 0 || args.d == 0 || args.layers == 0) return cudaSuccess;
    if (args.bfloat16)
        return args.master_float64 ? launch<__nv_bfloat16, double>(args, stream)
                                   : launch<__nv_bfloat16, float>(args, stream);
    return args.master_float64 ? launch<__half, double>(args, stream) : launch<__half, float>(args, stream);
}

}  // namespace fastedit
