// What every launcher returns to Python: an error code, never an abort.
#pragma once

#include <cuda_runtime_api.h>

namespace fastedit {

// The error of the last launch, cleared, so that it is reported by the call that caused it and by no later
// one.
inline cudaError_t launch_error() {
    return cudaGetLastError();
}

}  // namespace fastedit
