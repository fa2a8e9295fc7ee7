#include <pybind11/pybind11.h>

#include "embed_epilogue/embed_epilogue.h"

namespace py = pybind11;

namespace realm_fast {

void bind_embed_epilogue(py::module_& m) {
  using P = uintptr_t;
  m.def("embed_epilogue_check",
        [](P offsets, bool ragged, int64_t limit, P row_ids, int64_t num_rows, int64_t num_out_rows) {
          const EpilogueCheck found =
              check_epilogue(reinterpret_cast<const int64_t*>(offsets), ragged, limit,
                             reinterpret_cast<const int64_t*>(row_ids), num_rows, num_out_rows);
          return py::make_tuple(static_cast<int>(found.fault), found.index, found.value);
        });
  m.def(
      "embed_epilogue_cpu",
      [](P hidden, int hidden_type, P offsets, bool ragged, int64_t num_rows, int64_t block_stride,
         int64_t token_stride, int64_t hidden_dim, int64_t dim, bool mean, P weight, P bias, bool layer_norm,
         P ln_weight, P ln_bias, double ln_eps, bool normalize, P out, int out_type, int64_t out_stride,
         int64_t panel_rows, int64_t group, P row_ids, P scale, P residual_norm, P norm, int num_threads) {
        EmbedEpilogue a;
        a.hidden = reinterpret_cast<const void*>(hidden);
        a.hidden_type = static_cast<EpilogueType>(hidden_type);
        a.offsets = reinterpret_cast<const int64_t*>(offsets);
        a.ragged = ragged;
        a.num_rows = num_rows;
        a.block_stride = block_stride;
        a.token_stride = token_stride;
        a.hidden_dim = hidden_dim;
        a.dim = dim;
        a.mean = mean;
        a.weight = reinterpret_cast<const float*>(weight);
        a.bias = reinterpret_cast<const float*>(bias);
        a.layer_norm = layer_norm;
        a.ln_weight = reinterpret_cast<const float*>(ln_weight);
        a.ln_bias = reinterpret_cast<const float*>(ln_bias);
        a.ln_eps = static_cast<float>(ln_eps);
        a.normalize = normalize;
        a.out = reinterpret_cast<void*>(out);
        a.out_type = static_cast<EpilogueType>(out_type);
        a.out_stride = out_stride;
        a.panel_rows = panel_rows;
        a.group = group;
        a.row_ids = reinterpret_cast<const int64_t*>(row_ids);
        a.scale = reinterpret_cast<float*>(scale);
        a.residual_norm = reinterpret_cast<float*>(residual_norm);
        a.norm = reinterpret_cast<float*>(norm);
        const py::gil_scoped_release release;
        embed_epilogue_cpu(a, num_threads);
      },
      py::kw_only(), py::arg("hidden"), py::arg("hidden_type"), py::arg("offsets"), py::arg("ragged"),
      py::arg("num_rows"), py::arg("block_stride"), py::arg("token_stride"), py::arg("hidden_dim"),
      py::arg("dim"), py::arg("mean"), py::arg("weight"), py::arg("bias"), py::arg("layer_norm"),
      py::arg("ln_weight"), py::arg("ln_bias"), py::arg("ln_eps"), py::arg("normalize"), py::arg("out"),
      py::arg("out_type"), py::arg("out_stride"), py::arg("panel_rows"), py::arg("group"), py::arg("row_ids"),
      py::arg("scale"), py::arg("residual_norm"), py::arg("norm"), py::arg("num_threads"));
}

}  // namespace realm_fast
