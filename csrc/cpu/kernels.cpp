// One instruction set's innermost loops. Compiled once for each, with HK_ISA its name, HK_VECTOR_BYTES its vectors' size,
// HK_TILE_ROWS the rows of a tile whose sums fill its registers, and HK_PAIRS where it multiplies pairs of bf16.
//
// Everything here has internal linkage and no template of the standard library is used: a function that two of these
// objects shared could be linked from the one that this CPU cannot run.
#include "kernels.h"

#include <stdint.h>
#include <string.h>

#if HK_PAIRS
#include <immintrin.h>
#endif

#include "activations.h"

namespace hk {
namespace {

struct bf16 {
    uint16_t bits;
};

inline float load(float v) { return v; }
inline double load(double v) { return v; }
inline float load(bf16 v) {
    uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline void put(float v, float& out) { out = v; }
inline void put(double v, double& out) { out = v; }
inline void put(double v, float& out) { out = static_cast<float>(v); }
inline void put(float v, bf16& out) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &v, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

// A kind of number: how it is packed, and how it is multiplied into sums.
template <class T>
struct Plain {
    using Packed = T;
    using Part = T;
    using Sum = T;
    static constexpr int64_t depth = 1;
    typedef T Vector __attribute__((vector_size(HK_VECTOR_BYTES)));
    typedef T Unaligned __attribute__((vector_size(HK_VECTOR_BYTES), aligned(alignof(T)), may_alias));
    static Vector multiply(T row, Vector lanes, Vector sum) { return sum + row * lanes; }
};

#if HK_PAIRS
struct Pairs {
    using Packed = uint32_t;
    using Part = bf16;
    using Sum = float;
    static constexpr int64_t depth = 2;
    typedef uint32_t Vector __attribute__((vector_size(HK_VECTOR_BYTES)));
    typedef uint32_t Unaligned __attribute__((vector_size(HK_VECTOR_BYTES), aligned(4), may_alias));
    using Sums = Plain<float>::Vector;
    static Sums multiply(uint32_t row, Vector lanes, Sums sum) {
        return (Sums)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(row), (__m512bh)lanes);
    }
};
#endif

template <class Kind, int rows, int vectors>
void tile(int64_t depth, const void* rows_, const void* lanes_, void* out_, const int64_t* row_offset,
          const int64_t* vector_offset, bool accumulate) {
    using Sum = typename Kind::Sum;
    using Sums = typename Plain<Sum>::Vector;
    constexpr int lanes = HK_VECTOR_BYTES / sizeof(Sum);
    auto a = static_cast<const typename Kind::Packed*>(rows_);
    auto b = static_cast<const typename Kind::Packed*>(lanes_);
    Sums sum[rows][vectors] = {};
    for (int64_t d = 0; d < depth; ++d, a += rows, b += vectors * lanes) {
        typename Kind::Vector across[vectors];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) across[v] = *(const typename Kind::Unaligned*)(b + v * lanes);
#pragma GCC unroll 14
        for (int w = 0; w < rows; ++w) {
#pragma GCC unroll 2
            for (int v = 0; v < vectors; ++v) sum[w][v] = Kind::multiply(a[w], across[v], sum[w][v]);
        }
    }
    auto out = static_cast<Sum*>(out_);
#pragma GCC unroll 14
    for (int w = 0; w < rows; ++w) {
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) {
            auto to = (typename Plain<Sum>::Unaligned*)(out + row_offset[w] + vector_offset[v]);
            *to = accumulate ? *to + sum[w][v] : sum[w][v];
        }
    }
}

// Where depth d of lane l lies in a panel, in parts.
template <class Kind>
inline int64_t at(int64_t d, int64_t l, int64_t padded) {
    return (d / Kind::depth * padded + l) * Kind::depth + d % Kind::depth;
}

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

// A panel whose lanes' numbers lie side by side along the depth is the transpose of what is in memory: squares of it are
// turned in registers, exchanging halves, quarters and so on.
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

