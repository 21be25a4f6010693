#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastedit {

// Tokens of one step of the sm_90 kernel; `staging` has room for the tokens rounded up to a multiple of it.
constexpr int kSecondMomentStep = 64;

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
    void* staging;  // [layers, tokens rounded up, d] of the keys' type with `rows`, for second_moment_sm90;
                    // or null
};

// Any device from sm_80 on.
cudaError_t second_moment(const SecondMomentCuda& args, cudaStream_t stream);

// Devices of compute capability 9.x only.
cudaError_t second_moment_sm90(const SecondMomentCuda& args, cudaStream_t stream);

}  // namespace fastedit
