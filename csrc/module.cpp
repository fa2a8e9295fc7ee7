// realm_fast._native: the one extension module. Each kernel binds itself in csrc/<stem>/<stem>_bind.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/cpu.h"
#ifdef REALM_FAST_WITH_CUDA
#include "core/cuda_versions.h"
#endif

namespace py = pybind11;

namespace realm_fast {
void bind_embed_epilogue(py::module_& m);
void bind_linear_marginal_ce(py::module_& m);
void bind_marginal_lse(py::module_& m);
void bind_mips_topk(py::module_& m);
void bind_mips_topk_cuda(py::module_& m);
void bind_roofline(py::module_& m);
}  // namespace realm_fast

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of realm_fast. Private: use the functions of realm_fast.";
  m.def("detected_cpu_features", [] {
    const auto f = realm_fast::detected_cpu_features();
    py::dict d;
    d["avx2"] = f.avx2;
    d["avx512"] = f.avx512;
    d["avx512bf16"] = f.avx512bf16;
    d["avx512vnni"] = f.avx512vnni;
    d["amx"] = f.amx;
    return d;
  });
  m.def("available_cpu_levels", &realm_fast::available_cpu_levels);
  m.def("force_cpu_level", &realm_fast::force_cpu_level, py::arg("level"));
  m.def("build_info", [] {
    py::dict d;
    d["compiler"] = __VERSION__;
#ifdef REALM_FAST_WITH_CUDA
    d["cuda"] = true;
    d["cuda_archs"] = REALM_FAST_CUDA_ARCHS;
#else
    d["cuda"] = false;
    d["cuda_archs"] = "";
#endif
#ifdef NDEBUG
    d["debug"] = false;
#else
    d["debug"] = true;
#endif
    return d;
  });
#ifdef REALM_FAST_WITH_CUDA
  m.def("cuda_runtime_version", &realm_fast::cuda_runtime_version);
  m.def("cuda_driver_version", &realm_fast::cuda_driver_version);
#endif
  realm_fast::bind_embed_epilogue(m);
  realm_fast::bind_linear_marginal_ce(m);
  realm_fast::bind_marginal_lse(m);
  realm_fast::bind_mips_topk(m);
  realm_fast::bind_mips_topk_cuda(m);
  realm_fast::bind_roofline(m);
}
