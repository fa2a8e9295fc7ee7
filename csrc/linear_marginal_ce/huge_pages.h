// Large buffers that are new in every call spend more time in page faults than in being filled: 40 ms against
// 6 ms for 94 MB of gradients on one machine. Huge pages take one fault for 512.
#pragma once

#include <cstdint>

namespace realm_fast {

// Asks the kernel for huge pages in [p, p + bytes) where it gives them on request (Linux, THP "madvise"); a
// hint: buffers under 4 MiB, other systems and refusals are left as they are.
void advise_huge_pages(void* p, int64_t bytes);

}  // namespace realm_fast
