// Panels: storing, clearing and reading rows; quantisation with the norms that the certificate needs.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/cpu.h"
#include "core/parallel.h"
#include "mips_topk/kernels.h"
#include "mips_topk/mips_topk.h"

namespace realm_fast::mips {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr double kHugeNorm = 1e30;  // beyond it float32 products could overflow: such rows are irregular

float round_up(double value) {
  const float rounded = static_cast<float>(value * (1 + 1e-9));
  return rounded < value ? std::nextafter(rounded, std::numeric_limits<float>::infinity()) : rounded;
}

// Round to nearest, ties to even; what a bfloat16 cannot hold normally becomes 0 (vdpbf16ps would treat it
// so).
uint16_t to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  return (rounded & 0x7f80u) == 0 ? 0 : static_cast<uint16_t>(rounded);
}

float from_bfloat16(uint16_t value) { return std::bit_cast<float>(static_cast<uint32_t>(value) << 16); }

double norm_of(const float* values, int64_t dim) {
  double sum = 0;
  for (int64_t d = 0; d < dim; ++d) sum += static_cast<double>(values[d]) * values[d];
  return std::sqrt(sum);
}

// A row's step bytes go 192 bytes apart.
template <class T>
void scatter(const T* values, int64_t dim, void* panels, int64_t panel, int lane, T padding) {
  constexpr int64_t kPerStep = kStepBytes / sizeof(T);
  const int64_t steps = (dim + kPerStep - 1) / kPerStep;
  T* out = static_cast<T*>(panels) + (panel * steps * kPanelRows + lane) * kPerStep;
  const int64_t whole = dim / kPerStep;
  for (int64_t s = 0; s < whole; ++s) {
    std::memcpy(out + s * kPanelRows * kPerStep, values + s * kPerStep, kStepBytes);
  }
  for (int64_t d = whole * kPerStep; d < steps * kPerStep; ++d) {
    out[whole * kPanelRows * kPerStep + (d - whole * kPerStep)] = d < dim ? values[d] : padding;
  }
}

void clear_row(Dtype dtype, int64_t dim, const MutableSlab& slab, int64_t row) {
  const int64_t panel = row / kPanelRows;
  const int lane = static_cast<int>(row % kPanelRows);
  if (dtype == Dtype::float32) {
    const std::vector<float> nan(dim, kNaN);
    scatter<float>(nan.data(), dim, slab.panels, panel, lane, 0.0f);
    return;
  }
  if (dtype == Dtype::bfloat16) {
    const std::vector<uint16_t> nan(dim, 0x7fc0);
    scatter<uint16_t>(nan.data(), dim, slab.panels, panel, lane, 0);
  } else {
    slab.scale[row] = kNaN;
  }
  slab.residual_norm[row] = slab.norm[row] = 0;
}

void refresh_bounds(const MutableSlab& slab, int64_t panel) {
  float* bounds = slab.panel_bounds + 2 * panel;
  bounds[0] = bounds[1] = 0;
  for (int64_t row = panel * kPanelRows; row < (panel + 1) * kPanelRows; ++row) {
    bounds[0] = std::max(bounds[0], slab.residual_norm[row]);
    bounds[1] = std::max(bounds[1], slab.norm[row]);
  }
}

struct RowScratch {
  std::vector<uint16_t> bfloat16;
  std::vector<int8_t> int8;
  std::vector<uint8_t> shifted;
};

bool store_row(Dtype dtype, int64_t dim, const MutableSlab& slab, int64_t row, const float* values,
               RowScratch& scratch) {
  const int64_t panel = row / kPanelRows;
  const int lane = static_cast<int>(row % kPanelRows);
  if (dtype == Dtype::float32) {
    scatter<float>(values, dim, slab.panels, panel, lane, 0.0f);
    return true;
  }
  if (!(norm_of(values, dim) < kHugeNorm)) {  // also true for NaN
    clear_row(dtype, dim, slab, row);
    return false;
  }
  QuantisedQuery quantised;
  double norm = 0;
  if (dtype == Dtype::bfloat16) {
    scratch.bfloat16.resize(dim);
    quantised = quantise_bfloat16(values, dim, scratch.bfloat16.data());
    for (int64_t d = 0; d < dim; ++d) {
      const double x = from_bfloat16(scratch.bfloat16[d]);
      norm += x * x;
    }
    norm = std::sqrt(norm);
    scatter<uint16_t>(scratch.bfloat16.data(), dim, slab.panels, panel, lane, 0);
  } else {
    scratch.int8.resize(dim);
    scratch.shifted.resize(dim);
    quantised = quantise_integers(values, dim, 127, scratch.int8.data());
    int64_t squares = 0;
    for (int64_t d = 0; d < dim; ++d) {
      squares += static_cast<int32_t>(scratch.int8[d]) * scratch.int8[d];
      scratch.shifted[d] = static_cast<uint8_t>(scratch.int8[d] + 128);
    }
    norm = quantised.scale * std::sqrt(static_cast<double>(squares));
    // The padding is 128, which stands for 0.
    scatter<uint8_t>(scratch.shifted.data(), dim, slab.panels, panel, lane, 128);
    slab.scale[row] = quantised.scale;
  }
  slab.residual_norm[row] = round_up(quantised.residual);
  slab.norm[row] = round_up(norm);
  return true;
}

}  // namespace

