// Runs the CUDA chunk kernels of csrc/linear_marginal_ce on the emulated machine: the logits of `rows` rows
// arrive in chunks of `chunk` columns, forward then backward.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "linear_marginal_ce/chunk.h"
#include "options.h"

namespace {

// Device memory that the host fills.
template <class T>
T* filled(int64_t count, T value) {
  auto* p = static_cast<T*>(simt::device_alloc(static_cast<size_t>(count) * sizeof(T), true));
  std::fill(p, p + count, value);
  return p;
}

template <class A>
void drive_chunks(const simt::Options& o, int dtype) {
  const int64_t R = o.number("rows"), V = o.number("columns"), step = o.number("chunk");
  const int out_dtype = static_cast<int>(o.number("out_dtype"));
  const int64_t out_size = out_dtype == 0 ? 4 : out_dtype == 1 ? 8 : 2;
  const bool in_place = o.number("in_place", 0) != 0;
  const A* all = o.array<A>("logits");  // [R, V]; as host memory here
  const auto* labels = o.array<int64_t>("labels");
  A* row_max = filled(R, static_cast<A>(-1e38));
  A* row_sum = filled(R, A{0});
  A* gold = filled(R, A{0});
  const auto chunk_of = [&](int64_t begin, int64_t n) {
    A* chunk = filled(R * n, A{0});
    for (int64_t r = 0; r < R; ++r) std::memcpy(chunk + r * n, all + r * V + begin, n * sizeof(A));
    return chunk;
  };
  for (int64_t begin = 0; begin < V; begin += step) {
    const int64_t n = std::min(step, V - begin);
    realm_fast::chunk_lse_update_cuda(
        {chunk_of(begin, n), labels, row_max, row_sum, gold, R, n, begin, dtype}, nullptr);
  }
  o.write("row_max", row_max, R);
  o.write("gold", gold, R);
  A* row_logsum = filled(R, A{0});
  for (int64_t r = 0; r < R; ++r) row_logsum[r] = std::log(row_sum[r]);
  o.write("row_logsum", row_logsum, R);
  const A* grad = o.array<A>("grad");
  char* out = o.output<char>(R * V * out_size);
  for (int64_t begin = 0; begin < V; begin += step) {
    const int64_t n = std::min(step, V - begin);
    A* chunk = chunk_of(begin, n);
    char* to = in_place ? reinterpret_cast<char*>(chunk) : o.output<char>(R * n * out_size);
    realm_fast::chunk_dlogits_cuda(
        {chunk, labels, row_max, row_logsum, grad, to, R, n, begin, dtype, out_dtype}, nullptr);
    for (int64_t r = 0; r < R; ++r) {
      std::memcpy(out + (r * V + begin) * out_size, to + r * n * out_size, n * out_size);
    }
  }
  o.write("d_logits", out, R * V * out_size);
}

}  // namespace

int main(int argc, char** argv) {
  return simt::drive(argc, argv, [](const simt::Options& o) {
    const int dtype = static_cast<int>(o.number("dtype"));
    if (dtype == 1) {
      drive_chunks<double>(o, dtype);
    } else {
      drive_chunks<float>(o, dtype);
    }
  });
}
