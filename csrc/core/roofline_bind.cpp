#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "core/roofline.h"

namespace py = pybind11;

namespace realm_fast {

void bind_roofline(py::module_& m) {
  m.def(
      "peak_operations_per_second",
      [](const std::string& kind, int threads, double seconds) {
        roofline::Kind which;
        if (kind == "float32") {
          which = roofline::Kind::float32;
        } else if (kind == "bfloat16") {
          which = roofline::Kind::bfloat16;
        } else if (kind == "int8") {
          which = roofline::Kind::int8;
        } else {
          throw std::invalid_argument("kind: expected float32, bfloat16 or int8, got '" + kind + "'");
        }
        const py::gil_scoped_release release;
        return roofline::peak_operations_per_second(which, threads, seconds);
      },
      py::arg("kind"), py::arg("threads"), py::arg("seconds"));
  m.def(
      "read_bytes_per_second",
      [](int threads, int64_t buffer_bytes, int repeats) {
        const py::gil_scoped_release release;
        return roofline::read_bytes_per_second(threads, buffer_bytes, repeats);
      },
      py::arg("threads"), py::arg("buffer_bytes"), py::arg("repeats"));
}

}  // namespace realm_fast