// Returns how much of the depth was packed. The last lanes may be written past `padded`, onto the next depths' first, which
// are written after them: so the squares go from the last, and as much depth is left over as they may spill onto.
template <class T>
int64_t pack_squares(const T* base, const int64_t* own, int64_t width, int64_t depth, int64_t padded, T* panel) {
    constexpr int lanes = HK_VECTOR_BYTES / sizeof(T);
    int64_t done = 0;
    for (; (depth - done - lanes) * padded >= lanes - 1 && done + lanes < depth; done += lanes) {
        for (int64_t start = (width - 1) / lanes * lanes; start >= 0; start -= lanes) {
            typename Plain<T>::Vector square[lanes];
            for (int n = 0; n < lanes; ++n) {
                int64_t lane = start + n < width ? start + n : width - 1;
                square[n] = *(const typename Plain<T>::Unaligned*)(base + own[lane] + done);
            }
            turn<1>(square);
            for (int n = 0; n < lanes; ++n)
                *(typename Plain<T>::Unaligned*)(panel + (done + n) * padded + start) = square[n];
        }
    }
    return done;
}
#endif

// How many of the offsets from the first lie side by side.
inline int64_t run_of(const int64_t* offset, int64_t n) {
    int64_t run = 1;
    while (run < n && offset[run] == offset[0] + run) ++run;
    return run;
}

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
    if constexpr (same<Part, Stored> && Kind::depth == 1)
        if (run_of(deep.offset, deep.n) == deep.n)
            done = pack_squares(base + deep.offset[0], own.offset, own.n, deep.n, padded, panel);
#endif
    for (int64_t l = 0; l < own.n; ++l) {
        const Stored* from = base + own.offset[l];
        for (int64_t d = done; d < deep.n; ++d) put(load(from[deep.offset[d]]), panel[at<Kind>(d, l, padded)]);
    }
}

template <class Kind>
void form(Activation activation, const void* chunks_, const void* deep_, const void* own_, int64_t depth,
          int64_t padded, void* panel_) {
    using Sum = typename Kind::Sum;
    auto chunks = static_cast<const Sum*>(chunks_), deep = static_cast<const Sum*>(deep_);
    auto own = static_cast<const Sum*>(own_);
    auto panel = static_cast<typename Kind::Part*>(panel_);
    if (depth % Kind::depth) memset(panel + at<Kind>(depth - 1, 0, padded), 0, sizeof(*panel) * Kind::depth * padded);
    with_activation(activation, [&](auto f) {
        constexpr int lanes = HK_VECTOR_BYTES / sizeof(Sum);
        for (int64_t d = 0; d < depth; ++d) {
            const Sum* from = chunks + d * padded;
            typename Kind::Part* to = panel + at<Kind>(d, 0, padded);
            auto one = [&](int64_t l) {
                put(decltype(f)::value(from[l] + (deep ? deep[d] : own[l])), to[l * Kind::depth]);
            };
            int64_t l = 0;
            for (; l + lanes <= padded; l += lanes) {
#pragma GCC ivdep
                for (int n = 0; n < lanes; ++n) one(l + n);
            }
            for (; l < padded; ++l) one(l);
        }
    });
}

template <class Sum, class Stored>
void pull_back(Activation activation, const void* dvalue_, const void* chunks_, const void* context_, int64_t n,
               void* dchunks_, void* dcontext_) {
    auto dvalue = static_cast<const Sum*>(dvalue_);
    auto chunks = static_cast<const Stored*>(chunks_), context = static_cast<const Stored*>(context_);
    auto dchunks = static_cast<double*>(dchunks_);
    auto dcontext = static_cast<Sum*>(dcontext_);
    with_activation(activation, [&](auto f) {
#pragma GCC ivdep
        for (int64_t k = 0; k < n; ++k) {
            Sum d = dvalue[k] * decltype(f)::slope(static_cast<Sum>(load(chunks[k]) + load(context[k])));
            dchunks[k] += d;
            dcontext[k] += d;
        }
    });
}

