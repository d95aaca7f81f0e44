// Which instruction sets this CPU runs, best first.
#include <string.h>

#include "kernels.h"

namespace hk {
namespace {

struct Choice {
    const char* name;
    const InstructionSet& (*get)();
    bool runs;
};

const Choice* choices(int* count) {
#if defined(__x86_64__)
    static const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    static const bool wide = fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    static const Choice all[] = {
        {"avx512bf16", avx512bf16, wide && __builtin_cpu_supports("avx512bf16")},
        {"avx512", avx512, wide},
        {"avx2", avx2, fma},
        {"portable", portable, true},
    };
    *count = 4;
#else
    static const Choice all[] = {{"portable", portable, true}};
    *count = 1;
#endif
    return all;
}

}  // namespace

const InstructionSet* instruction_set(const char* name) {
    int count;
    const Choice* all = choices(&count);
    for (int n = 0; n < count; ++n)
        if (all[n].runs && (!name || !strcmp(name, all[n].name))) return &all[n].get();
    return nullptr;
}

int instruction_sets(const char* names[max_instruction_sets]) {
    int count, found = 0;
    const Choice* all = choices(&count);
    for (int n = 0; n < count; ++n)
        if (all[n].runs) names[found++] = all[n].name;
    return found;
}

}  // namespace hk
