#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastedit {

struct SecondMomentCuda {
    const void* keys;  // [layers, tokens, d], 16-byte aligned rows
    bool bfloat16;     // else float16
    std::int64_t key_stride, key_layer_stride;
    const std::int32_t* rows;   // which rows of keys count, first those that do, or null for all
    const std::int32_t* count;  // on the device: how many of `rows`; null with rows
    std::int32_t tokens, d, layers;
    void* master;         // [layers, d, d]
    bool master_float64;  // else float32
    std::int64_t master_stride, master_layer_stride;
};

cudaError_t second_moment(const SecondMomentCuda& args, cudaStream_t stream);

}  // namespace fastedit
