// Python bindings of the CPU kernels: pointers, sizes, strides. Python checks, allocates and keeps the
// references.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/branch_attention.h"
#include "cpu/delta_step.h"
#include "cpu/isa.h"
#include "cpu/kth_magnitude.h"
#include "cpu/lowrank_transform.h"
#include "cpu/nearest_key.h"
#include "cpu/packed_solve.h"
#include "cpu/peak.h"
#include "cpu/rank_update.h"
#include "cpu/row_moments.h"
#include "cpu/second_moment.h"
#include "cpu/target_loss_amx.h"

namespace py = pybind11;
using fastedit::BranchType;
using fastedit::FactorType;
using fastedit::KeyType;
using fastedit::MagnitudeType;
using fastedit::MasterType;
using fastedit::RowType;
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
                 std::int64_t rows, std::int64_t columns, std::int64_t rank, double alpha, int threads,
                 std::uintptr_t norms) {
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
                           threads,
                           pointer<double>(norms)});
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

void kth_magnitude(std::uintptr_t x, int type, std::int64_t n, std::int64_t k, std::uintptr_t out,
                   int threads) {
    py::gil_scoped_release release;
    fastedit::kth_magnitude(pointer<const void>(x), static_cast<MagnitudeType>(type), n, k,
                            pointer<void>(out), threads);
}

void magnitude_mask(std::uintptr_t x, int type, std::uintptr_t score, int score_type, std::int64_t n,
                    std::int64_t k, bool all_ties, int threads) {
    py::gil_scoped_release release;
    fastedit::magnitude_mask(pointer<void>(x), static_cast<MagnitudeType>(type), pointer<const void>(score),
                             static_cast<MagnitudeType>(score_type), n, k, all_ties, threads);
}

// q, queries, d, keys, key_type, key_stride, count
using NearestKeys =
    std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::uintptr_t, int, std::int64_t, std::int64_t>;

fastedit::NearestKeyArgs nearest_key_args(const NearestKeys& in, int threads) {
    const auto& [q, queries, d, keys, type, stride, count] = in;
    return {pointer<const float>(q),
            queries,
            d,
            pointer<const void>(keys),
            static_cast<fastedit::KeyRowType>(type),
            stride,
            count,
            threads};
}

void nearest_key(const NearestKeys& in, std::uintptr_t index, std::uintptr_t distance, std::uintptr_t second,
                 int threads) {
    py::gil_scoped_release release;
    fastedit::nearest_key(nearest_key_args(in, threads), pointer<std::int64_t>(index),
                          pointer<float>(distance), pointer<float>(second));
}

void topk_keys(const NearestKeys& in, std::int64_t k, bool cosine, std::uintptr_t scores,
               std::uintptr_t index, int threads) {
    py::gil_scoped_release release;
    fastedit::topk_keys(nearest_key_args(in, threads), k, cosine, pointer<float>(scores),
                        pointer<std::int64_t>(index));
}

// Addresses, with a number for what else is known of each.
using HeadWeight =
    std::tuple<std::uintptr_t, int, std::int64_t, std::int64_t, std::int64_t>;  // vocabulary, d
using HeadRows = std::tuple<std::uintptr_t, int, std::int64_t>;                 // rows
using HeadDivergence = std::tuple<std::uintptr_t, std::uintptr_t, std::int64_t, std::int64_t>;  // kl, stride
// peak, total, picked, gap, pulls
using HeadSums = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t>;

void target_loss(const HeadWeight& weight, std::uintptr_t bias, const HeadRows& hidden,
                 std::uintptr_t targets, const HeadDivergence& kl, double softcap, bool with_grad,
                 const HeadSums& sums, int threads) {
    py::gil_scoped_release release;
    fastedit::TargetLossArgs args{};
    args.weight = pointer<const void>(std::get<0>(weight));
    args.weight_type = static_cast<fastedit::HeadType>(std::get<1>(weight));
    args.weight_stride = std::get<2>(weight);
    args.vocabulary = std::get<3>(weight), args.d = std::get<4>(weight);
    args.bias = pointer<const float>(bias);
    args.hidden = pointer<const float>(std::get<0>(hidden));
    args.hidden_type = static_cast<fastedit::HeadType>(std::get<1>(hidden));
    args.rows = std::get<2>(hidden);
    args.targets = pointer<const std::int64_t>(targets);
    args.kl_rows = pointer<const std::int64_t>(std::get<0>(kl));
    args.kl_logp = pointer<const float>(std::get<1>(kl));
    args.kl = std::get<2>(kl), args.kl_stride = std::get<3>(kl);
    args.softcap = static_cast<float>(softcap), args.with_grad = with_grad, args.threads = threads;
    const auto& [peak, total, picked, gap, pulls] = sums;
    fastedit::target_loss(args, {pointer<float>(peak), pointer<float>(total), pointer<float>(picked),
                                 pointer<float>(gap), pointer<float>(pulls)});
}

