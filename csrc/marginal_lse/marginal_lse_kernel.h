// The CPU kernels, written once over the vectors of simd.h and compiled once for each level.
#pragma once

#include "core/simd.h"
#include "marginal_lse/marginal_lse.h"

namespace realm_fast {
namespace {

// Loads up to V::lanes elements from position `begin`, the rest as `fill`.
template <class V>
REALM_FAST_INLINE typename V::vec load_some(const void* base, int dtype, int64_t begin, int64_t count,
                                            typename V::scalar fill) {
  using T = typename V::scalar;
  if (count >= V::lanes && dtype == (sizeof(T) == 4 ? kFloat32 : kFloat64)) {
    return V::load(static_cast<const T*>(base) + begin);
  }
  T lane[V::lanes];
  for (int i = 0; i < V::lanes; ++i) {
    lane[i] = i < count ? static_cast<T>(read(base, dtype, begin + i)) : fill;
  }
  return V::load(lane);
}

template <class V>
REALM_FAST_INLINE void store_some(void* base, int dtype, int64_t begin, int64_t count,
                                  typename V::vec value) {
  using T = typename V::scalar;
  if (count >= V::lanes && dtype == (sizeof(T) == 4 ? kFloat32 : kFloat64)) {
    V::store(static_cast<T*>(base) + begin, value);
    return;
  }
  for (int i = 0; i < V::lanes && i < count; ++i) write(base, dtype, begin + i, value[i]);
}

// Where the vector that ends a row of `positions` begins: at `begin`, or earlier, so that it is a full one.
// Lanes before `begin` are then done a second time, to the same values; one by one the last of a row cost
// more than the rest.
template <class V>
REALM_FAST_INLINE int64_t first_lane(int64_t begin, int64_t positions) {
  return positions >= V::lanes && begin + V::lanes > positions ? positions - V::lanes : begin;
}

// Turns the running max and sum of exponentials of `lanes` mixtures into their log, and says what to multiply
// exp(x - max) by to get responsibilities: 1 / sum, but 0 where nothing is possible and NaN after a +inf.
template <class V>
REALM_FAST_INLINE void finish(typename V::vec max, typename V::vec sum, typename V::vec& marginal,
                              typename V::vec& scale) {
  using T = typename V::scalar;
  const T infinity = static_cast<T>(__builtin_inf());
  for (int i = 0; i < V::lanes; ++i) {
    const T s = sum[i];
    if (s == 0) {  // every term is -inf
      marginal[i] = -infinity;
      scale[i] = 0;
    } else if (max[i] ==
               infinity) {  // exp(inf - inf) made the sum NaN; the limit is +inf unless a term is NaN
      marginal[i] = infinity;
      scale[i] = static_cast<T>(__builtin_nan(""));
    } else {
      marginal[i] = max[i] + static_cast<T>(sizeof(T) == 4 ? ::logf(static_cast<float>(s)) : ::log(s));
      scale[i] = 1 / s;
    }
  }
}

// max over the candidates starts here, not at -inf, so that -inf - max is never NaN.
template <class V>
constexpr typename V::scalar kLowest = sizeof(typename V::scalar) == 4 ? -3e38f : -1e308;

template <class V>
void forward_token(const MarginalLse& a, int64_t b) {
  using T = typename V::scalar;
  using vec = typename V::vec;
  const int acc = sizeof(T) == 4 ? kFloat32 : kFloat64;
  for (int64_t begin = 0; begin < a.positions; begin += V::lanes) {
    const int64_t m0 = first_lane<V>(begin, a.positions), count = a.positions - m0;
    vec active = vec{};  // 1 where the position counts
    for (int i = 0; i < V::lanes; ++i) {
      active[i] = i < count && (a.mask == nullptr || a.mask[b * a.positions + m0 + i] != 0) ? 1 : 0;
    }
    vec max = V::set(kLowest<V>), has_nan = vec{};
    for (int64_t k = 0; k < a.candidates; ++k) {
      const T prior = static_cast<T>(read(a.candidate, a.dtype, b * a.candidates + k));
      if (prior == -static_cast<T>(__builtin_inf())) continue;
      const vec x =
          load_some<V>(a.gold, a.dtype, (b * a.candidates + k) * a.positions + m0, count, 0) + prior;
      max = V::max(x, max);  // a NaN x leaves max
      has_nan = x == x ? has_nan : V::set(1);
    }
    vec sum = vec{};
    for (int64_t k = 0; k < a.candidates; ++k) {
      const int64_t row = b * a.candidates + k;
      const T prior = static_cast<T>(read(a.candidate, a.dtype, row));
      vec e = vec{};
      if (prior != -static_cast<T>(__builtin_inf())) {
        e = V::exp(load_some<V>(a.gold, a.dtype, row * a.positions + m0, count, 0) + prior - max);
        sum += e;
      }
      store_some<V>(a.responsibility, acc, row * a.positions + m0, count, e);
    }
    vec marginal, scale;
    finish<V>(max, sum, marginal, scale);
    const vec nan = V::set(static_cast<T>(__builtin_nan("")));
    marginal = has_nan != 0 ? nan : marginal;
    scale = has_nan != 0 ? nan : scale;
    marginal = active != 0 ? marginal : vec{};
    store_some<V>(a.marginal, acc, b * a.positions + m0, count, marginal);
    for (int64_t k = 0; k < a.candidates; ++k) {
      const int64_t row = b * a.candidates + k;
      const bool absent = static_cast<T>(read(a.candidate, a.dtype, row)) == -static_cast<T>(__builtin_inf());
      const vec e = load_some<V>(a.responsibility, acc, row * a.positions + m0, count, 0);
      store_some<V>(a.responsibility, acc, row * a.positions + m0, count,
                    absent ? vec{} : (active != 0 ? e * scale : vec{}));
    }
  }
}

// candidate + the sum of gold over the positions that count, in double: sums over a span are large, and their
// differences decide the responsibilities. -inf for an absent slot.
template <class V>
double sequence_log_joint(const MarginalLse& a, int64_t b, int64_t k) {
  double x = read(a.candidate, a.dtype, b * a.candidates + k);
  if (x == -__builtin_inf()) return x;
  const int64_t row = (b * a.candidates + k) * a.positions;
  for (int64_t m = 0; m < a.positions; ++m) {
    if (a.mask == nullptr || a.mask[b * a.positions + m] != 0) x += read(a.gold, a.dtype, row + m);
  }
  return x;
}

template <class V>
void forward_sequence(const MarginalLse& a, int64_t b) {
  using T = typename V::scalar;
  using vec = typename V::vec;
  T* r = static_cast<T*>(a.responsibility) + b * a.candidates;
  T* marginal = static_cast<T*>(a.marginal) + b;
  bool any_active = false;
  for (int64_t m = 0; m < a.positions; ++m)
    any_active |= a.mask == nullptr || a.mask[b * a.positions + m] != 0;
  if (!any_active) {
    *marginal = 0;
    for (int64_t k = 0; k < a.candidates; ++k) r[k] = 0;
    return;
  }
  double max = -1e308;  // not -inf, so that -inf - max is never NaN
  bool has_nan = false;
  for (int64_t k = 0; k < a.candidates; ++k) {
    const double x = sequence_log_joint<V>(a, b, k);
    if (x != x) has_nan = true;
    if (x > max) max = x;
  }
  double sum = 0;
  for (int64_t k0 = 0; k0 < a.candidates; k0 += V::lanes) {
    T x[V::lanes];
    const int64_t count = a.candidates - k0;
    for (int i = 0; i < V::lanes; ++i) {
      x[i] = static_cast<T>(i < count ? sequence_log_joint<V>(a, b, k0 + i) - max : -__builtin_inf());
    }
    const vec e = V::exp(V::load(x));
    for (int i = 0; i < V::lanes && i < count; ++i) {
      sum += e[i];
      r[k0 + i] = e[i];
    }
  }
  double total = max + ::log(sum), scale = 1 / sum;
  if (sum == 0) {  // every term is -inf
    total = -__builtin_inf();
    scale = 0;
  } else if (has_nan || max == __builtin_inf()) {  // after a +inf alone the limit is +inf, its gradient none
    total = has_nan ? __builtin_nan("") : max;
    scale = __builtin_nan("");
  }
  *marginal = static_cast<T>(total);
  for (int64_t k = 0; k < a.candidates; ++k) {
    const bool absent = read(a.candidate, a.dtype, b * a.candidates + k) == -__builtin_inf();
    r[k] = absent ? 0 : static_cast<T>(r[k] * scale);
  }
}

template <class V>
void backward(const MarginalLseBackward& a, int64_t b) {
  using T = typename V::scalar;
  using vec = typename V::vec;
  const int acc = sizeof(T) == 4 ? kFloat32 : kFloat64;
  for (int64_t k = 0; k < a.candidates; ++k) {
    const int64_t row = b * a.candidates + k;
    if (a.sequence) {
      const T d = static_cast<const T*>(a.grad)[b] * static_cast<const T*>(a.responsibility)[row];
      for (int64_t m = 0; m < a.positions; ++m) {
        const bool active = a.mask == nullptr || a.mask[b * a.positions + m] != 0;
        write(a.d_gold, a.dtype, row * a.positions + m, active ? d : 0);
      }
      // An all-masked query has zero responsibilities, so d is 0 unless the upstream gradient is not finite.
      write(a.d_candidate, a.dtype, row, static_cast<const T*>(a.responsibility)[row] == 0 ? 0 : d);
      continue;
    }
    vec sum = vec{};
    for (int64_t begin = 0; begin < a.positions; begin += V::lanes) {
      const int64_t m0 = first_lane<V>(begin, a.positions), count = a.positions - m0;
      const vec r = load_some<V>(a.responsibility, acc, row * a.positions + m0, count, 0);
      const vec grad = load_some<V>(a.grad, acc, b * a.positions + m0, count, 0);
      vec d = r == 0 ? vec{} : grad * r;  // masked and absent stay 0 under any upstream gradient
      store_some<V>(a.d_gold, a.dtype, row * a.positions + m0, count, d);
      for (int64_t i = 0; i < begin - m0; ++i) d[i] = 0;  // summed before
      sum += d;
    }
    T total = 0;
    for (int i = 0; i < V::lanes; ++i) total += sum[i];
    write(a.d_candidate, a.dtype, row, total);
  }
}

void exp_n(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += F32::lanes) {
    store_some<F32>(y, kFloat32, i, n - i, F32::exp(load_some<F32>(x, kFloat32, i, n - i, 0)));
  }
}

template <class V>
void forward(const MarginalLse& a, int64_t query) {
  a.sequence ? forward_sequence<V>(a, query) : forward_token<V>(a, query);
}

// The generic level also carries float64, which exists to check gradients.
template <class V>
MarginalLseLevel level_of() {
  return {forward<V>, backward<V>, exp_n};
}

}  // namespace
}  // namespace realm_fast
