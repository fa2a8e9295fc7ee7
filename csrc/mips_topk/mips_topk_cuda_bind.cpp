// Python bindings of the CUDA search: addresses and sizes in, checked by realm_fast/ops/mips_topk.py and
// realm_fast/device_index.py. Without CUDA in the build there is nothing to bind.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "mips_topk/mips_topk_cuda.h"

namespace py = pybind11;

namespace realm_fast {

#ifdef REALM_FAST_WITH_CUDA
namespace {

ScanDtype scan_dtype_named(const std::string& name) {
  if (name == "float32") return ScanDtype::kFloat32;
  if (name == "bfloat16") return ScanDtype::kBFloat16;
  if (name == "float16") return ScanDtype::kFloat16;
  if (name == "int8") return ScanDtype::kInt8;
  throw std::invalid_argument("dtype: expected float32, bfloat16, float16 or int8, got '" + name + "'");
}

ScanKernel scan_kernel_named(const std::string& name) {
  if (name == "auto") return ScanKernel::kAuto;
  if (name == "mma") return ScanKernel::kMma;
  if (name == "wgmma") return ScanKernel::kWgmma;
  throw std::invalid_argument("kernel: expected auto, mma or wgmma, got '" + name + "'");
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_mips_topk_cuda(py::module_& m) {
  py::class_<MipsTopkCuda>(m, "MipsTopkCuda")
      .def(py::init([](const std::string& dtype, uintptr_t queries, int64_t num_queries, int64_t query_stride,
                       uintptr_t blocks, int64_t num_blocks, int64_t block_stride, int dim, int k) {
             MipsTopkCuda call;
             call.dtype = scan_dtype_named(dtype);
             call.queries = at<const void>(queries);
             call.num_queries = num_queries;
             call.query_stride = query_stride;
             call.blocks = at<const void>(blocks);
             call.num_blocks = num_blocks;
             call.block_stride = block_stride;
             call.dim = dim;
             call.k = k;
             return call;
           }),
           py::arg("dtype"), py::arg("queries"), py::arg("num_queries"), py::arg("query_stride"),
           py::arg("blocks"), py::arg("num_blocks"), py::arg("block_stride"), py::arg("dim"), py::arg("k"))
      .def("exclude",
           [](MipsTopkCuda& call, uintptr_t ids, int width) {
             call.exclude_ids = at<const int64_t>(ids);
             call.exclude_width = width;
           })
      .def(
          "certify",
          [](MipsTopkCuda& call, uintptr_t originals, int64_t original_stride, uintptr_t scale,
             uintptr_t residual, uintptr_t norm, uintptr_t bounds) {
            call.originals = at<const float>(originals);
            call.original_stride = original_stride;
            call.block_scale = at<const float>(scale);
            call.block_residual = at<const float>(residual);
            call.block_norm = at<const float>(norm);
            call.block_bounds = at<const float>(bounds);
          },
          py::arg("originals"), py::arg("original_stride"), py::arg("scale"), py::arg("residual"),
          py::arg("norm"), py::arg("bounds"))
      .def("use_kernel",
           [](MipsTopkCuda& call, const std::string& name) { call.kernel = scan_kernel_named(name); })
      .def_property_readonly("workspace_bytes", &mips_topk_cuda_workspace)
      .def(
          "run",
          [](MipsTopkCuda call, uintptr_t scores, uintptr_t ids, uintptr_t workspace, size_t workspace_bytes,
             uintptr_t stream) {
            call.scores = at<float>(scores);
            call.ids = at<int64_t>(ids);
            call.workspace = at<void>(workspace);
            call.workspace_bytes = workspace_bytes;
            call.stream = at<void>(stream);
            const py::gil_scoped_release release;
            mips_topk_cuda(call);
          },
          py::arg("scores"), py::arg("ids"), py::arg("workspace"), py::arg("workspace_bytes"),
          py::arg("stream"));
  m.attr("MAX_CUDA_K") = kMaxCudaK;
}
#else
void bind_mips_topk_cuda(py::module_&) {}
#endif

}  // namespace realm_fast
