#include "pages.h"

#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hk {

void ask_for_large_pages(char* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr size_t page = size_t(2) << 20;
    auto begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // refused, nothing changes
#endif
}

}  // namespace hk
