// linear_gold under the sanitizers: every buffer is exactly as large as it must be, new memory holds NaN, and
// any number of threads gives the bits that one gives, at every CPU level, compute type and storage type.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <vector>

#include "check.h"
#include "core/cpu.h"
#include "linear_marginal_ce/linear_gold.h"

using namespace realm_fast;

namespace {

enum Storage : int { kF32 = 0, kF64 = 1, kBf16 = 2 };
constexpr int64_t size_of(int storage) { return storage == kF64 ? 8 : storage == kF32 ? 4 : 2; }

// Bytes of 0xff: a NaN in every type, so that a value nobody wrote shows. Workspaces are 64-byte aligned.
struct Buffer {
  explicit Buffer(int64_t bytes)
      : size(static_cast<size_t>(bytes)), data(::operator new(size, std::align_val_t{64})) {
    std::memset(data, 0xff, size);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data, std::align_val_t{64}); }
  bool operator==(const Buffer& other) const {
    return size == other.size && std::memcmp(data, other.data, size) == 0;
  }

  void fill(int storage, std::mt19937& random, double scale) {
    std::normal_distribution<double> normal(0, scale);
    for (size_t i = 0; i < size / static_cast<size_t>(size_of(storage)); ++i) {
      const double value = normal(random);
      if (storage == kF64) static_cast<double*>(data)[i] = value;
      if (storage == kF32) static_cast<float*>(data)[i] = static_cast<float>(value);
      if (storage == kBf16) {
        const float single = static_cast<float>(value);
        std::memcpy(static_cast<char*>(data) + 2 * i, reinterpret_cast<const char*>(&single) + 2, 2);
      }
    }
  }
  bool finite(int storage) const {
    for (size_t i = 0; i < size / static_cast<size_t>(size_of(storage)); ++i) {
      float single = 0;
      if (storage == kF32) single = static_cast<const float*>(data)[i];
      if (storage == kBf16) {
        std::memcpy(reinterpret_cast<char*>(&single) + 2, static_cast<const char*>(data) + 2 * i, 2);
      }
      const double value = storage == kF64 ? static_cast<const double*>(data)[i] : single;
      if (!std::isfinite(value)) return false;
    }
    return true;
  }

  size_t size;
  void* data;
};

struct Shape {
  int64_t rows, vocab, width, chunk_vocab, keep_vocab;
};

struct Results {
  Results(const Shape& s, int acc, int storage)
      : gold(s.rows * size_of(acc)),
        row_max(s.rows * size_of(acc)),
        row_logsum(s.rows * size_of(acc)),
        d_hidden(s.rows * s.width * size_of(storage)),
        d_weight(s.vocab * s.width * size_of(storage)),
        d_bias(s.vocab * size_of(acc)) {}
  bool operator==(const Results& o) const {
    return gold == o.gold && row_max == o.row_max && row_logsum == o.row_logsum && d_hidden == o.d_hidden &&
           d_weight == o.d_weight && d_bias == o.d_bias;
  }
  Buffer gold, row_max, row_logsum, d_hidden, d_weight, d_bias;
};

// Forward and backward of one problem; the same seed is the same problem.
std::unique_ptr<Results> run(const Shape& s, Compute compute, int storage, int threads) {
  const int acc = compute == Compute::kFloat64 ? kF64 : kF32;
  std::mt19937 random(7);
  Buffer hidden(s.rows * s.width * size_of(storage)), weight(s.vocab * s.width * size_of(storage));
  Buffer bias(s.vocab * size_of(acc)), grad(s.rows * size_of(acc));
  hidden.fill(storage, random, 1);
  weight.fill(storage, random, 0.3);
  bias.fill(acc, random, 1);
  grad.fill(acc, random, 1);
  std::vector<int64_t> rows(static_cast<size_t>(s.rows));
  std::vector<int32_t> labels(rows.size());
  for (size_t r = 0; r < rows.size(); ++r) {
    rows[r] = static_cast<int64_t>(r);
    labels[r] = static_cast<int32_t>(random() % static_cast<uint64_t>(s.vocab));
  }
  auto results = std::make_unique<Results>(s, acc, storage);

  LinearGold a;
  a.hidden = hidden.data;
  a.hidden_dtype = a.weight_dtype = a.d_hidden_dtype = a.d_weight_dtype = storage;
  a.rows = rows.data();
  a.labels = labels.data();
  a.weight = weight.data;
  a.bias = bias.data;
  a.num_rows = s.rows;
  a.vocab = s.vocab;
  a.width = s.width;
  const Buffer kept(std::max<int64_t>(1, s.keep_vocab * (s.rows + 16) * size_of(acc)));
  a.kept = s.keep_vocab > 0 ? kept.data : nullptr;
  a.keep_vocab = s.keep_vocab;
  a.gold = results->gold.data;
  a.row_max = results->row_max.data;
  a.row_logsum = results->row_logsum.data;
  a.grad = grad.data;
  a.d_hidden = results->d_hidden.data;
  a.d_weight = results->d_weight.data;
  a.d_bias = results->d_bias.data;
  a.chunk_vocab = s.chunk_vocab;
  {
    const Buffer workspace(linear_gold_workspace_bytes(a, compute, false, threads));
    a.workspace = workspace.data;
    linear_gold_forward(a, compute, threads);
  }
  const Buffer workspace(linear_gold_workspace_bytes(a, compute, true, threads));
  a.workspace = workspace.data;
  linear_gold_backward(a, compute, threads);
  CHECK(results->gold.finite(acc) && results->d_bias.finite(acc));
  CHECK(results->d_hidden.finite(storage) && results->d_weight.finite(storage));
  return results;
}

}  // namespace

TEST(linear_gold_with_any_number_of_threads_is_linear_gold_with_one) {
  struct Types {
    Compute compute;
    int storage;
  };
  const Types types[] = {{Compute::kFloat32, kF32},
                         {Compute::kFloat32, kBf16},
                         {Compute::kFloat64, kF64},
                         {Compute::kBFloat16, kBf16},
                         {Compute::kBFloat16, kF32}};
  // Odd vocabularies, many slices and chunks; one row, one word; kept logits that end inside a chunk.
  const Shape shapes[] = {
      {37, 1201, 24, 104, 0}, {50, 997, 33, 400, 440}, {1, 1, 5, 8, 0}, {3, 385, 17, 8, 392}};
  for (const auto& level : available_cpu_levels()) {
    force_cpu_level(level);
    for (const Types& type : types) {
      for (const Shape& shape : shapes) {
        const auto alone = run(shape, type.compute, type.storage, 1);
        for (const int threads : {2, 3, 8}) {
          for (int repeat = 0; repeat < 3; ++repeat) {
            CHECK(*run(shape, type.compute, type.storage, threads) == *alone);
          }
        }
      }
    }
  }
  force_cpu_level("");
}
