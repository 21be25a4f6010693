// The inner kernels of the attention of branches, compiled once per instruction-set level (see cpu/isa.h).
//
// Queries, keys and values are rows of d floats, found by pointer: float32 rows are read where they are,
// others are widened into scratch memory that stays in cache. Two register tiles of kRows x 4 vectors do the
// work: products of rows with rows, and sums of rows with weights. What a query sees is one range of the
// keys, [first, last).

#include <cstddef>
#include <cstdint>

#include "cpu/branch_attention.h"
#include "cpu/vector.h"

namespace fastedit {
namespace FASTEDIT_LEVEL {
namespace {

constexpr int kRows = kLanes == 16 ? 6 : 3;  // with 4 columns, the tile for 32 or 16 registers
// Tokens often lie a page apart, where few rows of one head fit in the first-level cache together: keys and
// values that so many queries read are copied.
constexpr std::int64_t kMostInPlace = 32;
constexpr int kBlock = 24;  // queries whose weights are kept for the gradients of the keys

// Towards the same token's next head, which the next unit reads: tokens lie too far apart for the hardware to
// guess.
inline void prefetch(const BranchRows& x, std::int64_t at, std::int64_t d) {
    const std::int64_t size = x.type == BranchType::kFloat32 ? 4 : 2;
    const std::uintptr_t from =
        reinterpret_cast<std::uintptr_t>(x.data) + static_cast<std::uintptr_t>(at * size);
    for (std::uintptr_t byte = 0; byte < static_cast<std::uintptr_t>(d * size); byte += 64)
        __builtin_prefetch(reinterpret_cast<const void*>(from + byte));
}

// The row of a token and head: in place if it can and may be, else widened into scratch.
inline const float* row(const BranchRows& x, std::int64_t token, std::int64_t head, std::int64_t d,
                        bool in_place, float* scratch) {
    const std::int64_t at = token * x.token_stride + head * x.head_stride;
    prefetch(x, at + x.head_stride, d);
    switch (x.type) {
        case BranchType::kFloat32:
            if (d % kLanes == 0 && in_place) return static_cast<const float*>(x.data) + at;
            widen_row(static_cast<const float*>(x.data) + at, scratch, d);
            break;
        case BranchType::kBFloat16:
            widen_row(static_cast<const BFloat16*>(x.data) + at, scratch, d);
            break;
        case BranchType::kFloat16:
            widen_row(static_cast<const Float16*>(x.data) + at, scratch, d);
            break;
    }
    return scratch;
}

inline void put_row(const BranchRows& x, std::int64_t token, std::int64_t head, std::int64_t d,
                    const float* from) {
    const std::int64_t at = token * x.token_stride + head * x.head_stride;
    switch (x.type) {
        case BranchType::kFloat32:
            __builtin_memcpy(static_cast<float*>(x.data) + at, from,
                             static_cast<std::size_t>(d) * sizeof(float));
            break;
        case BranchType::kBFloat16:
            return narrow_row(from, static_cast<BFloat16*>(x.data) + at, d);
        case BranchType::kFloat16:
            return narrow_row(from, static_cast<Float16*>(x.data) + at, d);
    }
}

// to[r][j] = left[r] . right[j] for r < R and j in [first, last), up to three more on either side. d is
// padded; rows of `to` are `stride` floats apart; right can be read up to the next multiple of 4.
template <int R>
void dots(const float* const* left, const float* const* right, std::int64_t first, std::int64_t last,
          std::int64_t d, float* to, std::int64_t stride) {
    const float* l[R];
    for (int r = 0; r < R; ++r) l[r] = left[r];
    for (std::int64_t j = first / 4 * 4; j < last; j += 4) {
        Vector sum[R][4] = {};
        for (std::int64_t i = 0; i < d; i += kLanes) {
            Vector lefts[R];
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) lefts[r] = load(l[r] + i);
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c) {
                const Vector value = load(right[j + c] + i);
#pragma GCC unroll 6
                for (int r = 0; r < R; ++r) sum[r][c] += lefts[r] * value;
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) sum_lanes(sum[r], to + r * stride + j);
    }
}

// to[r][:] (+)= sum_t weight[r * row_step + t * term_step] rows[t][:], for columns [at, at + V vectors) of d.
template <int R, int V, bool kAdd>
inline void mix_columns(const float* weight, std::int64_t row_step, std::int64_t term_step,
                        const float* const* rows, std::int64_t terms, std::int64_t d, std::int64_t at,
                        float* to) {
    Vector sum[R][V] = {};
    for (std::int64_t t = 0; t < terms; ++t, weight += term_step) {
        const float* from = rows[t] + at;
        Vector weights[R];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) weights[r] = broadcast(weight[r * row_step]);
#pragma GCC unroll 4
        for (int c = 0; c < V; ++c) {
            const Vector value = load(from + c * kLanes);
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) sum[r][c] += weights[r] * value;
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < V; ++c) {
            float* place = to + r * d + at + c * kLanes;
            store(place, kAdd ? load(place) + sum[r][c] : sum[r][c]);
        }
    }
}

