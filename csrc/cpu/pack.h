// How panels are packed; a part of kernels.cpp, and like it compiled for each instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "numbers.h"

namespace hk {
namespace {

// Where depth d of lane l lies in a panel, in parts.
template <class Kind>
inline int64_t at(int64_t d, int64_t l, int64_t padded) {
    return (d / Kind::depth * padded + l) * Kind::depth + d % Kind::depth;
}

// How many of the offsets from the first lie side by side.
inline int64_t run_of(const int64_t* offset, int64_t n) {
    int64_t run = 1;
    while (run < n && offset[run] == offset[0] + run) ++run;
    return run;
}

// A panel whose lanes' numbers lie side by side along the depth, a vector of them at least, is the transpose of what is
// in memory: squares of it are turned in registers, exchanging halves, quarters and so on.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HK_SHUFFLE 1
#endif
#endif

#if HK_SHUFFLE
template <int... n>
struct Indices {};
template <int count, int... n>
struct Counted : Counted<count - 1, count - 1, n...> {};
template <int... n>
struct Counted<0, n...> {
    using type = Indices<n...>;
};

template <int step, class Vector, int... n>
inline void exchange(Vector& a, Vector& b, Indices<n...>) {
    constexpr int lanes = sizeof...(n);
    Vector low = __builtin_shufflevector(a, b, (n & step ? lanes + n - step : n)...);
    b = __builtin_shufflevector(a, b, (n & step ? lanes + n : n + step)...);
    a = low;
}

template <int step, class Vector, int lanes>
inline void turn(Vector (&square)[lanes]) {
#pragma GCC unroll 16
    for (int n = 0; n < lanes; ++n)
        if (!(n & step)) exchange<step>(square[n], square[n + step], typename Counted<lanes>::type{});
    if constexpr (2 * step < lanes) turn<2 * step>(square);
}

// Returns how much of the depth was packed: up to where no vector of it lies side by side. The last lanes of a square may
// lie past `padded`: there the next depths begin, which are written after them; but at the panel's end only what belongs
// to it is written.
template <class T>
int64_t pack_squares(const T* base, Side own, Side deep, int64_t padded, T* panel) {
    constexpr int lanes = HK_VECTOR_BYTES / sizeof(T);
    using Vector = typename Plain<T>::Vector;
    int64_t done = 0;
    for (; done + lanes <= deep.n && run_of(deep.offset + done, lanes) == lanes; done += lanes) {
        for (int64_t start = (own.n - 1) / lanes * lanes; start >= 0; start -= lanes) {
            Vector square[lanes];
            for (int n = 0; n < lanes; ++n) {
                int64_t lane = start + n < own.n ? start + n : own.n - 1;
                square[n] = *(const typename Plain<T>::Unaligned*)(base + own.offset[lane] + deep.offset[done]);
            }
            turn<1>(square);
            T* to = panel + done * padded + start;
            int64_t there = padded - start;
            bool spills = there < lanes && (deep.n - done - lanes) * padded < lanes - 1;
            for (int n = 0; n < lanes; ++n, to += padded) {
                if (spills) memcpy(to, &square[n], there * sizeof(T));
                else *(typename Plain<T>::Unaligned*)to = square[n];
            }
        }
    }
    return done;
}
#endif

// Whole vectors of `lanes` that lie side by side.
template <class T, int lanes>
void copy_runs(const T* base, Side own, Side deep, int64_t padded, T* panel) {
    typedef T Vector __attribute__((vector_size(lanes * sizeof(T)), aligned(alignof(T)), may_alias));
    for (int64_t l = 0; l < own.n; l += lanes) {
        const T* from = base + own.offset[l];
        T* to = panel + l;
        for (int64_t d = 0; d < deep.n; ++d, to += padded) *(Vector*)to = *(const Vector*)(from + deep.offset[d]);
    }
}

template <class Kind, class Stored>
void pack(const void* base_, Side own, Side deep, int64_t limit, int64_t padded, void* panel_) {
    using Part = typename Kind::Part;
    auto base = static_cast<const Stored*>(base_);
    auto panel = static_cast<Part*>(panel_);
    int64_t slots = (deep.n + Kind::depth - 1) / Kind::depth * Kind::depth;
    if (own.n < padded || deep.n < slots || limit) memset(panel, 0, sizeof(Part) * slots * padded);
    if (limit) {
        for (int64_t l = 0; l < own.n; ++l)
            for (int64_t d = 0; d < deep.n; ++d)
                if (own.feature[l] + deep.feature[d] < limit)
                    put(load(base[own.offset[l] + deep.offset[d]]), panel[at<Kind>(d, l, padded)]);
        return;
    }
    int64_t run = run_of(own.offset, own.n);
    bool even = run >= 4 && own.n % run == 0;
    for (int64_t start = run; even && start < own.n; start += run) even = run_of(own.offset + start, run) == run;
    if constexpr (same<Part, Stored> && Kind::depth == 1) {
        constexpr int lanes = HK_VECTOR_BYTES / sizeof(Part);
        if (even && run % lanes == 0) return copy_runs<Part, lanes>(base, own, deep, padded, panel);
        if (even && run % (lanes / 2) == 0) return copy_runs<Part, lanes / 2>(base, own, deep, padded, panel);
    }
    if (even) {
        for (int64_t d = 0; d < deep.n; ++d) {
            const Stored* from = base + deep.offset[d];
            Part* to = panel + at<Kind>(d, 0, padded);
            for (int64_t start = 0; start < own.n; start += run)
                for (int64_t l = 0; l < run; ++l) put(load(from[own.offset[start] + l]), to[(start + l) * Kind::depth]);
        }
        return;
    }
    int64_t done = 0;
#if HK_SHUFFLE
    if constexpr (same<Part, Stored> && Kind::depth == 1) done = pack_squares(base, own, deep, padded, panel);
#endif
    for (int64_t l = 0; l < own.n; ++l) {
        const Stored* from = base + own.offset[l];
        for (int64_t d = done; d < deep.n; ++d) put(load(from[deep.offset[d]]), panel[at<Kind>(d, l, padded)]);
    }
}

}  // namespace
}  // namespace hk
