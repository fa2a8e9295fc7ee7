// The CPU kernel, written once over the vectors of simd.h and compiled once for each level.
#pragma once

#include "core/simd.h"
#include "embed_epilogue/embed_epilogue.h"

namespace realm_fast {
namespace {

using vec = F32::vec;
constexpr int kLanes = F32::lanes;
typedef uint32_t uvec __attribute__((vector_size(kLanes * 4), may_alias));
typedef uint16_t hvec __attribute__((vector_size(kLanes * 2), may_alias));
typedef int8_t bvec __attribute__((vector_size(kLanes), may_alias));

constexpr int64_t kRowAlign = 16;  // scratch rows are padded with zeros to whole vectors of every level
constexpr int64_t padded(int64_t n) { return (n + kRowAlign - 1) / kRowAlign * kRowAlign; }

template <class T>
REALM_FAST_INLINE T load_as(const void* p) {
  T v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
REALM_FAST_INLINE T load_some(const void* p, int64_t count, int64_t size) {
  T v = {};
  memcpy(&v, p, static_cast<size_t>(count * size));
  return v;
}

// One vector of token states, whatever their type; `Type` is an EpilogueType.
template <EpilogueType Type>
REALM_FAST_INLINE vec widen(const void* base, int64_t i, int64_t count) {
  if constexpr (Type == EpilogueType::kFloat32) {
    const float* p = static_cast<const float*>(base) + i;
    return count >= kLanes ? F32::load(p) : load_some<vec>(p, count, 4);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(base) + i;
    const hvec half = count >= kLanes ? load_as<hvec>(p) : load_some<hvec>(p, count, 2);
    if constexpr (Type == EpilogueType::kBFloat16) {
      return (vec)(__builtin_convertvector(half, uvec) << 16);
    } else {
#if defined(__AVX512F__)
      return (vec)_mm512_cvtph_ps((__m256i)half);
#elif defined(__AVX2__)
      return (vec)_mm256_cvtph_ps((__m128i)half);
#else
      vec wide = {};
      for (int lane = 0; lane < kLanes; ++lane) wide[lane] = f16_to_float(half[lane]);
      return wide;
#endif
    }
  }
}

REALM_FAST_INLINE float sum_lanes(vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}
REALM_FAST_INLINE float max_lanes(vec v) {
  float most = v[0];
  for (int lane = 1; lane < kLanes; ++lane) most = v[lane] > most ? v[lane] : most;
  return most;
}
REALM_FAST_INLINE vec abs(vec v) { return (vec)((uvec)v & 0x7fffffffu); }
REALM_FAST_INLINE float square_root(float x) { return __builtin_sqrtf(x); }

// Adds `Count` consecutive tokens to sum[0, H), as a balanced tree.
template <EpilogueType Type, int Count>
REALM_FAST_INLINE void add_tokens(const char* first, int64_t stride_bytes, int64_t hidden_dim, float* sum) {
  constexpr int64_t kSize = Type == EpilogueType::kFloat32 ? 4 : 2;
  for (int64_t h = 0; h < hidden_dim; h += kLanes) {
    vec part[Count];
    for (int t = 0; t < Count; ++t) {
      part[t] = widen<Type>(first + t * stride_bytes, h, hidden_dim - h);
      // The rows are too short for the hardware to see that the next ones follow.
      if (Count > 1 && h * kSize % 64 == 0)
        __builtin_prefetch(first + (t + 2 * Count) * stride_bytes + h * kSize);
    }
    for (int width = 1; width < Count; width *= 2) {
      for (int t = 0; t < Count; t += 2 * width) part[t] += part[t + width];
    }
    F32::store(sum + h, F32::load(sum + h) + part[0]);
  }
}

template <EpilogueType Type>
void pool_row(const EmbedEpilogue& a, int64_t row, float* x) {
  constexpr int64_t size = Type == EpilogueType::kFloat32 ? 4 : 2;
  const int64_t begin = a.ragged ? a.offsets[row] * a.token_stride : row * a.block_stride;
  const int64_t count = a.ragged ? a.offsets[row + 1] - a.offsets[row] : a.offsets[row];
  const char* first = static_cast<const char*>(a.hidden) + begin * size;
  if (!a.mean) {
    for (int64_t h = 0; h < a.hidden_dim; h += kLanes) {
      F32::store(x + h, widen<Type>(first, h, a.hidden_dim - h));
    }
    return;
  }
  const int64_t stride = a.token_stride * size;
  for (int64_t h = 0; h < a.hidden_dim; h += kLanes) F32::store(x + h, vec{});
  int64_t t = 0;
  for (; t + 8 <= count; t += 8) add_tokens<Type, 8>(first + t * stride, stride, a.hidden_dim, x);
  for (; t < count; ++t) add_tokens<Type, 1>(first + t * stride, stride, a.hidden_dim, x);
  const float tokens = static_cast<float>(count);
  for (int64_t h = 0; h < a.hidden_dim; h += kLanes) F32::store(x + h, F32::load(x + h) / tokens);
}

// y[i, j] = w[j] . x[i] for Rows x Dims outputs. One dot product is always the same chain of vectors and the
// same final tree, whatever tile it is in.
template <int Rows, int Dims>
REALM_FAST_INLINE void dot_tile(const float* x, int64_t x_stride, const float* w, int64_t hidden_dim,
                                float* y, int64_t y_stride) {
  vec sum[Rows][Dims] = {};
  const int64_t whole = hidden_dim / kLanes * kLanes;
  for (int64_t h = 0; h < whole; h += kLanes) {
    vec xs[Rows];
    for (int i = 0; i < Rows; ++i) xs[i] = F32::load(x + i * x_stride + h);
    for (int j = 0; j < Dims; ++j) {
      const vec ws = F32::load(w + j * hidden_dim + h);
      for (int i = 0; i < Rows; ++i) sum[i][j] = F32::fma(xs[i], ws, sum[i][j]);
    }
  }
  if (whole < hidden_dim) {
    for (int j = 0; j < Dims; ++j) {
      const vec ws = load_some<vec>(w + j * hidden_dim + whole, hidden_dim - whole, 4);
      for (int i = 0; i < Rows; ++i) {
        sum[i][j] = F32::fma(F32::load(x + i * x_stride + whole), ws, sum[i][j]);
      }
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < Dims; ++j) y[i * y_stride + j] = sum_lanes(sum[i][j]);
  }
}

template <int Dims>
void dot_rows(const float* x, int64_t x_stride, int64_t rows, const float* w, int64_t hidden_dim, float* y,
              int64_t y_stride) {
  constexpr int kRows = kLanes == 16 ? 4 : 2;  // accumulators and operands fit 32 or 16 registers
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    dot_tile<kRows, Dims>(x + i * x_stride, x_stride, w, hidden_dim, y + i * y_stride, y_stride);
  }
  for (; i < rows; ++i) {
    dot_tile<1, Dims>(x + i * x_stride, x_stride, w, hidden_dim, y + i * y_stride, y_stride);
  }
}

// Four rows of W at a time stay in the first-level cache while every pooled row passes over them.
void project(const EmbedEpilogue& a, const float* x, int64_t rows, float* y) {
  const int64_t x_stride = padded(a.hidden_dim), y_stride = padded(a.dim);
  int64_t d = 0;
  for (; d + 4 <= a.dim; d += 4) {
    dot_rows<4>(x, x_stride, rows, a.weight + d * a.hidden_dim, a.hidden_dim, y + d, y_stride);
  }
  for (; d < a.dim; ++d) {
    dot_rows<1>(x, x_stride, rows, a.weight + d * a.hidden_dim, a.hidden_dim, y + d, y_stride);
  }
}

REALM_FAST_INLINE vec load_param(const float* p, int64_t d, int64_t dim) {
  return dim - d >= kLanes ? F32::load(p + d) : load_some<vec>(p + d, dim - d, 4);
}
// Zeros the lanes past the end of the row, which the affine steps below may have filled.
REALM_FAST_INLINE void clear_tail(float* x, int64_t dim) {
  for (int64_t d = dim; d < padded(dim); ++d) x[d] = 0;
}
REALM_FAST_INLINE float sum_of_squares(const float* x, int64_t dim) {
  vec sum = {};
  for (int64_t d = 0; d < dim; d += kLanes) sum = F32::fma(F32::load(x + d), F32::load(x + d), sum);
  return sum_lanes(sum);
}

void layer_norm_row(const EmbedEpilogue& a, float* x) {
  const float dim = static_cast<float>(a.dim);
  vec sum = {};
  for (int64_t d = 0; d < a.dim; d += kLanes) sum += F32::load(x + d);
  const float mean = sum_lanes(sum) / dim;
  for (int64_t d = 0; d < a.dim; d += kLanes) F32::store(x + d, F32::load(x + d) - mean);
  clear_tail(x, a.dim);
  const float inverse = 1.0f / square_root(sum_of_squares(x, a.dim) / dim + a.ln_eps);
  for (int64_t d = 0; d < a.dim; d += kLanes) {
    vec v = F32::load(x + d) * inverse;
    if (a.ln_weight != nullptr) v = v * load_param(a.ln_weight, d, a.dim);
    if (a.ln_bias != nullptr) v = v + load_param(a.ln_bias, d, a.dim);
    F32::store(x + d, v);
  }
}

// Copies a finished row to its place: whole, or a group of dimensions at a time into its panel.
REALM_FAST_INLINE void scatter(const EmbedEpilogue& a, int64_t place, const void* row, int64_t size,
                               int padding) {
  const char* from = static_cast<const char*>(row);
  char* to = static_cast<char*>(a.out);
  if (a.panel_rows == 1 && a.group == 1) {
    memcpy(to + place * a.out_stride * size, from, static_cast<size_t>(a.dim * size));
    return;
  }
  to += (place / a.panel_rows * a.out_stride + place % a.panel_rows * a.group) * size;
  const int64_t group_bytes = a.group * size, step = a.panel_rows * group_bytes, bytes = a.dim * size;
  int64_t done = 0;
  if (group_bytes == 4) {  // what every search layout has
    for (; done + 4 <= bytes; done += 4, to += step) memcpy(to, from + done, 4);
  }
  for (; done < bytes; done += group_bytes, to += step) {
    const int64_t filled = bytes - done < group_bytes ? bytes - done : group_bytes;
    memcpy(to, from + done, static_cast<size_t>(filled));
    memset(to + filled, padding, static_cast<size_t>(group_bytes - filled));
  }
}

void finish_row(const EmbedEpilogue& a, int64_t row, float* x, void* stored) {
  if (a.bias != nullptr) {
    for (int64_t d = 0; d < a.dim; d += kLanes) {
      F32::store(x + d, F32::load(x + d) + load_param(a.bias, d, a.dim));
    }
  }
  clear_tail(x, a.dim);
  if (a.layer_norm) layer_norm_row(a, x);
  if (a.normalize) {
    const float norm = square_root(sum_of_squares(x, a.dim));
    const float divisor = norm < 1e-12f ? 1e-12f : norm;  // a NaN norm stays
    for (int64_t d = 0; d < a.dim; d += kLanes) F32::store(x + d, F32::load(x + d) / divisor);
  }
  const int64_t place = a.row_ids[row];
  vec errors = {}, squares = {};  // of what storing loses, and of what it keeps, squared
  float step = 1;
  if (a.out_type == EpilogueType::kFloat32) {
    scatter(a, place, x, 4, 0);
    if (a.norm != nullptr) {
      for (int64_t d = 0; d < a.dim; d += kLanes)
        squares = F32::fma(F32::load(x + d), F32::load(x + d), squares);
    }
  } else if (a.out_type == EpilogueType::kBFloat16) {
    uint16_t* y = static_cast<uint16_t*>(stored);
    for (int64_t d = 0; d < a.dim; d += kLanes) {
      const vec v = F32::load(x + d);
      const uvec bits = (uvec)v;
      uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
      rounded = (rounded & 0x7f80) != 0 ? rounded : uvec{};       // no subnormals
      rounded = v == v ? rounded : ((bits >> 16) | 0x40);         // a NaN stays a NaN
      const hvec half = __builtin_convertvector(rounded, hvec);
      memcpy(y + d, &half, sizeof half);
      const vec kept = (vec)(rounded << 16), error = v - kept;
      errors = F32::fma(error, error, errors);
      squares = F32::fma(kept, kept, squares);
    }
    scatter(a, place, y, 2, 0);
  } else {
    int8_t* y = static_cast<int8_t*>(stored);
    vec most = {};
    for (int64_t d = 0; d < a.dim; d += kLanes) most = F32::max(abs(F32::load(x + d)), most);
    step = max_lanes(most) / 127.0f;
    step =
        step > 0x1p-100f ? step : 0x1p-100f;  // keeps the reciprocal finite; the residual says what is lost
    const float inverse = 1.0f / step;
    const vec magic = F32::set(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, ties to even
    const bool shifted = a.out_type == EpilogueType::kUInt8;
    for (int64_t d = 0; d < a.dim; d += kLanes) {
      const vec v = F32::load(x + d);
      vec q = (v * inverse + magic) - magic;
      q = F32::max(q, F32::set(-127.0f));
      q = -F32::max(-q, F32::set(-127.0f));
      const vec error = F32::fma(-q, F32::set(step), v);
      errors = F32::fma(error, error, errors);
      squares = F32::fma(q, q, squares);  // exact: integers below 2^24 up to D = 1040, and close above
      F32::ivec integer = __builtin_convertvector(q, F32::ivec);
      if (shifted) integer = integer + 128;
      const bvec small = __builtin_convertvector(integer, bvec);
      memcpy(y + d, &small, sizeof small);
    }
    scatter(a, place, y, 1, shifted ? 128 : 0);
    a.scale[place] = step;
  }
  // Rounded up past every error made here: the sums (D terms), q * step (2^-24 of x), and underflow.
  const float slack = 1.0f + static_cast<float>(a.dim + 8) * 6e-8f;
  if (a.residual_norm != nullptr) {
    a.residual_norm[place] =
        square_root(sum_lanes(errors)) * slack + square_root(sum_of_squares(x, a.dim)) * 1.2e-7f + 1e-17f;
  }
  if (a.norm != nullptr) a.norm[place] = step * square_root(sum_lanes(squares)) * slack + 1e-17f;
}

void run_rows(const EmbedEpilogue& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t rows = end - begin, width = padded(a.hidden_dim);
  float* pooled = scratch;  // [rows, padded H]
  for (int64_t i = 0; i < rows; ++i) {
    float* x = pooled + i * width;
    for (int64_t h = a.hidden_dim / kLanes * kLanes; h < width; ++h) x[h] = 0;
    switch (a.hidden_type) {
      case EpilogueType::kFloat32:
        pool_row<EpilogueType::kFloat32>(a, begin + i, x);
        break;
      case EpilogueType::kBFloat16:
        pool_row<EpilogueType::kBFloat16>(a, begin + i, x);
        break;
      default:
        pool_row<EpilogueType::kFloat16>(a, begin + i, x);
        break;
    }
  }
  float* x = pooled;
  float* free = pooled + kEpilogueTileRows * width;
  if (a.weight != nullptr) {
    x = free;  // [rows, padded D]
    free += kEpilogueTileRows * padded(a.dim);
    project(a, pooled, rows, x);
  }
  for (int64_t i = 0; i < rows; ++i) finish_row(a, begin + i, x + i * padded(a.dim), free);
}

}  // namespace
}  // namespace realm_fast