template <int R, bool kAdd>
void mix(const float* weight, std::int64_t row_step, std::int64_t term_step, const float* const* rows,
         std::int64_t terms, std::int64_t d, float* to) {
    std::int64_t at = 0;
    for (; at + 4 * kLanes <= d; at += 4 * kLanes)
        mix_columns<R, 4, kAdd>(weight, row_step, term_step, rows, terms, d, at, to);
    for (; at < d; at += kLanes) mix_columns<R, 1, kAdd>(weight, row_step, term_step, rows, terms, d, at, to);
}

template <int R>
struct Rows {
    static constexpr int count = R;
};

// body(Rows<n>) for a number of rows that is at most kRows.
template <typename Body>
inline void with_rows(std::int64_t rows, Body&& body) {
    switch (rows) {
        case 1:
            return body(Rows<1>{});
        case 2:
            return body(Rows<2>{});
        case 3:
            return body(Rows<3>{});
        case 4:
            return body(Rows < kRows<4 ? kRows : 4>{});
        case 5:
            return body(Rows < kRows<5 ? kRows : 5>{});
        case 6:
            return body(Rows<kRows>{});
    }
}

// Rows of the next tile, so that the tiles of `left` rows are about equal.
inline std::int64_t tile_rows(std::int64_t left) {
    const std::int64_t tiles = (left + kRows - 1) / kRows;
    return (left + tiles - 1) / tiles;
}

// One key head of one branch.
class Unit {
  public:
    Unit(const BranchAttentionArgs& args, std::int64_t branch, std::int64_t group, void* scratch)
        : args_(args),
          group_(group),
          d_(padded(args.d)),
          stride_(padded(args.most_keys)),
          repeat_(args.heads / args.groups),
          first_query_(args.q_starts[branch]),
          rows_((args.q_starts[branch + 1] - first_query_) * repeat_),
          first_own_(args.k_starts[branch]),
          own_(args.k_starts[branch + 1] - first_own_),
          columns_(args.columns + branch * args.width) {
        free_ = reinterpret_cast<std::uintptr_t>(scratch);
        keys_ = take<const float*>(args.most_keys + 3);
        values_ = take<const float*>(args.most_keys + 3);
        key_floats_ = take<float>(args.most_keys * d_);
        value_floats_ = take<float>(args.most_keys * d_);
        query_floats_ = take<float>(kBlock * d_);
        grad_floats_ = take<float>(kBlock * d_);
        weights_ = take<float>(kBlock * stride_);
        slopes_ = take<float>(stride_);
        changes_ = take<float>(kBlock * stride_);
        result_ = take<float>(kRows * d_);
        key_sums_ = take<float>(args.most_own * d_);
        value_sums_ = take<float>(args.most_own * d_);
    }

    // One past the scratch memory.
    std::uintptr_t end() const { return free_; }

