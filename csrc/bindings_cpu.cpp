// Python bindings of the CPU kernels: pointers, sizes, strides. Python checks, allocates and keeps the
// references.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/branch_attention.h"
#include "cpu/isa.h"
#include "cpu/peak.h"
#include "cpu/rank_update.h"
#include "cpu/second_moment.h"

namespace py = pybind11;
using fastedit::BranchType;
using fastedit::FactorType;
using fastedit::KeyType;
using fastedit::MasterType;
using fastedit::WeightType;

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

py::dict info() {
    std::vector<std::string> levels;
    for (fastedit::Level level : fastedit::supported_levels())
        levels.emplace_back(fastedit::level_name(level));
    py::dict out;
    out["isa"] = fastedit::level_name(fastedit::current_level());
    out["isa_levels"] = levels;
    out["compiler"] = __VERSION__;
    return out;
}

double peak(const std::string& kind, double seconds) {
    py::gil_scoped_release release;
    return fastedit::peak(kind, seconds);
}

double bandwidth() {
    py::gil_scoped_release release;
    return fastedit::bandwidth();
}

// Keys, their row stride, master, its row stride.
using MomentLayer = std::tuple<std::uintptr_t, std::int64_t, std::uintptr_t, std::int64_t>;

void second_moment(const std::vector<MomentLayer>& layers, int key_type, int master_type, std::uintptr_t rows,
                   std::int64_t tokens, std::int64_t d, bool exact, int threads) {
    py::gil_scoped_release release;
    std::vector<fastedit::SecondMomentLayer> each;
    for (const auto& [keys, key_stride, master, master_stride] : layers)
        each.push_back({pointer<const void>(keys), key_stride, pointer<void>(master), master_stride});
    fastedit::second_moment({each.data(), static_cast<std::int64_t>(each.size()),
                             static_cast<KeyType>(key_type), static_cast<MasterType>(master_type),
                             pointer<const std::int64_t>(rows), tokens, d, exact, threads});
}

void rank_update(std::uintptr_t weight, int weight_type, std::int64_t weight_stride, std::uintptr_t left,
                 std::int64_t left_row_stride, std::int64_t left_rank_stride, std::uintptr_t right,
                 std::int64_t right_rank_stride, std::int64_t right_column_stride, int factor_type,
                 std::int64_t rows, std::int64_t columns, std::int64_t rank, double alpha, int threads) {
    py::gil_scoped_release release;
    fastedit::rank_update({pointer<void>(weight),
                           static_cast<WeightType>(weight_type),
                           weight_stride,
                           pointer<const void>(left),
                           {left_row_stride, left_rank_stride},
                           pointer<const void>(right),
                           {right_rank_stride, right_column_stride},
                           static_cast<FactorType>(factor_type),
                           rows,
                           columns,
                           rank,
                           alpha,
                           threads});
}

// A [tokens, heads, d] tensor: address, type, strides of tokens and heads.
using Rows = std::tuple<std::uintptr_t, int, std::int64_t, std::int64_t>;

fastedit::BranchRows rows_of(const Rows& rows) {
    const auto& [address, type, token_stride, head_stride] = rows;
    return {pointer<void>(address), static_cast<BranchType>(type), token_stride, head_stride};
}

// columns, q_starts, q_offsets, k_starts
using BranchIndex = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t>;
// branches, width, queries, tokens, stored, heads, groups, d
using BranchSizes = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                               std::int64_t, std::int64_t, std::int64_t>;

fastedit::BranchAttentionArgs branch_attention_args(const std::vector<Rows>& inputs, const BranchIndex& index,
                                                    const BranchSizes& sizes, double scale, double softcap,
                                                    std::int64_t window, std::uintptr_t lse, const Rows& out,
                                                    int threads) {
    fastedit::BranchAttentionArgs args{};
    args.q = rows_of(inputs.at(0)), args.k = rows_of(inputs.at(1)), args.v = rows_of(inputs.at(2));
    args.k_prefix = rows_of(inputs.at(3)), args.v_prefix = rows_of(inputs.at(4));
    args.columns = pointer<const std::int64_t>(std::get<0>(index));
    args.q_starts = pointer<const std::int64_t>(std::get<1>(index));
    args.q_offsets = pointer<const std::int64_t>(std::get<2>(index));
    args.k_starts = pointer<const std::int64_t>(std::get<3>(index));
    std::tie(args.branches, args.width, args.queries, args.tokens, args.stored, args.heads, args.groups,
             args.d) = sizes;
    args.scale = scale, args.softcap = softcap, args.window = window;
    args.lse = pointer<float>(lse), args.out = rows_of(out), args.threads = threads;
    return args;
}

void branch_attention(const std::vector<Rows>& inputs, const BranchIndex& index, const BranchSizes& sizes,
                      double scale, double softcap, std::int64_t window, std::uintptr_t lse, const Rows& out,
                      int threads) {
    py::gil_scoped_release release;
    fastedit::branch_attention(
        branch_attention_args(inputs, index, sizes, scale, softcap, window, lse, out, threads));
}

void branch_attention_backward(const std::vector<Rows>& inputs, const BranchIndex& index,
                               const BranchSizes& sizes, double scale, double softcap, std::int64_t window,
                               std::uintptr_t lse, const Rows& grad, const Rows& dq, const Rows& dk,
                               const Rows& dv, int threads) {
    py::gil_scoped_release release;
    fastedit::BranchAttentionArgs args =
        branch_attention_args(inputs, index, sizes, scale, softcap, window, lse, dq, threads);
    args.grad = rows_of(grad), args.dk = rows_of(dk), args.dv = rows_of(dv);
    fastedit::branch_attention_backward(args);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of fastedit; called through fastedit.ops, which checks the arguments.";
    m.def("info", &info, "The instruction-set level in use, those this machine can run, the compiler.");
    m.def("peak", &peak, py::arg("kind"), py::arg("seconds") = 0.2,
          "flop/s of one thread in registers: kind 'amx_bf16', 'fma_f32' or 'fma_f64'; processor time.");
    m.def("bandwidth", &bandwidth,
          "bytes/s of one thread that copies a large array: read and written bytes.");
    m.def("second_moment", &second_moment, py::arg("layers"), py::arg("key_type"), py::arg("master_type"),
          py::arg("rows"), py::arg("tokens"), py::arg("d"), py::arg("exact"), py::arg("threads"));
    m.def("rank_update", &rank_update, py::arg("weight"), py::arg("weight_type"), py::arg("weight_stride"),
          py::arg("left"), py::arg("left_row_stride"), py::arg("left_rank_stride"), py::arg("right"),
          py::arg("right_rank_stride"), py::arg("right_column_stride"), py::arg("factor_type"),
          py::arg("rows"), py::arg("columns"), py::arg("rank"), py::arg("alpha"), py::arg("threads"));
    m.def("branch_attention", &branch_attention, py::arg("inputs"), py::arg("index"), py::arg("sizes"),
          py::arg("scale"), py::arg("softcap"), py::arg("window"), py::arg("lse"), py::arg("out"),
          py::arg("threads"));
    m.def("branch_attention_backward", &branch_attention_backward, py::arg("inputs"), py::arg("index"),
          py::arg("sizes"), py::arg("scale"), py::arg("softcap"), py::arg("window"), py::arg("lse"),
          py::arg("grad"), py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("threads"));
}
