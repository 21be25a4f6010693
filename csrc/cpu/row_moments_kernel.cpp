// The inner kernel of the running moments, compiled once per instruction-set level (see cpu/isa.h).

#include <cstddef>
#include <cstdint>

#include "cpu/row_moments.h"
#include "cpu/vector.h"

namespace fastedit {
namespace FASTEDIT_LEVEL {
namespace {

// Rows that are widened into the first-level cache and summed twice there: for their mean, then around it.
constexpr std::int64_t kChunk = 32;
constexpr std::int64_t kWidth = kRowMomentsColumns;

// As many doubles as a register holds: GCC 12 takes wider conversions apart.
constexpr int kPair = kLanes / 2;
typedef double Doubles __attribute__((vector_size(8 * kPair)));
typedef double UnalignedDoubles __attribute__((vector_size(8 * kPair), aligned(8), may_alias));
typedef float Floats __attribute__((vector_size(4 * kPair), aligned(4), may_alias));

inline Doubles doubles(const float* from) {
    return __builtin_convertvector(*reinterpret_cast<const Floats*>(from), Doubles);
}
inline Doubles doubles(const double* from) {
    return *reinterpret_cast<const UnalignedDoubles*>(from);
}

struct Moments {
    std::int64_t count = 0;
    double mean[kWidth] = {}, m2[kWidth] = {};

    // Takes over `rows` rows with mean `of` and squared deviations `spread`.
    void merge(std::int64_t rows, const double* of, const double* spread, double inflation, std::int64_t n) {
        const double share = static_cast<double>(rows) / static_cast<double>(count + rows);
        const double weight = static_cast<double>(count) * share;
        for (std::int64_t j = 0; j < n; ++j) {
            const double shift = of[j] - mean[j];
            mean[j] += shift * share;
            m2[j] += spread[j] * inflation + shift * shift * weight;
        }
        count += rows;
    }
};

inline void widen_row(const double* from, double* to, std::int64_t n) {
    __builtin_memcpy(to, from, static_cast<std::size_t>(n) * sizeof(double));
    for (std::int64_t j = n; j < padded(n); ++j) to[j] = 0.0;
}
template <typename T>
struct Wide {
    using Type = float;
};
template <>
struct Wide<double> {
    using Type = double;
};

template <typename T>
inline void add_chunk(const T* from, std::int64_t stride, std::int64_t rows, const std::uint8_t* mask,
                      std::int64_t n, Moments& batch) {
    typename Wide<T>::Type wide[kChunk][kWidth];
    double mean[kWidth], spread[kWidth];
    std::int64_t count = 0;
    for (std::int64_t row = 0; row < rows; ++row)
        if (mask == nullptr || mask[row] != 0) widen_row(from + row * stride, wide[count++], n);
    if (count == 0) return;
    for (std::int64_t j = 0; j < n; j += kPair) {
        Doubles sum = {}, squares = {};
        for (std::int64_t row = 0; row < count; ++row) sum += doubles(wide[row] + j);
        sum /= static_cast<double>(count);
        for (std::int64_t row = 0; row < count; ++row) {
            const Doubles away = doubles(wide[row] + j) - sum;
            squares += away * away;
        }
        *reinterpret_cast<UnalignedDoubles*>(mean + j) = sum;
        *reinterpret_cast<UnalignedDoubles*>(spread + j) = squares;
    }
    batch.merge(count, mean, spread, 1.0, n);
}

template <typename T, typename State>
void columns_of(const RowMomentsArgs& args, int part, std::int64_t first, std::int64_t n) {
    const RowMatrix& matrix = args.parts[part];
    const T* rows = static_cast<const T*>(matrix.data) + first;
    const std::int64_t column = first + (part == 0 ? 0 : args.parts[0].width);
    const std::int64_t d = args.parts[0].width + args.parts[1].width;
    State* mean = static_cast<State*>(args.mean) + column * args.mean_stride;
    State* m2 = static_cast<State*>(args.m2) + column * args.m2_stride;
    State* means = static_cast<State*>(args.means) + column;
    State* m2s = static_cast<State*>(args.m2s) + column;
    const std::uint8_t* mask = args.mask;
    Moments state;
    state.count = *args.count;
    for (std::int64_t j = 0; state.count > 0 && j < n; ++j) {
        state.mean[j] = static_cast<double>(mean[j * args.mean_stride]);
        state.m2[j] = static_cast<double>(m2[j * args.m2_stride]);
    }
    for (std::int64_t index = 0; index < args.batch_count; ++index, means += d, m2s += d) {
        const std::int64_t size = args.batches[index];
        Moments batch;
        for (std::int64_t row = 0; row < size; row += kChunk)
            add_chunk(rows + row * matrix.stride, matrix.stride, size - row < kChunk ? size - row : kChunk,
                      mask == nullptr ? nullptr : mask + row, n, batch);
        rows += size * matrix.stride;
        if (mask != nullptr) mask += size;
        if (batch.count > 0) {
            const double b = static_cast<double>(batch.count);
            const double inflation = args.inflated && batch.count > 1 ? b / (b - 1.0) : 1.0;
            state.merge(batch.count, batch.mean, batch.m2, inflation, n);
        }
        for (std::int64_t j = 0; j < n; ++j) {
            // Rounded once per batch: the next one starts from what the state holds.
            means[j] = static_cast<State>(state.mean[j]), m2s[j] = static_cast<State>(state.m2[j]);
            state.mean[j] = static_cast<double>(means[j]), state.m2[j] = static_cast<double>(m2s[j]);
        }
    }
    for (std::int64_t j = 0; args.batch_count > 0 && j < n; ++j) {
        mean[j * args.mean_stride] = static_cast<State>(state.mean[j]);
        m2[j * args.m2_stride] = static_cast<State>(state.m2[j]);
    }
}

template <typename T>
void columns_of(const RowMomentsArgs& args, int part, std::int64_t first, std::int64_t n) {
    if (args.float64) return columns_of<T, double>(args, part, first, n);
    columns_of<T, float>(args, part, first, n);
}

}  // namespace

void row_moments_columns(const RowMomentsArgs& args, int part, std::int64_t first, std::int64_t last) {
    switch (args.parts[part].type) {
        case RowType::kFloat32:
            return columns_of<float>(args, part, first, last - first);
        case RowType::kBFloat16:
            return columns_of<BFloat16>(args, part, first, last - first);
        case RowType::kFloat16:
            return columns_of<Float16>(args, part, first, last - first);
        case RowType::kFloat64:
            return columns_of<double>(args, part, first, last - first);
    }
}

}  // namespace FASTEDIT_LEVEL
}  // namespace fastedit
