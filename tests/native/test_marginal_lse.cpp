// marginal_lse under the sanitizers: exact buffers filled with NaN, and any number of threads gives the bits
// that one gives.
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "core/cpu.h"
#include "marginal_lse/marginal_lse.h"

using namespace realm_fast;

namespace {

template <class T>
std::vector<T> run(int64_t batch, int64_t candidates, int64_t positions, bool sequence, int threads) {
  const int dtype = sizeof(T) == 8 ? 1 : 0;
  const size_t pairs = static_cast<size_t>(batch * candidates),
               marks = static_cast<size_t>(batch * positions);
  const size_t outputs = sequence ? static_cast<size_t>(batch) : marks;
  const T nan = std::numeric_limits<T>::quiet_NaN();
  std::mt19937 random(3);
  std::normal_distribution<T> normal(0, 2);
  std::vector<T> gold(pairs * static_cast<size_t>(positions)), candidate(pairs), grad(outputs);
  for (auto* values : {&gold, &candidate, &grad}) {
    for (T& value : *values) value = normal(random);
  }
  std::vector<uint8_t> mask(marks);
  for (uint8_t& counts : mask) counts = random() % 3 != 0;
  std::vector<T> marginal(outputs, nan), responsibility(outputs * static_cast<size_t>(candidates), nan);
  std::vector<T> d_gold(gold.size(), nan), d_candidate(pairs, nan);
  marginal_lse_cpu({gold.data(), candidate.data(), mask.data(), marginal.data(), responsibility.data(), batch,
                    candidates, positions, sequence, dtype},
                   threads);
  marginal_lse_backward_cpu({grad.data(), responsibility.data(), mask.data(), d_gold.data(),
                             d_candidate.data(), batch, candidates, positions, sequence, dtype},
                            threads);
  std::vector<T> all;
  for (const auto* values : {&marginal, &responsibility, &d_gold, &d_candidate}) {
    all.insert(all.end(), values->begin(), values->end());
  }
  for (const T value : all) CHECK(std::isfinite(value));
  return all;
}

template <class T>
void compare_threads() {
  for (const bool sequence : {false, true}) {
    // The last is large enough for the threads to be used; odd sizes end inside a vector.
    for (const auto& [b, k, m] : {std::array<int64_t, 3>{1, 1, 1}, {7, 3, 5}, {131, 9, 131}}) {
      const auto alone = run<T>(b, k, m, sequence, 1);
      for (const int threads : {2, 3, 8}) CHECK((run<T>(b, k, m, sequence, threads) == alone));
    }
  }
}

}  // namespace

TEST(marginal_lse_with_any_number_of_threads_is_marginal_lse_with_one) {
  for (const auto& level : available_cpu_levels()) {
    force_cpu_level(level);
    compare_threads<float>();
    compare_threads<double>();
  }
  force_cpu_level("");
}
