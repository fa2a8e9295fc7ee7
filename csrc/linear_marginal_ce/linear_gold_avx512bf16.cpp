#ifdef REALM_FAST_X86
#include "linear_marginal_ce/linear_gold_kernel.h"

namespace realm_fast {
LinearGoldLevel linear_gold_avx512bf16() { return linear_gold_level<ComputeBF16>(); }
}  // namespace realm_fast
#endif
