// The inner kernels of the editor network, compiled once per instruction-set level (see cpu/isa.h).

#include <cstddef>
#include <cstdint>

#include "cpu/lowrank_transform.h"
#include "cpu/vector.h"

namespace fastedit {
namespace FASTEDIT_LEVEL {
namespace {

// out[j] = (row[j] - mean[j]) / deviation[j]; without a mean only widened.
template <typename T>
inline void normalise(const T* row, const float* mean, const float* deviation, float* out, std::int64_t n) {
    constexpr std::int64_t kBlock = 256;
    float wide[kBlock];
    for (std::int64_t first = 0; first < n; first += kBlock) {
        const std::int64_t count = n - first < kBlock ? n - first : kBlock;
        widen_row(row + first, wide, count);
        if (mean == nullptr) {
            __builtin_memcpy(out + first, wide, static_cast<std::size_t>(count) * sizeof(float));
            continue;
        }
        for (std::int64_t j = 0; j < count; ++j)
            out[first + j] = (wide[j] - mean[first + j]) / deviation[first + j];
    }
}

// Sums of kWeights rows of the weight times kRows rows, over the whole depth.
template <int kWeights, int kRows>
inline void dots(const ProductArgs& args, std::int64_t column, std::int64_t row) {
    const float *weights[kWeights], *rows[kRows];
    for (int w = 0; w < kWeights; ++w) weights[w] = args.weight + (column + w) * args.weight_stride;
    for (int r = 0; r < kRows; ++r) rows[r] = args.rows + (row + r) * args.row_stride;
    Vector sums[kRows][kWeights] = {};
    std::int64_t k = 0;
    for (; k + kLanes <= args.depth; k += kLanes) {
        Vector weight[kWeights];
        for (int w = 0; w < kWeights; ++w) weight[w] = load(weights[w] + k);
        for (int r = 0; r < kRows; ++r) {
            const Vector x = load(rows[r] + k);
            for (int w = 0; w < kWeights; ++w) sums[r][w] += x * weight[w];
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int w = 0; w < kWeights; ++w) {
            float sum = sum_of(sums[r][w]);
            for (std::int64_t rest = k; rest < args.depth; ++rest) sum += rows[r][rest] * weights[w][rest];
            args.out[(row + r) * args.out_stride + column + w] = sum;
        }
    }
}

template <int kWeights>
inline void column_block(const ProductArgs& args, std::int64_t column) {
    std::int64_t row = 0;
    for (; row + 4 <= args.n; row += 4) dots<kWeights, 4>(args, column, row);
    for (; row < args.n; ++row) dots<kWeights, 1>(args, column, row);
}

}  // namespace

void lowrank_normalise_row(const NormaliseArgs& args, std::int64_t row) {
    const std::int64_t d = args.parts[0].width + args.parts[1].width;
    const std::int64_t module = args.mode == nullptr ? 0 : args.mode[row];
    const float* mean = args.mean == nullptr ? nullptr : args.mean + module * d;
    const float* deviation = args.mean == nullptr ? nullptr : args.deviation + module * d;
    float* out = args.z + row * d;
    for (const RowMatrix& part : args.parts) {
        switch (part.type) {
            case RowType::kFloat32:
                normalise(static_cast<const float*>(part.data) + row * part.stride, mean, deviation, out,
                          part.width);
                break;
            case RowType::kBFloat16:
                normalise(static_cast<const BFloat16*>(part.data) + row * part.stride, mean, deviation, out,
                          part.width);
                break;
            case RowType::kFloat16:
                normalise(static_cast<const Float16*>(part.data) + row * part.stride, mean, deviation, out,
                          part.width);
                break;
            case RowType::kFloat64:  // left to the eager default
                break;
        }
        out += part.width;
        if (mean != nullptr) mean += part.width, deviation += part.width;
    }
}

void lowrank_residual_row(const ResidualArgs& args, std::int64_t row) {
    const std::int64_t d = args.d, module = args.mode == nullptr ? 0 : args.mode[row];
    float *z = args.z + row * d, *a = args.a + row * d;
    const float *scale = args.scale + module * d, *shift = args.shift + module * d, *bias = args.bias;
    // NaN is kept, as torch's clamp keeps it: it is not < 0.
    if (args.clamp_first) {
        for (std::int64_t j = 0; j < d; ++j) {
            const float sum = a[j] + bias[j];
            a[j] = sum;
            z[j] = z[j] + scale[j] * (sum < 0.0f ? 0.0f : sum) + shift[j];
        }
    } else {
        for (std::int64_t j = 0; j < d; ++j) {
            const float sum = a[j] + bias[j];
            a[j] = sum;
            const float out = scale[j] * sum + shift[j];
            z[j] = z[j] + (out < 0.0f ? 0.0f : out);
        }
    }
}

void lowrank_residual_backward_columns(const ResidualBackwardArgs& args, std::int64_t first,
                                       std::int64_t last) {
    const std::int64_t d = args.d;
    for (std::int64_t j = first; j < last; ++j) args.dbias[j] = 0.0f;
    for (std::int64_t module = 0; module < args.modules; ++module)
        for (std::int64_t j = first; j < last; ++j)
            args.dscale[module * d + j] = args.dshift[module * d + j] = 0.0f;
    for (std::int64_t row = 0; row < args.n; ++row) {
        const std::int64_t table = args.mode == nullptr ? 0 : args.mode[row] * d;
        const float *dz = args.dz + row * d, *a = args.a + row * d;
        const float *scale = args.scale + table, *shift = args.shift + table;
        float *da = args.da + row * d, *dscale = args.dscale + table, *dshift = args.dshift + table;
        float* dbias = args.dbias;
        // Selections, not products with a mask: a NaN that the clamp cut off must not come back.
        if (args.clamp_first) {
            for (std::int64_t j = first; j < last; ++j) {
                const bool on = a[j] >= 0.0f;
                const float gradient = on ? dz[j] * scale[j] : 0.0f;
                dscale[j] += a[j] < 0.0f ? 0.0f : dz[j] * a[j];
                dshift[j] += dz[j];
                dbias[j] += gradient;
                da[j] = gradient;
            }
        } else {
            for (std::int64_t j = first; j < last; ++j) {
                const float of_shift = scale[j] * a[j] + shift[j] >= 0.0f ? dz[j] : 0.0f;
                const float gradient = of_shift * scale[j];
                dscale[j] += of_shift == 0.0f ? 0.0f : of_shift * a[j];
                dshift[j] += of_shift;
                dbias[j] += gradient;
                da[j] = gradient;
            }
        }
    }
}

void lowrank_product_columns(const ProductArgs& args, std::int64_t first, std::int64_t last) {
    std::int64_t column = first;
    for (; column + 4 <= last; column += 4) column_block<4>(args, column);
    for (; column < last; ++column) column_block<1>(args, column);
}

}  // namespace FASTEDIT_LEVEL
}  // namespace fastedit
