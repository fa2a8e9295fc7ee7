#ifdef REALM_FAST_X86
#include "linear_marginal_ce/linear_gold_kernel.h"

namespace realm_fast {
LinearGoldLevel linear_gold_avx512() { return linear_gold_level<ComputeF32>(); }
}  // namespace realm_fast
#endif
