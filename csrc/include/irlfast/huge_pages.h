// Fresh memory costs one page fault for each 4 KiB; a gradient as large as the logits spends more time on those than on
// arithmetic.
#pragma once

#include <cstdint>

namespace irlfast {

// Asks for huge pages for whatever of [data, data + bytes) has not been touched yet. Only whole pages inside the range
// are named, so a neighbouring allocation is not affected. Advice: does nothing where the system has no such call.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace irlfast