// A matrix of unit column stride: address, type, row stride, columns.
using Matrix = std::tuple<std::uintptr_t, int, std::int64_t, std::int64_t>;

fastedit::RowMatrix matrix_of(const Matrix& matrix) {
    const auto& [address, type, stride, width] = matrix;
    return {pointer<const void>(address), static_cast<RowType>(type), stride, width};
}

// V, its row stride, U, its row stride, rank, bias, scale, shift, a copy of the input or 0, a, hidden, its
// row stride
using Layer =
    std::tuple<std::uintptr_t, std::int64_t, std::uintptr_t, std::int64_t, std::int64_t, std::uintptr_t,
               std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::int64_t>;

void lowrank_transform(const Matrix& x, const Matrix& d, std::uintptr_t mean, std::uintptr_t deviation,
                       std::uintptr_t mode, std::uintptr_t z, std::int64_t n,
                       const std::vector<Layer>& layers, bool clamp_first, int threads) {
    py::gil_scoped_release release;
    std::vector<fastedit::LowrankLayer> each;
    for (const auto& [V, V_stride, U, U_stride, rank, bias, scale, shift, input, a, hidden, hidden_stride] :
         layers)
        each.push_back({pointer<const float>(V), pointer<const float>(U), pointer<const float>(bias),
                        pointer<const float>(scale), pointer<const float>(shift), V_stride, U_stride, rank,
                        pointer<float>(input), pointer<float>(a), pointer<float>(hidden), hidden_stride});
    const fastedit::NormaliseArgs start{{matrix_of(x), matrix_of(d)},
                                        pointer<const float>(mean),
                                        pointer<const float>(deviation),
                                        pointer<const std::int64_t>(mode),
                                        pointer<float>(z)};
    fastedit::lowrank_transform({start, each.data(), static_cast<std::int64_t>(each.size()), n,
                                 start.parts[0].width + start.parts[1].width, clamp_first, threads});
}

void lowrank_residual_backward(std::uintptr_t dz, std::uintptr_t a, std::uintptr_t scale,
                               std::uintptr_t shift, std::uintptr_t mode, std::uintptr_t da,
                               std::uintptr_t dbias, std::uintptr_t dscale, std::uintptr_t dshift,
                               std::int64_t n, std::int64_t d, std::int64_t modules, bool clamp_first,
                               int threads) {
    py::gil_scoped_release release;
    fastedit::lowrank_residual_backward({pointer<const float>(dz), pointer<const float>(a),
                                         pointer<const float>(scale), pointer<const float>(shift),
                                         pointer<const std::int64_t>(mode), pointer<float>(da),
                                         pointer<float>(dbias), pointer<float>(dscale),
                                         pointer<float>(dshift), n, d, modules, clamp_first, threads});
}

// Count, mean and m2 of a state, with the strides of the last two, or of its trail, which has none.
using Moments = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::int64_t, std::int64_t>;

void row_moments(const Matrix& x, const Matrix& d, std::uintptr_t mask,
                 const std::vector<std::int64_t>& batches, bool inflated, const Moments& state,
                 const Moments& trail, bool float64, int threads) {
    py::gil_scoped_release release;
    const auto& [count, mean, m2, mean_stride, m2_stride] = state;
    const auto& [counts, means, m2s, unused, unused2] = trail;
    fastedit::row_moments({{matrix_of(x), matrix_of(d)},
                           pointer<const std::uint8_t>(mask),
                           batches.data(),
                           static_cast<std::int64_t>(batches.size()),
                           inflated,
                           pointer<std::int64_t>(count),
                           pointer<void>(mean),
                           pointer<void>(m2),
                           mean_stride,
                           m2_stride,
                           float64,
                           pointer<std::int64_t>(counts),
                           pointer<void>(means),
                           pointer<void>(m2s),
                           threads});
}

// Address and row stride of a float32 matrix of unit column stride.
using Rows32 = std::tuple<std::uintptr_t, std::int64_t>;