    void forward() {
        if (rows_ == 0) return;
        find_keys();
        for (std::int64_t at = 0; at < rows_;) {
            const std::int64_t rows = tile_rows(rows_ - at);
            find_queries(at, rows, false);
            see(0, rows);
            with_rows(rows, [&](auto tile) {
                constexpr int R = decltype(tile)::count;
                dots<R>(queries_, keys_, first_, last_, d_, weights_, stride_);
                float factor[R];
                for (int r = 0; r < R; ++r)
                    factor[r] = soften(r, &args_.lse[token(at + r) * args_.heads + head(at + r)]);
                mix<R, false>(weights_ + first_, stride_, 1, values_ + first_, last_ - first_, d_, result_);
                for (int r = 0; r < R; ++r) {
                    float* row = result_ + r * d_;
                    for (std::int64_t i = 0; i < d_; i += kLanes) store(row + i, load(row + i) * factor[r]);
                    put_row(args_.out, token(at + r), head(at + r), args_.d, row);
                }
            });
            at += rows;
        }
    }

    void backward() {
        if (own_ == 0 && rows_ == 0) return;
        find_keys();
        __builtin_memset(key_sums_, 0, static_cast<std::size_t>(own_ * d_) * sizeof(float));
        __builtin_memset(value_sums_, 0, static_cast<std::size_t>(own_ * d_) * sizeof(float));
        for (std::int64_t begin = 0; begin < rows_; begin += kBlock) {
            const std::int64_t block = rows_ - begin < kBlock ? rows_ - begin : kBlock;
            find_queries(begin, block, true);
            for (std::int64_t at = 0; at < block;) {
                const std::int64_t rows = tile_rows(block - at);
                see(at, rows);
                with_rows(rows, [&](auto tile) { query_gradient<decltype(tile)::count>(begin, at); });
                at += rows;
            }
            see(0, block);
            key_gradient(block);
        }
        for (std::int64_t j = 0; j < own_; ++j) {
            put_row(args_.dk, first_own_ + j, group_, args_.d, key_sums_ + j * d_);
            put_row(args_.dv, first_own_ + j, group_, args_.d, value_sums_ + j * d_);
        }
    }

  private:
    template <typename T>
    T* take(std::int64_t count) {
        T* found = reinterpret_cast<T*>(free_);
        free_ += (static_cast<std::uintptr_t>(count) * sizeof(T) + 63) / 64 * 64;
        return found;
    }

    // Row of the unit -> query token and head. The heads of a token stand together: they see the same keys.
    std::int64_t token(std::int64_t at) const { return first_query_ + at / repeat_; }
    std::int64_t head(std::int64_t at) const { return group_ * repeat_ + at % repeat_; }

    void find_keys() {
        const bool in_place = rows_ <= kMostInPlace;
        prefix_ = 0;
        for (std::int64_t c = 0; c < args_.width; ++c) {
            if (columns_[c] < 0) continue;
            const std::int64_t to = prefix_ * d_;
            keys_[prefix_] = row(args_.k_prefix, columns_[c], group_, args_.d, in_place, key_floats_ + to);
            values_[prefix_] =
                row(args_.v_prefix, columns_[c], group_, args_.d, in_place, value_floats_ + to);
            ++prefix_;
        }
        count_ = prefix_ + own_;
        for (std::int64_t j = prefix_; j < count_; ++j) {
            const std::int64_t from = first_own_ + j - prefix_;
            keys_[j] = row(args_.k, from, group_, args_.d, in_place, key_floats_ + j * d_);
            values_[j] = row(args_.v, from, group_, args_.d, in_place, value_floats_ + j * d_);
        }
        for (int more = 0; more < 3 && count_ > 0; ++more) {
            keys_[count_ + more] = keys_[count_ - 1];
            values_[count_ + more] = values_[count_ - 1];
        }
    }

