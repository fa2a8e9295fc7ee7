// <immintrin.h> without the false alarms: GCC 12 warns about the undefined vectors that its own AVX-512
// intrinsics begin with (GCC bug 105593).
#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
