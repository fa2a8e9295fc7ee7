// Python bindings of mips_topk: addresses and sizes in, checked by realm_fast/ops/mips_topk.py and index.py.
#include <pybind11/pybind11.h>

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <chrono>
#include <stdexcept>
#include <string>

#include "mips_topk/mips_topk.h"

namespace py = pybind11;

namespace realm_fast {
namespace {

using mips::Dtype;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Dtype dtype_named(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "bfloat16") return Dtype::bfloat16;
  if (name == "int8") return Dtype::int8;
  throw std::invalid_argument("dtype: expected float32, bfloat16 or int8, got '" + name + "'");
}

mips::RowType row_type_named(const std::string& name) {
  if (name == "float32") return mips::RowType::float32;
  if (name == "bfloat16") return mips::RowType::bfloat16;
  if (name == "float16") return mips::RowType::float16;
  throw std::invalid_argument("row type: expected float32, bfloat16 or float16, got '" + name + "'");
}

// Asks Python about signals, at most every 50 ms. A pending exception (Ctrl-C) stops the search.
std::function<bool()> signal_poll() {
  auto last = std::chrono::steady_clock::now();
  return [last]() mutable {
    const auto now = std::chrono::steady_clock::now();
    if (now - last < std::chrono::milliseconds(50)) return true;
    last = now;
    const py::gil_scoped_acquire gil;
    return PyErr_CheckSignals() == 0;
  };
}

mips::Search make_search(int64_t dim, uintptr_t queries, int64_t num_queries, int64_t k, uintptr_t excluded,
                         int64_t num_excluded, int num_threads, uintptr_t scores, uintptr_t keys,
                         int64_t max_segment_rows) {
  mips::Search search;
  search.dim = dim;
  search.queries = at<const float>(queries);
  search.num_queries = num_queries;
  search.k = k;
  search.excluded = at<const int64_t>(excluded);
  search.num_excluded = num_excluded;
  search.num_threads = num_threads;
  search.poll = signal_poll();
  if (max_segment_rows > 0) search.max_segment_rows = max_segment_rows;
  search.scores = at<float>(scores);
  search.keys = at<int64_t>(keys);
  return search;
}

// (num_rows, panels, scale, residual_norm, norm, panel_bounds, originals); 0 where there is none.
using SlabTuple = std::tuple<int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

mips::MutableSlab mutable_slab(const SlabTuple& t) {
  return {std::get<0>(t),
          at<void>(std::get<1>(t)),
          at<float>(std::get<2>(t)),
          at<float>(std::get<3>(t)),
          at<float>(std::get<4>(t)),
          at<float>(std::get<5>(t))};
}

}  // namespace

void bind_mips_topk(py::module_& m) {
  m.def(
      "mips_topk_rows",
      [](int64_t dim, uintptr_t queries, int64_t num_queries, uintptr_t blocks, int64_t num_blocks,
         int64_t block_stride, const std::string& block_type, int64_t k, uintptr_t excluded,
         int64_t num_excluded, int num_threads, uintptr_t scores, uintptr_t keys, int64_t max_segment_rows) {
        const mips::Search search = make_search(dim, queries, num_queries, k, excluded, num_excluded,
                                                num_threads, scores, keys, max_segment_rows);
        const mips::RowMatrix matrix{at<const void>(blocks), num_blocks, block_stride,
                                     row_type_named(block_type)};
        bool completed;
        {
          const py::gil_scoped_release release;
          completed = mips::topk_rows(search, matrix);
        }
        if (!completed) throw py::error_already_set();
      },
      py::arg("dim"), py::arg("queries"), py::arg("num_queries"), py::arg("blocks"), py::arg("num_blocks"),
      py::arg("block_stride"), py::arg("block_type"), py::arg("k"), py::arg("excluded"),
      py::arg("num_excluded"), py::arg("num_threads"), py::arg("scores"), py::arg("keys"),
      py::arg("max_segment_rows") = 0);
  m.def(
      "mips_index_search",
      [](const std::string& dtype, const std::vector<SlabTuple>& slabs, int64_t dim, uintptr_t queries,
         int64_t num_queries, int64_t k, uintptr_t excluded, int64_t num_excluded, uintptr_t key_of_row,
         std::vector<int64_t> irregular_rows, bool exact, int64_t max_candidates, int num_threads,
         uintptr_t scores, uintptr_t keys, int64_t max_segment_rows) {
        const mips::Search search = make_search(dim, queries, num_queries, k, excluded, num_excluded,
                                                num_threads, scores, keys, max_segment_rows);
        mips::IndexSearch index;
        index.dtype = dtype_named(dtype);
        for (const SlabTuple& t : slabs) {
          index.slabs.push_back({std::get<0>(t), at<const void>(std::get<1>(t)),
                                 at<const float>(std::get<2>(t)), at<const float>(std::get<3>(t)),
                                 at<const float>(std::get<4>(t)), at<const float>(std::get<5>(t)),
                                 at<const float>(std::get<6>(t))});
        }
        index.key_of_row = at<const uint32_t>(key_of_row);
        index.irregular_rows = std::move(irregular_rows);
        index.exact = exact;
        index.max_candidates = max_candidates;
        mips::SearchStats stats;
        bool completed;
        {
          const py::gil_scoped_release release;
          completed = mips::topk_index(search, index, stats);
        }
        if (!completed) throw py::error_already_set();
        return std::make_tuple(stats.rescored, stats.fell_back, stats.repeated);
      },
      py::arg("dtype"), py::arg("slabs"), py::arg("dim"), py::arg("queries"), py::arg("num_queries"),
      py::arg("k"), py::arg("excluded"), py::arg("num_excluded"), py::arg("key_of_row"),
      py::arg("irregular_rows"), py::arg("exact"), py::arg("max_candidates"), py::arg("num_threads"),
      py::arg("scores"), py::arg("keys"), py::arg("max_segment_rows") = 0);
  m.def(
      "mips_store_rows",
      [](const std::string& dtype, int64_t dim, const SlabTuple& slab, uintptr_t rows, int64_t first_row,
         int64_t num_rows, uintptr_t values, int64_t stride, uintptr_t irregular, int num_threads) {
        const Dtype type = dtype_named(dtype);
        const py::gil_scoped_release release;
        mips::store_rows(type, dim, mutable_slab(slab), at<const int64_t>(rows), first_row, num_rows,
                         at<const float>(values), stride, at<uint8_t>(irregular), num_threads);
      },
      py::arg("dtype"), py::arg("dim"), py::arg("slab"), py::arg("rows"), py::arg("first_row"),
      py::arg("num_rows"), py::arg("values"), py::arg("stride"), py::arg("irregular"),
      py::arg("num_threads"));
  m.def(
      "mips_clear_rows",
      [](const std::string& dtype, int64_t dim, const SlabTuple& slab, uintptr_t rows, int64_t num_rows) {
        const Dtype type = dtype_named(dtype);
        const py::gil_scoped_release release;
        mips::clear_rows(type, dim, mutable_slab(slab), at<const int64_t>(rows), num_rows);
      },
      py::arg("dtype"), py::arg("dim"), py::arg("slab"), py::arg("rows"), py::arg("num_rows"));
  m.def(
      "mips_load_rows",
      [](int64_t dim, uintptr_t panels, uintptr_t rows, int64_t num_rows, uintptr_t values) {
        const py::gil_scoped_release release;
        mips::load_rows(dim, at<const float>(panels), at<const int64_t>(rows), num_rows, at<float>(values));
      },
      py::arg("dim"), py::arg("panels"), py::arg("rows"), py::arg("num_rows"), py::arg("values"));
}

}  // namespace realm_fast
