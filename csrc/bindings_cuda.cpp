// Python bindings of the CUDA kernels: pointers, sizes, strides and the caller's stream.

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/rank_update.h"
#include "cuda/second_moment.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Number of devices, 0 when the driver is missing or too old; `error` then says why.
int device_count(cudaError_t* error) {
    int count = 0;
    *error = cudaGetDeviceCount(&count);
    cudaGetLastError();  // a failed probe must not be reported by the next launch
    return *error == cudaSuccess ? count : 0;
}

void require_device() {
    cudaError_t error;
    if (device_count(&error) == 0)
        throw std::runtime_error(std::string("no CUDA device: ") + cudaGetErrorString(error));
}

void check(cudaError_t error, const char* op) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

py::dict info() {
    cudaError_t error;
    py::dict out;
    out["devices"] = device_count(&error);
    out["status"] = error == cudaSuccess ? "ok" : std::string("no CUDA device: ") + cudaGetErrorString(error);
    out["cuda_version"] =
        std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
    return out;
}

void second_moment(std::uintptr_t keys, bool bfloat16, std::int64_t key_stride, std::int64_t key_layer_stride,
                   std::uintptr_t rows, std::uintptr_t count, int tokens, int d, int layers,
                   std::uintptr_t master, bool master_float64, std::int64_t master_stride,
                   std::int64_t master_layer_stride, std::uintptr_t staging, bool sm90,
                   std::uintptr_t stream) {
    require_device();
    const fastedit::SecondMomentCuda args{pointer<const void>(keys),
                                          bfloat16,
                                          key_stride,
                                          key_layer_stride,
                                          pointer<const std::int32_t>(rows),
                                          pointer<const std::int32_t>(count),
                                          tokens,
                                          d,
                                          layers,
                                          pointer<void>(master),
                                          master_float64,
                                          master_stride,
                                          master_layer_stride,
                                          pointer<void>(staging)};
    cudaError_t error;
    {
        py::gil_scoped_release release;
        const auto run = sm90 ? fastedit::second_moment_sm90 : fastedit::second_moment;
        error = run(args, pointer<CUstream_st>(stream));
    }
    check(error, "second_moment_");
}

void rank_update(std::uintptr_t weight, int weight_type, std::int64_t weight_stride, std::uintptr_t left,
                 std::uintptr_t right, bool float64, std::int64_t rows, std::int64_t columns, int rank,
                 double alpha, std::uintptr_t stream) {
    require_device();
    const fastedit::RankUpdateCuda args{pointer<void>(weight),
                                        weight_type,
                                        weight_stride,
                                        pointer<const void>(left),
                                        pointer<const void>(right),
                                        float64,
                                        rows,
                                        columns,
                                        rank,
                                        alpha};
    cudaError_t error;
    {
        py::gil_scoped_release release;
        error = fastedit::rank_update(args, pointer<CUstream_st>(stream));
    }
    check(error, "rank_update_");
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of fastedit; called through fastedit.ops, which checks the arguments.";
    m.def("info", &info, "Devices, their status and the CUDA version the module was built with.");
    m.def("second_moment", &second_moment, py::arg("keys"), py::arg("bfloat16"), py::arg("key_stride"),
          py::arg("key_layer_stride"), py::arg("rows"), py::arg("count"), py::arg("tokens"), py::arg("d"),
          py::arg("layers"), py::arg("master"), py::arg("master_float64"), py::arg("master_stride"),
          py::arg("master_layer_stride"), py::arg("staging"), py::arg("sm90"), py::arg("stream"));
    m.def("rank_update", &rank_update, py::arg("weight"), py::arg("weight_type"), py::arg("weight_stride"),
          py::arg("left"), py::arg("right"), py::arg("float64"), py::arg("rows"), py::arg("columns"),
          py::arg("rank"), py::arg("alpha"), py::arg("stream"));
}
