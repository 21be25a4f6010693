// Python bindings of the CPU kernels: pointers, sizes, strides. Python checks, allocates and keeps the
// references.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/rank_update.h"
#include "cpu/second_moment.h"

namespace py = pybind11;
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

void second_moment(std::uintptr_t keys, int key_type, std::int64_t key_stride, std::uintptr_t rows,
                   std::int64_t tokens, std::int64_t d, std::uintptr_t master, int master_type,
                   std::int64_t master_stride, int threads) {
    py::gil_scoped_release release;
    fastedit::second_moment({pointer<const void>(keys), static_cast<KeyType>(key_type), key_stride,
                             pointer<const std::int64_t>(rows), tokens, d, pointer<void>(master),
                             static_cast<MasterType>(master_type), master_stride, threads});
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

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of fastedit; called through fastedit.ops, which checks the arguments.";
    m.def("info", &info, "The instruction-set level in use, those this machine can run, the compiler.");
    m.def("second_moment", &second_moment, py::arg("keys"), py::arg("key_type"), py::arg("key_stride"),
          py::arg("rows"), py::arg("tokens"), py::arg("d"), py::arg("master"), py::arg("master_type"),
          py::arg("master_stride"), py::arg("threads"));
    m.def("rank_update", &rank_update, py::arg("weight"), py::arg("weight_type"), py::arg("weight_stride"),
          py::arg("left"), py::arg("left_row_stride"), py::arg("left_rank_stride"), py::arg("right"),
          py::arg("right_rank_stride"), py::arg("right_column_stride"), py::arg("factor_type"),
          py::arg("rows"), py::arg("columns"), py::arg("rank"), py::arg("alpha"), py::arg("threads"));
}
