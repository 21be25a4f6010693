#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastedit {

// Ranks the kernel takes: it keeps its columns of the right factor in registers.
constexpr int kRankUpdateMost = 8;

struct RankUpdateCuda {
    void* weight;     // [rows, columns], unit column stride
    int weight_type;  // 0 float32, 1 bfloat16, 2 float16, 3 float64
    std::int64_t weight_stride;
    const void* left;   // [rows, rank], contiguous
    const void* right;  // [rank, columns], contiguous
    bool float64;  // type of both factors and of the sum, else float32; half-precision weights take float32
    std::int64_t rows, columns;
    int rank;
    double alpha;
};

cudaError_t rank_update(const RankUpdateCuda& args, cudaStream_t stream);

}  // namespace fastedit
