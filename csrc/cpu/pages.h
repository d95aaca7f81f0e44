// Memory that a result is about to be written to.
#pragma once

#include <cstddef>

namespace hk {

// A fresh result faults once for each small page that is first written: for one of 32 MiB an eighth of a forward's time.
// Where the system has large pages for who asks, ask.
void ask_for_large_pages(char* data, size_t bytes);

}  // namespace hk
