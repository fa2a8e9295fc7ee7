#ifdef REALM_FAST_X86
#include "marginal_lse/marginal_lse_kernel.h"

namespace realm_fast {
MarginalLseLevel marginal_lse_avx512() { return level_of<F32>(); }
}  // namespace realm_fast
#endif