template <class Sum, class Stored>
void store(const void* sums_, int64_t n, void* out_) {
    auto sums = static_cast<const Sum*>(sums_);
    auto out = static_cast<Stored*>(out_);
    for (int64_t l = 0; l < n; ++l) {
        if constexpr (same<Stored, bf16>) put(static_cast<float>(sums[l]), out[l]);
        else put(sums[l], out[l]);
    }
}

template <class Sum>
void add(const void* sums_, int64_t n, void* totals_) {
    auto sums = static_cast<const Sum*>(sums_);
    auto totals = static_cast<Sum*>(totals_);
    for (int64_t l = 0; l < n; ++l) totals[l] += sums[l];
}

template <class Sum>
double spin(int64_t n) {
    using Sums = typename Plain<Sum>::Vector;
    constexpr int count = 2 * HK_TILE_ROWS < 24 ? 2 * HK_TILE_ROWS : 24;
    volatile Sum seed = 0.5;  // unknown to the compiler
    const Sums factor = Sums{} + seed, addend = factor;
    Sums sum[count];
#pragma GCC unroll 24
    for (int s = 0; s < count; ++s) sum[s] = factor + Sum(s);  // chains that differ
    for (int64_t left = n; left > 0; left -= count) {
#pragma GCC unroll 24
        for (int s = 0; s < count; ++s) sum[s] = sum[s] * factor + addend;
    }
    double total = 0;
#pragma GCC unroll 24
    for (int s = 0; s < count; ++s) total += sum[s][0];
    return total;
}

template <class Kind, int rows>
void tiles(Kernels& kernels) {
    kernels.tile[rows - 1][0] = tile<Kind, rows, 1>;
    kernels.tile[rows - 1][1] = tile<Kind, rows, 2>;
    if constexpr (rows > 1) tiles<Kind, rows - 1>(kernels);
}

#define HK_STRING_(name) #name
#define HK_STRING(name) HK_STRING_(name)

template <class Kind>
Kernels table() {
    using Sum = typename Kind::Sum;
    Kernels kernels{};
    kernels.isa = HK_STRING(HK_ISA);
    kernels.rows = HK_TILE_ROWS;
    kernels.vectors = max_vectors;
    kernels.lanes = HK_VECTOR_BYTES / sizeof(Sum);
    kernels.depth = Kind::depth;
    kernels.packed_bytes = sizeof(typename Kind::Packed);
    kernels.sum_bytes = sizeof(Sum);
    tiles<Kind, HK_TILE_ROWS>(kernels);
    kernels.form = form<Kind>;
    kernels.add[0] = add<Sum>;
    kernels.add[1] = add<double>;
    kernels.spin = spin<Sum>;
    if constexpr (sizeof(Sum) == sizeof(double)) {
        constexpr int n = static_cast<int>(Storage::f64);
        kernels.pack[n] = pack<Kind, double>;
        kernels.pull_back[n] = pull_back<double, double>;
        kernels.store[0][n] = kernels.store[1][n] = store<double, double>;
    } else {
        constexpr int n = static_cast<int>(Storage::f32), b = static_cast<int>(Storage::bf16);
        kernels.pack[n] = pack<Kind, float>;
        kernels.pack[b] = pack<Kind, bf16>;
        kernels.pull_back[n] = pull_back<float, float>;
        kernels.pull_back[b] = pull_back<float, bf16>;
        kernels.store[0][n] = store<float, float>;
        kernels.store[0][b] = store<float, bf16>;
        kernels.store[1][n] = store<double, float>;
        kernels.store[1][b] = store<double, bf16>;
    }
    return kernels;
}

}  // namespace

const InstructionSet& HK_ISA() {
    static const Kernels f32 = table<Plain<float>>(), f64 = table<Plain<double>>();
#if HK_PAIRS
    static const Kernels pairs = table<Pairs>();
    static const InstructionSet set{&f32, &f64, &pairs};
#else
    static const InstructionSet set{&f32, &f64, nullptr};
#endif
    return set;
}

}  // namespace hk
