// Rows of any float type, as Python hands them over.
#pragma once

#include <cstdint>

namespace fastedit {

enum class RowType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// A [rows, width] matrix of unit column stride.
struct RowMatrix {
    const void* data;
    RowType type;
    std::int64_t stride, width;
};

}  // namespace fastedit