int64_t steps_of(Dtype dtype, int64_t dim) {
  const int64_t per_step = dtype == Dtype::float32 ? 1 : dtype == Dtype::bfloat16 ? 2 : 4;
  return (dim + per_step - 1) / per_step;
}

QuantisedQuery quantise_bfloat16(const float* values, int64_t dim, uint16_t* out) {
  double squares = 0, error = 0;
  for (int64_t d = 0; d < dim; ++d) {
    out[d] = to_bfloat16(values[d]);
    const double difference = static_cast<double>(values[d]) - from_bfloat16(out[d]);
    squares += static_cast<double>(values[d]) * values[d];
    error += difference * difference;
  }
  return {1.0f, std::sqrt(squares), std::sqrt(error)};
}

template <class Integer>
QuantisedQuery quantise_integers(const float* values, int64_t dim, int limit, Integer* out) {
  const float bound = static_cast<float>(limit);
  float largest = 0;
  for (int64_t d = 0; d < dim; ++d) largest = std::max(largest, std::abs(values[d]));
  // A scale far below the data's range keeps the reciprocal finite; such values quantise to 0, and the
  // residual says so.
  const float scale = std::max(largest / bound, 0x1p-100f);
  const float inverse = 1.0f / scale;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and taking it away rounds to an integer
  double squares = 0, error = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const float rounded = (values[d] * inverse + kRound) - kRound;
    const float clamped = std::min(std::max(rounded, -bound), bound);
    out[d] = static_cast<Integer>(clamped);
    const double difference = static_cast<double>(values[d]) - static_cast<double>(scale) * clamped;
    squares += static_cast<double>(values[d]) * values[d];
    error += difference * difference;
  }
  return {scale, std::sqrt(squares), std::sqrt(error)};
}

template QuantisedQuery quantise_integers(const float*, int64_t, int, int8_t*);
template QuantisedQuery quantise_integers(const float*, int64_t, int, int16_t*);

void clear_rows(Dtype dtype, int64_t dim, const MutableSlab& slab, const int64_t* rows, int64_t num_rows) {
  for (int64_t i = 0; i < num_rows; ++i) clear_row(dtype, dim, slab, rows[i]);
  if (dtype == Dtype::float32) return;
  for (int64_t i = 0; i < num_rows; ++i) refresh_bounds(slab, rows[i] / kPanelRows);
}

void store_rows(Dtype dtype, int64_t dim, const MutableSlab& slab, const int64_t* rows, int64_t first_row,
                int64_t num_rows, const float* values, int64_t stride, uint8_t* irregular, int num_threads) {
  if (num_rows == 0) return;
  if (rows != nullptr) {  // scattered: few
    RowScratch scratch;
    for (int64_t i = 0; i < num_rows; ++i) {
      irregular[i] = !store_row(dtype, dim, slab, rows[i], values + i * stride, scratch);
    }
    if (dtype == Dtype::float32) return;
    for (int64_t i = 0; i < num_rows; ++i) refresh_bounds(slab, rows[i] / kPanelRows);
    return;
  }
  const CpuFeatures features = cpu_features();
  const Kernels* kernels = &generic_kernels();
#ifdef REALM_FAST_X86
  if (features.avx512) {
    kernels = &avx512_kernels();
  } else if (features.avx2) {
    kernels = &avx2_kernels();
  }
#endif
  (void)features;
  const int64_t first_panel = first_row / kPanelRows;
  const int64_t end_panel = (first_row + num_rows + kPanelRows - 1) / kPanelRows;
  std::vector<RowScratch> scratch(std::max(num_threads, 1));
  for (RowScratch& s : scratch) {  // the body may not throw
    s.bfloat16.reserve(dim);
    s.int8.reserve(dim);
    s.shifted.reserve(dim);
  }
  parallel_for(end_panel - first_panel, num_threads, [&](int64_t task, int worker) {
    const int64_t panel = first_panel + task;
    const int64_t begin = std::max(panel * kPanelRows, first_row);
    const int64_t end = std::min((panel + 1) * kPanelRows, first_row + num_rows);
    if (dtype == Dtype::float32 && end - begin == kPanelRows) {
      const float* pointers[kPanelRows];
      for (int i = 0; i < kPanelRows; ++i) pointers[i] = values + (begin - first_row + i) * stride;
      kernels->pack_float32(pointers, dim, kPanelRows * stride,
                            static_cast<float*>(slab.panels) + panel * dim * kPanelRows);
      std::fill(irregular + (begin - first_row), irregular + (end - first_row), uint8_t{0});
      return;
    }
    for (int64_t row = begin; row < end; ++row) {
      const int64_t i = row - first_row;
      irregular[i] = !store_row(dtype, dim, slab, row, values + i * stride, scratch[worker]);
    }
    if (dtype != Dtype::float32) refresh_bounds(slab, panel);
  });
}

void load_rows(int64_t dim, const float* panels, const int64_t* rows, int64_t num_rows, float* values) {
  for (int64_t i = 0; i < num_rows; ++i) {
    const float* from = panels + (rows[i] / kPanelRows) * dim * kPanelRows + rows[i] % kPanelRows;
    for (int64_t d = 0; d < dim; ++d) values[i * dim + d] = from[d * kPanelRows];
  }
}

}  // namespace realm_fast::mips
