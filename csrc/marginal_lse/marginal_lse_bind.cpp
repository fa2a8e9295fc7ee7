#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "marginal_lse/marginal_lse.h"

namespace py = pybind11;

namespace realm_fast {
namespace {

using Shape = std::tuple<int64_t, int64_t, int64_t>;  // B, K, M

MarginalLse forward_args(uintptr_t gold, uintptr_t candidate, uintptr_t mask, uintptr_t marginal,
                         uintptr_t responsibility, Shape shape, bool sequence, int dtype) {
  return {reinterpret_cast<const void*>(gold),
          reinterpret_cast<const void*>(candidate),
          reinterpret_cast<const uint8_t*>(mask),
          reinterpret_cast<void*>(marginal),
          reinterpret_cast<void*>(responsibility),
          std::get<0>(shape),
          std::get<1>(shape),
          std::get<2>(shape),
          sequence,
          dtype};
}

MarginalLseBackward backward_args(uintptr_t grad, uintptr_t responsibility, uintptr_t mask, uintptr_t d_gold,
                                  uintptr_t d_candidate, Shape shape, bool sequence, int dtype) {
  return {reinterpret_cast<const void*>(grad),
          reinterpret_cast<const void*>(responsibility),
          reinterpret_cast<const uint8_t*>(mask),
          reinterpret_cast<void*>(d_gold),
          reinterpret_cast<void*>(d_candidate),
          std::get<0>(shape),
          std::get<1>(shape),
          std::get<2>(shape),
          sequence,
          dtype};
}

}  // namespace

void bind_marginal_lse(py::module_& m) {
  using P = uintptr_t;
  m.def("marginal_lse_cpu", [](P gold, P candidate, P mask, P marginal, P r, Shape shape, bool sequence,
                               int dtype, int num_threads) {
    const MarginalLse args = forward_args(gold, candidate, mask, marginal, r, shape, sequence, dtype);
    const py::gil_scoped_release release;
    marginal_lse_cpu(args, num_threads);
  });
  m.def("marginal_lse_backward_cpu", [](P grad, P r, P mask, P d_gold, P d_candidate, Shape shape,
                                        bool sequence, int dtype, int num_threads) {
    const MarginalLseBackward args =
        backward_args(grad, r, mask, d_gold, d_candidate, shape, sequence, dtype);
    const py::gil_scoped_release release;
    marginal_lse_backward_cpu(args, num_threads);
  });
  m.def("vector_exp", [](P x, P y, int64_t n) {
    vector_exp(reinterpret_cast<const float*>(x), reinterpret_cast<float*>(y), n);
  });
#ifdef REALM_FAST_WITH_CUDA
  m.def("marginal_lse_cuda",
        [](P gold, P candidate, P mask, P marginal, P r, Shape shape, bool sequence, int dtype, P stream) {
          const MarginalLse args = forward_args(gold, candidate, mask, marginal, r, shape, sequence, dtype);
          const py::gil_scoped_release release;
          marginal_lse_cuda(args, reinterpret_cast<void*>(stream));
        });
  m.def("marginal_lse_backward_cuda",
        [](P grad, P r, P mask, P d_gold, P d_candidate, Shape shape, bool sequence, int dtype, P stream) {
          const MarginalLseBackward args =
              backward_args(grad, r, mask, d_gold, d_candidate, shape, sequence, dtype);
          const py::gil_scoped_release release;
          marginal_lse_backward_cuda(args, reinterpret_cast<void*>(stream));
        });
#endif
}

}  // namespace realm_fast
