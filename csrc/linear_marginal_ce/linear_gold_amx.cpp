#ifdef REALM_FAST_X86
#include "linear_marginal_ce/linear_gold_kernel.h"

namespace realm_fast {
LinearGoldLevel linear_gold_amx() { return linear_gold_level<ComputeTiles>(); }
}  // namespace realm_fast
#endif