void delta_step(const Rows32& delta, const Matrix& grad, const Rows32& exp_avg, const Rows32& exp_avg_sq,
                std::uintptr_t step, std::uintptr_t init_norm, std::uintptr_t active, std::int64_t rows,
                const std::vector<double>& rates, int threads) {
    py::gil_scoped_release release;
    fastedit::delta_step({pointer<float>(std::get<0>(delta)), std::get<1>(delta), matrix_of(grad),
                          pointer<float>(std::get<0>(exp_avg)), std::get<1>(exp_avg),
                          pointer<float>(std::get<0>(exp_avg_sq)), std::get<1>(exp_avg_sq),
                          pointer<std::int64_t>(step), pointer<const float>(init_norm),
                          pointer<const std::uint8_t>(active), rows, rates.at(0), rates.at(1), rates.at(2),
                          rates.at(3), rates.at(4), rates.at(5), threads});
}

void packed_solve(std::uintptr_t packed, std::int64_t width, std::uintptr_t rows, std::int64_t row_stride,
                  std::int64_t count, bool transposed, int threads) {
    py::gil_scoped_release release;
    fastedit::packed_solve({pointer<const double>(packed), width, pointer<double>(rows), row_stride, count,
                            transposed, threads});
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
    m.def("delta_step", &delta_step, py::arg("delta"), py::arg("grad"), py::arg("exp_avg"),
          py::arg("exp_avg_sq"), py::arg("step"), py::arg("init_norm"), py::arg("active"), py::arg("rows"),
          py::arg("rates"), py::arg("threads"));
    m.def("row_moments", &row_moments, py::arg("x"), py::arg("d"), py::arg("mask"), py::arg("batches"),
          py::arg("inflated"), py::arg("state"), py::arg("trail"), py::arg("float64"), py::arg("threads"));
    m.def("lowrank_residual_backward", &lowrank_residual_backward, py::arg("dz"), py::arg("a"),
          py::arg("scale"), py::arg("shift"), py::arg("mode"), py::arg("da"), py::arg("dbias"),
          py::arg("dscale"), py::arg("dshift"), py::arg("n"), py::arg("d"), py::arg("modules"),
          py::arg("clamp_first"), py::arg("threads"));
    m.def("lowrank_transform", &lowrank_transform, py::arg("x"), py::arg("d"), py::arg("mean"),
          py::arg("deviation"), py::arg("mode"), py::arg("z"), py::arg("n"), py::arg("layers"),
          py::arg("clamp_first"), py::arg("threads"));
    m.def("packed_solve", &packed_solve, py::arg("packed"), py::arg("width"), py::arg("rows"),
          py::arg("row_stride"), py::arg("count"), py::arg("transposed"), py::arg("threads"));
    m.def("rank_update", &rank_update, py::arg("weight"), py::arg("weight_type"), py::arg("weight_stride"),
          py::arg("left"), py::arg("left_row_stride"), py::arg("left_rank_stride"), py::arg("right"),
          py::arg("right_rank_stride"), py::arg("right_column_stride"), py::arg("factor_type"),
          py::arg("rows"), py::arg("columns"), py::arg("rank"), py::arg("alpha"), py::arg("threads"),
          py::arg("norms"));
    m.def("branch_attention", &branch_attention, py::arg("inputs"), py::arg("index"), py::arg("sizes"),
          py::arg("scale"), py::arg("softcap"), py::arg("window"), py::arg("lse"), py::arg("out"),
          py::arg("threads"));
    m.def("branch_attention_backward", &branch_attention_backward, py::arg("inputs"), py::arg("index"),
          py::arg("sizes"), py::arg("scale"), py::arg("softcap"), py::arg("window"), py::arg("lse"),
          py::arg("grad"), py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("threads"));
    m.def("kth_magnitude", &kth_magnitude, py::arg("x"), py::arg("type"), py::arg("n"), py::arg("k"),
          py::arg("out"), py::arg("threads"));
    m.def("magnitude_mask", &magnitude_mask, py::arg("x"), py::arg("type"), py::arg("score"),
          py::arg("score_type"), py::arg("n"), py::arg("k"), py::arg("all_ties"), py::arg("threads"));
    m.def("nearest_key", &nearest_key, py::arg("keys"), py::arg("index"), py::arg("distance"),
          py::arg("second"), py::arg("threads"));
    m.def("topk_keys", &topk_keys, py::arg("keys"), py::arg("k"), py::arg("cosine"), py::arg("scores"),
          py::arg("index"), py::arg("threads"));
    m.def("target_loss", &target_loss, py::arg("weight"), py::arg("bias"), py::arg("hidden"),
          py::arg("targets"), py::arg("kl"), py::arg("softcap"), py::arg("with_grad"), py::arg("sums"),
          py::arg("threads"));
}
