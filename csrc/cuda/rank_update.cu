// W += alpha left right for up to kRankUpdateMost ranks: bound by reading and writing W once.
//
// A thread owns 16 bytes of columns. Its part of the right factor stays in registers while it walks down the
// rows of its block, whose part of the left factor lies in shared memory; four rows are in flight at a time.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/rank_update.h"

namespace fastedit {
namespace {

constexpr int kThreads = 256, kRows = 64, kFlight = 4;

template <typename Weight, int kWidth>
struct alignas(sizeof(Weight) * kWidth) Vector {
    Weight at[kWidth];
};

__device__ inline float widen(float value) {
    return value;
}
__device__ inline double widen(double value) {
    return value;
}
__device__ inline float widen(__nv_bfloat16 value) {
    return __bfloat162float(value);
}
__device__ inline float widen(__half value) {
    return __half2float(value);
}
template <typename Sum>
__device__ inline void narrow(Sum value, float& out) {
    out = static_cast<float>(value);
}
__device__ inline void narrow(double value, double& out) {
    out = value;
}
__device__ inline void narrow(float value, __nv_bfloat16& out) {
    out = __float2bfloat16_rn(value);
}
__device__ inline void narrow(float value, __half& out) {
    out = __float2half_rn(value);
}

template <typename Weight, typename Sum, int kRank, int kWidth>
__global__ void __launch_bounds__(kThreads)
    rank_update_kernel(Weight* __restrict__ weight, std::int64_t stride, const Sum* __restrict__ left,
                       const Sum* __restrict__ right, std::int64_t rows, std::int64_t columns, int rank,
                       Sum alpha) {
    __shared__ Sum scaled[kRows][kRank];
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.y) * kRows;
    const int count = static_cast<int>(min(static_cast<std::int64_t>(kRows), rows - first));
    for (int i = threadIdx.x; i < kRows * kRank; i += kThreads) {
        const int r = i / kRank, k = i % kRank;
        scaled[r][k] = r < count && k < rank ? alpha * left[(first + r) * rank + k] : Sum(0);
    }
    __syncthreads();
    // Columns are a multiple of kWidth, so a thread has all of its own or none.
    const std::int64_t column = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
    if (column >= columns) return;

    Sum own[kRank][kWidth];
#pragma unroll
    for (int k = 0; k < kRank; ++k)
#pragma unroll
        for (int j = 0; j < kWidth; ++j) own[k][j] = k < rank ? right[k * columns + column + j] : Sum(0);

    using Chunk = Vector<Weight, kWidth>;
    for (int r = 0; r < count; r += kFlight) {
        Chunk chunk[kFlight];
#pragma unroll
        for (int i = 0; i < kFlight; ++i)
            if (r + i < count)
                chunk[i] = *reinterpret_cast<const Chunk*>(weight + (first + r + i) * stride + column);
#pragma unroll
        for (int i = 0; i < kFlight; ++i) {
            if (r + i >= count) break;
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                Sum sum = static_cast<Sum>(widen(chunk[i].at[j]));
#pragma unroll
                for (int k = 0; k < kRank; ++k) sum += scaled[r + i][k] * own[k][j];
                narrow(sum, chunk[i].at[j]);
            }
            *reinterpret_cast<Chunk*>(weight + (first + r + i) * stride + column) = chunk[i];
        }
    }
}

template <typename Weight, typename Sum, int kRank, int kWidth>
cudaError_t launch(const RankUpdateCuda& args, cudaStream_t stream) {
    const std::int64_t across = static_cast<std::int64_t>(kThreads) * kWidth;
    // The second grid dimension ends at 65535: taller weights go in several launches.
    constexpr std::int64_t kMost = std::int64_t{65535} * kRows;
    for (std::int64_t first = 0; first < args.rows; first += kMost) {
        const std::int64_t rows = std::min(kMost, args.rows - first);
        const dim3 grid(static_cast<unsigned>((args.columns + across - 1) / across),
                        static_cast<unsigned>((rows + kRows - 1) / kRows));
        rank_update_kernel<Weight, Sum, kRank, kWidth><<<grid, kThreads, 0, stream>>>(
            static_cast<Weight*>(args.weight) + first * args.weight_stride, args.weight_stride,
            static_cast<const Sum*>(args.left) + first * args.rank, static_cast<const Sum*>(args.right), rows,
            args.columns, args.rank, static_cast<Sum>(args.alpha));
        const cudaError_t error = launch_error();
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

template <typename Weight, typename Sum>
cudaError_t by_rank(const RankUpdateCuda& args, cudaStream_t stream) {
    constexpr int kWidth = 16 / static_cast<int>(sizeof(Weight));
    const bool aligned = reinterpret_cast<std::uintptr_t>(args.weight) % 16 == 0 &&
                         args.weight_stride % kWidth == 0 && args.columns % kWidth == 0;
    if (!aligned) return launch<Weight, Sum, kRankUpdateMost, 1>(args, stream);
    if (args.rank == 1) return launch<Weight, Sum, 1, kWidth>(args, stream);
    if (args.rank <= 4) return launch<Weight, Sum, 4, kWidth>(args, stream);
    return launch<Weight, Sum, kRankUpdateMost, kWidth>(args, stream);
}

}  // namespace

cudaError_t rank_update(const RankUpdateCuda& args, cudaStream_t stream) {
    if (args.rows == 0 || args.columns == 0 || args.rank == 0) return cudaSuccess;
    if (args.rank > kRankUpdateMost) return cudaErrorInvalidValue;
    switch (args.weight_type) {
        case 0:
            return args.float64 ? by_rank<float, double>(args, stream) : by_rank<float, float>(args, stream);
        case 1:
            return by_rank<__nv_bfloat16, float>(args, stream);
        case 2:
            return by_rank<__half, float>(args, stream);
        case 3:
            return by_rank<double, double>(args, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace fastedit