    void find_queries(std::int64_t begin, std::int64_t rows, bool with_grads) {
        for (std::int64_t r = 0; r < rows; ++r) {
            const std::int64_t from = token(begin + r), h = head(begin + r);
            queries_[r] = row(args_.q, from, h, args_.d, true, query_floats_ + r * d_);
            if (with_grads) grads_[r] = row(args_.grad, from, h, args_.d, true, grad_floats_ + r * d_);
            const std::int64_t place = prefix_ + args_.q_offsets[from];
            const std::int64_t since = args_.window > 0 ? place - args_.window + 1 : 0;
            lasts_[r] = place + 1 < 0 ? 0 : place + 1 < count_ ? place + 1 : count_;
            firsts_[r] = since < 0 ? 0 : since < lasts_[r] ? since : lasts_[r];
        }
    }

    // [first_, last_): what some of these rows see.
    void see(std::int64_t at, std::int64_t rows) {
        first_ = firsts_[at], last_ = lasts_[at];
        for (std::int64_t r = at + 1; r < at + rows; ++r) {
            first_ = firsts_[r] < first_ ? firsts_[r] : first_;
            last_ = lasts_[r] > last_ ? lasts_[r] : last_;
        }
    }

    // -1 in the lanes j, j + 1, ... that row r sees.
    Ints seen(std::int64_t r, std::int64_t j) const {
        Ints place;
        for (int lane = 0; lane < kLanes; ++lane) place[lane] = lane;
        return (place >= static_cast<std::int32_t>(firsts_[r] - j)) &
               (place < static_cast<std::int32_t>(lasts_[r] - j));
    }

    // Dot products to scores, and the slope of the cap.
    template <bool kCapped>
    Vector score(Vector dot, Vector* slope) const {
        Vector s = dot * static_cast<float>(args_.scale);
        if (kCapped) {
            const Vector t = tanh_of(s / static_cast<float>(args_.softcap));
            *slope = 1.0f - t * t;
            s = t * static_cast<float>(args_.softcap);
        }
        return s;
    }

    // Dot products of row r to weights that still lack the factor that is returned.
    float soften(std::int64_t r, float* lse) {
        return args_.softcap > 0 ? soften_row<true>(r, lse) : soften_row<false>(r, lse);
    }
    template <bool kCapped>
    float soften_row(std::int64_t r, float* lse) {
        float* row = weights_ + r * stride_;
        const std::int64_t begin = first_ / kLanes * kLanes;
        const Vector lowest = broadcast(-__builtin_inff());
        Vector most = lowest, sum = {}, slope;
        for (std::int64_t j = begin; j < last_; j += kLanes) {
            const Vector s = seen(r, j) ? score<kCapped>(load(row + j), &slope) : lowest;
            most = s > most ? s : most;
            store(row + j, s);
        }
        float peak = most_of(most);
        peak = peak == -__builtin_inff() ? 0.0f : peak;
        for (std::int64_t j = begin; j < last_; j += kLanes) {
            const Vector p = exponential(load(row + j) - peak);
            sum += p;
            store(row + j, p);
        }
        const float total = sum_of(sum);
        *lse = peak + __builtin_logf(total);
        return total == 0.0f ? 0.0f : 1.0f / total;
    }

    // For row r, products q k in weights_ and g v in changes_: to p and ds = scale p (g v - sum p g v) slope.
    template <bool kCapped>
    void differentiate(std::int64_t r, float lse) {
        float *weights = weights_ + r * stride_, *changes = changes_ + r * stride_;
        const std::int64_t begin = first_ / kLanes * kLanes;
        const std::int64_t end = (last_ + kLanes - 1) / kLanes * kLanes;
        Vector sum = {}, slope = {};
        for (std::int64_t j = begin; j < end; j += kLanes) {
            const Ints mask = seen(r, j);
            const Vector s = score<kCapped>(load(weights + j), &slope) - lse;
            const Vector p = exponential(mask ? s : broadcast(-__builtin_inff()));
            const Vector dp = mask ? load(changes + j) : Vector{};
            sum += p * dp;
            store(weights + j, p);
            store(changes + j, dp);
            if (kCapped) store(slopes_ + j, mask ? slope : Vector{});
        }
        const float mean = sum_of(sum), scale = static_cast<float>(args_.scale);
        for (std::int64_t j = begin; j < end; j += kLanes) {
            Vector ds = (load(changes + j) - mean) * load(weights + j) * scale;
            if (kCapped) ds *= load(slopes_ + j);
            store(changes + j, ds);
        }
        // Own keys that other rows of the block see.
        for (std::int64_t j = prefix_; j < begin; ++j) weights[j] = changes[j] = 0.0f;
        for (std::int64_t j = end; j < count_; ++j) weights[j] = changes[j] = 0.0f;
    }

