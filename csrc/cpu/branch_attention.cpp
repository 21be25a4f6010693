// Driver of the attention of branches: checks the indices, then hands units over to the threads.

#include "cpu/branch_attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/buffer.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"

namespace fastedit {
namespace {

using Unit = void (*)(const BranchAttentionArgs&, std::int64_t, std::int64_t, void*);

constexpr std::int64_t kMostUnits = 32;  // of a task: handing one out costs as much as a small unit

[[noreturn]] void outside(const char* name, std::int64_t found, std::int64_t rows) {
    throw std::out_of_range(std::string(name) + " must lie within the " + std::to_string(rows) +
                            " rows it names, in ascending order if starts, got " + std::to_string(found));
}

// The longest span.
std::int64_t check_starts(const char* name, const std::int64_t* starts, std::int64_t branches,
                          std::int64_t rows) {
    std::int64_t before = 0, most = 0;
    for (std::int64_t b = 0; b <= branches; ++b) {
        if (starts[b] < before || starts[b] > rows) outside(name, starts[b], rows);
        if (b > 0) most = std::max(most, starts[b] - before);
        before = starts[b];
    }
    return most;
}

void run(BranchAttentionArgs args, Unit unit) {
    check_starts("q_starts", args.q_starts, args.branches, args.queries);
    args.most_own = check_starts("k_starts", args.k_starts, args.branches, args.tokens);
    args.most_keys = args.width + args.most_own;
    for (std::int64_t i = 0; i < args.branches * args.width; ++i)
        if (args.columns[i] >= args.stored) outside("columns", args.columns[i], args.stored);

    const std::int64_t units = args.branches * args.groups;
    const int threads =
        static_cast<int>(std::clamp<std::int64_t>(args.threads, 1, std::max<std::int64_t>(units, 1)));
    const std::int64_t scratch_size = FASTEDIT_PICK(branch_attention_scratch)(args);
    const Buffer<char> scratch(static_cast<std::size_t>(scratch_size) * threads);
    const std::int64_t run = std::clamp<std::int64_t>(units / (threads * 16), 1, kMostUnits);
    parallel_for(threads, (units + run - 1) / run, [&](std::int64_t task, int worker) {
        const std::int64_t end = std::min((task + 1) * run, units);
        for (std::int64_t at = task * run; at < end; ++at)
            unit(args, at / args.groups, at % args.groups, scratch.get() + worker * scratch_size);
    });
}

}  // namespace

void branch_attention(const BranchAttentionArgs& args) {
    run(args, FASTEDIT_PICK(branch_attention_forward));
}

void branch_attention_backward(const BranchAttentionArgs& args) {
    run(args, FASTEDIT_PICK(branch_attention_backward));
}

}  // namespace fastedit
