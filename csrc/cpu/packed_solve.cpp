// Driver of the packed triangular solves. Both directions walk over the block columns of L and read each
// once: L x = b solves a block and subtracts its part from everything below it; L^T x = b gathers what lies
// below a block, then solves it. Diagonal blocks are stored inverted, so every step is a product of dense
// blocks.

#include "cpu/packed_solve.h"

#include <algorithm>
#include <cstring>

#include "cpu/buffer.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"

namespace fastedit {
namespace {

// Rows of one task; fixed, so that sums over tasks do not depend on the number of threads. A task's part of a
// block column stays in the L2 cache from one group of right-hand sides to the next.
constexpr std::int64_t kTaskRows = 480;
// Entries of a block column below which waking the other threads costs more than they save.
constexpr std::int64_t kSerialEntries = 1 << 16;

// One group of right-hand sides.
struct Group {
    double* x;         // [width, n]
    std::int64_t n;    // with padding
    double* block;     // [kPackedBlock, n]
    double* partials;  // [tasks, kPackedBlock, n]
};

struct Solver {
    const PackedSolveArgs& args;
    const Group* groups;
    std::int64_t count;  // of groups

    decltype(FASTEDIT_PICK(packed_solve_subtract)) subtract = FASTEDIT_PICK(packed_solve_subtract);
    decltype(FASTEDIT_PICK(packed_solve_add_transposed)) add_transposed =
        FASTEDIT_PICK(packed_solve_add_transposed);

    // Calls body(group, first, last, task) for every group and every kTaskRows of `below` rows.
    template <typename Body>
    void over_rows(std::int64_t below, std::int64_t depth, Body&& body) const {
        const int threads = below * depth < kSerialEntries ? 1 : args.threads;
        parallel_for(threads, (below + kTaskRows - 1) / kTaskRows, [&](std::int64_t task, int) {
            for (std::int64_t g = 0; g < count; ++g)
                body(groups[g], task * kTaskRows, std::min((task + 1) * kTaskRows, below), task);
        });
    }

    void forward(const double* column, std::int64_t first, std::int64_t depth) const {
        for (std::int64_t g = 0; g < count; ++g) {
            const Group& group = groups[g];
            const std::int64_t size = depth * group.n;
            double* own = group.x + first * group.n;
            std::fill(group.block, group.block + size, 0.0);
            subtract(column, depth, depth, own, group.block, group.n);
            for (std::int64_t i = 0; i < size; ++i) own[i] = -group.block[i];
        }
        const auto below = [&](const Group& group, std::int64_t from, std::int64_t to, std::int64_t) {
            double* own = group.x + first * group.n;
            subtract(column + (depth + from) * depth, to - from, depth, own, own + (depth + from) * group.n,
                     group.n);
        };
        over_rows(args.width - first - depth, depth, below);
    }

    void backward(const double* column, std::int64_t first, std::int64_t depth) const {
        const std::int64_t rows = args.width - first - depth;
        const auto below = [&](const Group& group, std::int64_t from, std::int64_t to, std::int64_t task) {
            double* part = group.partials + task * kPackedBlock * group.n;
            std::fill(part, part + depth * group.n, 0.0);
            add_transposed(column + (depth + from) * depth, to - from, depth,
                           group.x + (first + depth + from) * group.n, part, group.n);
        };
        over_rows(rows, depth, below);
        for (std::int64_t g = 0; g < count; ++g) {
            const Group& group = groups[g];
            const std::int64_t size = depth * group.n;
            double* own = group.x + first * group.n;
            std::copy(own, own + size, group.block);
            for (std::int64_t task = 0; task < (rows + kTaskRows - 1) / kTaskRows; ++task) {
                const double* part = group.partials + task * kPackedBlock * group.n;
                for (std::int64_t i = 0; i < size; ++i) group.block[i] -= part[i];
            }
            std::fill(own, own + size, 0.0);
            add_transposed(column, depth, depth, group.block, own, group.n);
        }
    }

    void run() const {
        const std::int64_t columns = (args.width + kPackedBlock - 1) / kPackedBlock;
        for (std::int64_t step = 0; step < columns; ++step) {
            const std::int64_t j = args.transposed ? columns - 1 - step : step;
            const std::int64_t first = j * kPackedBlock;
            const std::int64_t depth = std::min(kPackedBlock, args.width - first);
            // The block columns before this one are all kPackedBlock wide.
            const double* column = args.packed + first * args.width - kPackedBlock * first * (j - 1) / 2;
            if (args.transposed)
                backward(column, first, depth);
            else
                forward(column, first, depth);
        }
    }
};

// Between rows [n, width] and a group's [width, n].
void gather(const PackedSolveArgs& args, std::int64_t start, std::int64_t count, const Group& group) {
    for (std::int64_t i = 0; i < args.width; ++i) {
        double* to = group.x + i * group.n;
        for (std::int64_t r = 0; r < count; ++r) to[r] = args.rows[(start + r) * args.row_stride + i];
        for (std::int64_t r = count; r < group.n; ++r) to[r] = 0.0;
    }
}

void scatter(const PackedSolveArgs& args, std::int64_t start, std::int64_t count, const Group& group) {
    for (std::int64_t i = 0; i < args.width; ++i)
        for (std::int64_t r = 0; r < count; ++r)
            args.rows[(start + r) * args.row_stride + i] = group.x[i * group.n + r];
}

}  // namespace

void packed_solve(const PackedSolveArgs& args) {
    if (args.width == 0 || args.count == 0) return;
    const std::int64_t lanes = FASTEDIT_PICK(packed_solve_lanes)();
    const std::int64_t all = (args.count + kPackedGroup - 1) / kPackedGroup;
    const std::int64_t held = std::min(all, kPackedGroups);
    const std::int64_t widest =
        args.count >= kPackedGroup ? kPackedGroup : (args.count + lanes - 1) / lanes * lanes;
    const std::int64_t tasks = (args.width + kTaskRows - 1) / kTaskRows;
    const std::int64_t size = (args.width + (1 + tasks) * kPackedBlock) * widest;
    const Buffer<double> scratch(static_cast<std::size_t>(size * held));
    Group groups[kPackedGroups];
    for (std::int64_t start = 0; start < args.count; start += kPackedGroups * kPackedGroup) {
        std::int64_t used = 0;
        const auto count_of = [&](std::int64_t g) {
            return std::min(kPackedGroup, args.count - start - g * kPackedGroup);
        };
        for (; used < held && count_of(used) > 0; ++used) {
            const std::int64_t count = count_of(used),
                               n = count == 1 ? 1 : (count + lanes - 1) / lanes * lanes;
            double* x = scratch.get() + used * size;
            double* block = x + args.width * widest;
            groups[used] = {x, n, block, block + kPackedBlock * widest};
            gather(args, start + used * kPackedGroup, count, groups[used]);
        }
        Solver{args, groups, used}.run();
        for (std::int64_t g = 0; g < used; ++g)
            scatter(args, start + g * kPackedGroup, count_of(g), groups[g]);
    }
}

}  // namespace fastedit
