// The generic level, and the choice of the level.
#include "marginal_lse/marginal_lse.h"

#include "core/cpu.h"
#include "core/parallel.h"
#include "marginal_lse/marginal_lse_kernel.h"

namespace realm_fast {
namespace {

// Below this many elements waking a thread costs more than the work.
constexpr int64_t kElementsPerThread = 32768;

MarginalLseLevel current_level() {
#ifdef REALM_FAST_X86
  const CpuFeatures cpu = cpu_features();
  if (cpu.avx512) return marginal_lse_avx512();
  if (cpu.avx2) return marginal_lse_avx2();
#endif
  return level_of<F32>();
}

template <class Args, class Run>
void over_queries(const Args& args, int num_threads, const Run& run) {
  const int64_t elements = args.batch * args.candidates * args.positions;
  const int64_t useful = 1 + elements / kElementsPerThread;
  const int threads = useful < num_threads ? static_cast<int>(useful) : num_threads;
  parallel_for(args.batch, threads, [&](int64_t query, int) { run(args, query); });
}

}  // namespace

void marginal_lse_cpu(const MarginalLse& args, int num_threads) {
  over_queries(args, num_threads, args.dtype == kFloat64 ? forward<F64> : current_level().forward);
}

void marginal_lse_backward_cpu(const MarginalLseBackward& args, int num_threads) {
  over_queries(args, num_threads, args.dtype == kFloat64 ? backward<F64> : current_level().backward);
}

void vector_exp(const float* x, float* y, int64_t n) { current_level().exp(x, y, n); }

}  // namespace realm_fast
