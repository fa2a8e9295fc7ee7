#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "linear_marginal_ce/chunk.h"
#include "linear_marginal_ce/huge_pages.h"
#include "linear_marginal_ce/linear_gold.h"

namespace py = pybind11;

namespace realm_fast {
namespace {

// One dict of Python ints: pointers, sizes and dtype codes under the names of the fields of LinearGold.
LinearGold args_of(const py::dict& d) {
  LinearGold a;
  const auto pointer = [&d](const char* name) -> void* {
    return d.contains(name) ? reinterpret_cast<void*>(d[name].cast<uintptr_t>()) : nullptr;
  };
  const auto integer = [&d](const char* name) { return d.contains(name) ? d[name].cast<int64_t>() : 0; };
  a.hidden = pointer("hidden");
  a.hidden_dtype = static_cast<int>(integer("hidden_dtype"));
  a.rows = static_cast<const int64_t*>(pointer("rows"));
  a.labels = static_cast<const int32_t*>(pointer("labels"));
  a.weight = pointer("weight");
  a.weight_dtype = static_cast<int>(integer("weight_dtype"));
  a.bias = pointer("bias");
  a.num_rows = integer("num_rows");
  a.vocab = integer("vocab");
  a.width = integer("width");
  a.kept = pointer("kept");
  a.keep_vocab = integer("keep_vocab");
  a.gold = pointer("gold");
  a.row_max = pointer("row_max");
  a.row_logsum = pointer("row_logsum");
  a.grad = pointer("grad");
  a.d_hidden = pointer("d_hidden");
  a.d_hidden_dtype = static_cast<int>(integer("d_hidden_dtype"));
  a.d_weight = pointer("d_weight");
  a.d_weight_dtype = static_cast<int>(integer("d_weight_dtype"));
  a.d_bias = pointer("d_bias");
  a.accumulate = integer("accumulate") != 0;
  a.chunk_vocab = integer("chunk_vocab");
  a.workspace = pointer("workspace");
  return a;
}

}  // namespace

void bind_linear_marginal_ce(py::module_& m) {
  m.def("advise_huge_pages",
        [](uintptr_t p, int64_t bytes) { advise_huge_pages(reinterpret_cast<void*>(p), bytes); });
  m.def("linear_gold_has_bf16", &linear_gold_has_bf16);
  m.def("linear_gold_panel_rows",
        [](int compute) { return linear_gold_panel_rows(static_cast<Compute>(compute)); });
  m.def("linear_gold_workspace_bytes", [](const py::dict& args, int compute, bool backward, int num_threads) {
    return linear_gold_workspace_bytes(args_of(args), static_cast<Compute>(compute), backward, num_threads);
  });
  m.def("linear_gold_forward", [](const py::dict& args, int compute, int num_threads) {
    const LinearGold a = args_of(args);
    const py::gil_scoped_release release;
    linear_gold_forward(a, static_cast<Compute>(compute), num_threads);
  });
  m.def("linear_gold_backward", [](const py::dict& args, int compute, int num_threads) {
    const LinearGold a = args_of(args);
    const py::gil_scoped_release release;
    linear_gold_backward(a, static_cast<Compute>(compute), num_threads);
  });
#ifdef REALM_FAST_WITH_CUDA
  using P = uintptr_t;
  using Shape = std::pair<int64_t, int64_t>;  // rows, columns
  m.def("chunk_lse_update_cuda", [](P logits, P labels, P row_max, P row_sum, P gold, Shape shape,
                                    int64_t begin, int dtype, P stream) {
    const ChunkLse args{reinterpret_cast<const void*>(logits),
                        reinterpret_cast<const int64_t*>(labels),
                        reinterpret_cast<void*>(row_max),
                        reinterpret_cast<void*>(row_sum),
                        reinterpret_cast<void*>(gold),
                        shape.first,
                        shape.second,
                        begin,
                        dtype};
    const py::gil_scoped_release release;
    chunk_lse_update_cuda(args, reinterpret_cast<void*>(stream));
  });
  m.def("chunk_dlogits_cuda", [](P logits, P labels, P row_max, P row_logsum, P grad, P out, Shape shape,
                                 int64_t begin, int dtype, int out_dtype, P stream) {
    const ChunkDlogits args{reinterpret_cast<const void*>(logits),
                            reinterpret_cast<const int64_t*>(labels),
                            reinterpret_cast<const void*>(row_max),
                            reinterpret_cast<const void*>(row_logsum),
                            reinterpret_cast<const void*>(grad),
                            reinterpret_cast<void*>(out),
                            shape.first,
                            shape.second,
                            begin,
                            dtype,
                            out_dtype};
    const py::gil_scoped_release release;
    chunk_dlogits_cuda(args, reinterpret_cast<void*>(stream));
  });
#endif
}

}  // namespace realm_fast