    // Rows [at, at + R) of the block that begins at row `begin`; their weights are kept for key_gradient.
    template <int R>
    void query_gradient(std::int64_t begin, std::int64_t at) {
        float *weights = weights_ + at * stride_, *changes = changes_ + at * stride_;
        dots<R>(queries_ + at, keys_, first_, last_, d_, weights, stride_);
        dots<R>(grads_ + at, values_, first_, last_, d_, changes, stride_);
        for (int r = 0; r < R; ++r) {
            const std::int64_t from = begin + at + r;
            const float lse = args_.lse[token(from) * args_.heads + head(from)];
            if (args_.softcap > 0)
                differentiate<true>(at + r, lse);
            else
                differentiate<false>(at + r, lse);
        }
        mix<R, false>(changes + first_, stride_, 1, keys_ + first_, last_ - first_, d_, result_);
        for (int r = 0; r < R; ++r)
            put_row(args_.out, token(begin + at + r), head(begin + at + r), args_.d, result_ + r * d_);
    }

    // Adds what the rows of a block send to the own keys that they see.
    void key_gradient(std::int64_t block) {
        for (std::int64_t j = first_ > prefix_ ? first_ : prefix_; j < last_;) {
            const std::int64_t keys = tile_rows(last_ - j), to = (j - prefix_) * d_;
            with_rows(keys, [&](auto tile) {
                constexpr int R = decltype(tile)::count;
                mix<R, true>(changes_ + j, 1, stride_, queries_, block, d_, key_sums_ + to);
                mix<R, true>(weights_ + j, 1, stride_, grads_, block, d_, value_sums_ + to);
            });
            j += keys;
        }
    }

    const BranchAttentionArgs& args_;
    const std::int64_t group_, d_, stride_, repeat_;  // repeat_: query heads of a key head
    const std::int64_t first_query_, rows_, first_own_, own_;
    const std::int64_t* columns_;
    std::int64_t prefix_ = 0, count_ = 0;  // keys of the prefix, and all
    std::int64_t first_ = 0, last_ = 0;
    std::int64_t firsts_[kBlock], lasts_[kBlock];
    const float *queries_[kBlock], *grads_[kBlock];
    std::uintptr_t free_;
    const float **keys_, **values_;
    float *key_floats_, *value_floats_, *query_floats_, *grad_floats_;
    float *weights_, *slopes_, *changes_, *result_, *key_sums_, *value_sums_;
};

}  // namespace

std::int64_t branch_attention_scratch(const BranchAttentionArgs& args) {
    constexpr std::int64_t kNone[2] = {0, 0};
    BranchAttentionArgs sizes = args;
    sizes.q_starts = sizes.k_starts = kNone;
    return static_cast<std::int64_t>(Unit(sizes, 0, 0, nullptr).end());
}

void branch_attention_forward(const BranchAttentionArgs& args, std::int64_t branch, std::int64_t group,
                              void* scratch) {
    Unit(args, branch, group, scratch).forward();
}

void branch_attention_backward(const BranchAttentionArgs& args, std::int64_t branch, std::int64_t group,
                               void* scratch) {
    Unit(args, branch, group, scratch).backward();
}

}  // namespace FASTEDIT_LEVEL
}  // namespace fastedit
