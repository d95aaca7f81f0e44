// One instruction set's innermost loops. Compiled once for each, with HK_ISA its name, HK_VECTOR_BYTES its vectors' size,
// HK_TILE_ROWS the rows of a tile whose sums fill its registers, and HK_PAIRS where it multiplies pairs of bf16.
//
// Everything here has internal linkage and no template of the standard library is used: a function that two of these
// objects shared could be linked from the one that this CPU cannot run.
#include "kernels.h"

#include <stdint.h>
#include <string.h>

#include "activations.h"
#include "numbers.h"
#include "pack.h"

namespace hk {
namespace {

struct AsTheyAre {};  // the vectors, in place of an activation

template <class Kind, class F, int rows, int vectors>
void tile(int64_t depth, const Strip& row_strip, const Strip& lane_strip, void* out_, const int64_t* row_offset,
          const int64_t* vector_offset, bool accumulate) {
    using Sum = typename Kind::Sum;
    using Sums = typename Plain<Sum>::Vector;
    auto a = static_cast<const typename Kind::Packed*>(row_strip.data);
    auto b = static_cast<const typename Kind::Packed*>(lane_strip.data);
    auto context = static_cast<const Sum*>(lane_strip.context);
    int64_t row_apart = row_strip.apart, apart = lane_strip.apart;
    const typename Kind::Packed* fours[(rows + 3) / 4];  // a pointer for each four: the others are 1, 2 and 3 times apart
#pragma GCC unroll 7
    for (int n = 0; n < (rows + 3) / 4; ++n) fours[n] = a + 4 * n * row_apart;
    Sums sum[rows][vectors] = {};
    for (int64_t d = 0; d < depth; ++d, b += lane_strip.pitch) {
        typename Kind::Vector across[vectors];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) {
            across[v] = *(const typename Kind::Unaligned*)(b + v * apart);
            if constexpr (!same<F, AsTheyAre>) across[v] = F::value(across[v] + context[d]);
        }
#pragma GCC unroll 28
        for (int w = 0; w < rows; ++w) {
#pragma GCC unroll 2
            for (int v = 0; v < vectors; ++v)
                sum[w][v] = Kind::multiply(fours[w / 4][w % 4 * row_apart], across[v], sum[w][v]);
        }
#pragma GCC unroll 7
        for (int n = 0; n < (rows + 3) / 4; ++n) fours[n] += row_strip.pitch;
    }
    auto out = static_cast<Sum*>(out_);
#pragma GCC unroll 28
    for (int w = 0; w < rows; ++w) {
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) {
            auto to = (typename Plain<Sum>::Unaligned*)(out + row_offset[w] + vector_offset[v]);
            *to = accumulate ? *to + sum[w][v] : sum[w][v];
        }
    }
}

// The first numbers of a vector, and a store of them.
template <class T, class U>
inline U some(const T* from, int64_t count) {
    U value{};
    memcpy(&value, from, count * sizeof(T));
    return value;
}

template <class T>
inline void put_some(const T* value, int64_t count, T* to, int64_t stride) {
    for (int64_t n = 0; n < count; ++n) to[n * stride] = value[n];
}

// The sum of a vector's numbers, by halves.
template <class T, int bytes>
inline T total(const void* vector) {
    if constexpr (bytes == sizeof(T)) {
        T value;
        memcpy(&value, vector, bytes);
        return value;
    } else {
        typedef T Half __attribute__((vector_size(bytes / 2)));
        Half low, high;
        memcpy(&low, vector, bytes / 2);
        memcpy(&high, static_cast<const char*>(vector) + bytes / 2, bytes / 2);
        low += high;
        return total<T, bytes / 2>(&low);
    }
}

template <class T, int rows, int columns>
void dots(int64_t depth, Lines row_lines, Lines column_lines, void* out_, const int64_t apart[2]) {
    using Vector = typename Plain<T>::Vector;
    using Unaligned = typename Plain<T>::Unaligned;
    constexpr int64_t lanes = HK_VECTOR_BYTES / sizeof(T);
    auto a = static_cast<const T*>(row_lines.data), b = static_cast<const T*>(column_lines.data);
    Vector sum[rows][columns] = {};
    auto step = [&](auto vector) {
        Vector column[columns];
#pragma GCC unroll 3
        for (int c = 0; c < columns; ++c) column[c] = vector(b + c * column_lines.apart);
#pragma GCC unroll 4
        for (int w = 0; w < rows; ++w) {
            Vector row = vector(a + w * row_lines.apart);
#pragma GCC unroll 3
            for (int c = 0; c < columns; ++c) sum[w][c] += row * column[c];
        }
    };
    for (; depth >= lanes; depth -= lanes, a += lanes, b += lanes)
        step([](const T* from) -> Vector { return *reinterpret_cast<const Unaligned*>(from); });
    if (depth) step([depth](const T* from) { return some<T, Vector>(from, depth); });
    auto out = static_cast<T*>(out_);
#pragma GCC unroll 4
    for (int w = 0; w < rows; ++w) {
#pragma GCC unroll 3
        for (int c = 0; c < columns; ++c)
            out[w * apart[0] + c * apart[1]] = total<T, HK_VECTOR_BYTES>(&sum[w][c]);
    }
}

template <class Kind>
void form(Activation activation, const void* chunks_, const void* deep_, const void* own_, int64_t depth,
          int64_t padded, void* panel_) {
    using Sum = typename Kind::Sum;
    using U = typename Unit<Sum>::type;
    constexpr int64_t count = Unit<Sum>::count;
    auto chunks = static_cast<const Sum*>(chunks_), deep = static_cast<const Sum*>(deep_);
    auto own = static_cast<const Sum*>(own_);
    auto panel = static_cast<typename Kind::Part*>(panel_);
    if (depth % Kind::depth) memset(panel + at<Kind>(depth - 1, 0, padded), 0, sizeof(*panel) * Kind::depth * padded);
    with_activation(activation, [&](auto f) {
        for (int64_t d = 0; d < depth; ++d) {
            const Sum* from = chunks + d * padded;
            typename Kind::Part* to = panel + at<Kind>(d, 0, padded);
            for (int64_t l = 0; l < padded; l += count) {
                int64_t n = count < padded - l ? count : padded - l;
                U pre = n == count ? some<Sum, U>(from + l, count) : some<Sum, U>(from + l, n);
                U value = decltype(f)::value(pre + (deep ? U{} + deep[d] : some<Sum, U>(own + l, count)));
                typename Kind::Part rounded[count];
#pragma GCC ivdep
                for (int64_t i = 0; i < count; ++i) put(reinterpret_cast<const Sum*>(&value)[i], rounded[i]);
                if (n == count && Kind::depth == 1) memcpy(to + l, rounded, sizeof rounded);
                else put_some(rounded, n, to + l * Kind::depth, Kind::depth);
            }
        }
    });
}

template <class Sum, class Stored>
void pull_back(Activation activation, const void* dvalue_, const void* chunks_, const void* context_, int64_t n,
               void* dchunks_, void* dcontext_) {
    using U = typename Unit<Sum>::type;
    constexpr int64_t count = Unit<Sum>::count;
    auto dvalue = static_cast<const Sum*>(dvalue_);
    auto chunks = static_cast<const Stored*>(chunks_), context = static_cast<const Stored*>(context_);
    auto dchunks = static_cast<double*>(dchunks_);
    auto dcontext = static_cast<Sum*>(dcontext_);
    with_activation(activation, [&](auto f) {
        for (int64_t k = 0; k < n; k += count) {
            int64_t there = count < n - k ? count : n - k;
            Sum pre[count] = {};
            for (int64_t i = 0; i < there; ++i) pre[i] = static_cast<Sum>(load(chunks[k + i]) + load(context[k + i]));
            U slope = decltype(f)::slope(some<Sum, U>(pre, count));
            for (int64_t i = 0; i < there; ++i) {
                Sum d = dvalue[k + i] * reinterpret_cast<const Sum*>(&slope)[i];
                dchunks[k + i] += d;
                dcontext[k + i] += d;
            }
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
void combine(double a, const void* x_, double b, const void* y_, int64_t n, void* out_) {
    auto x = static_cast<const Sum*>(x_), y = static_cast<const Sum*>(y_);
    auto out = static_cast<Sum*>(out_);
    auto of_x = static_cast<Sum>(a), of_y = static_cast<Sum>(b);
#pragma GCC ivdep
    for (int64_t l = 0; l < n; ++l) out[l] = of_x * x[l] + of_y * y[l];
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
    kernels.tile[rows - 1][0] = tile<Kind, AsTheyAre, rows, 1>;
    kernels.tile[rows - 1][1] = tile<Kind, AsTheyAre, rows, 2>;
    if constexpr (rows > 1) tiles<Kind, rows - 1>(kernels);
}

template <class Kind, int rows>
void tall_tiles(Kernels& kernels) {
    kernels.tall[static_cast<int>(Activation::identity)][rows - 1] = tile<Kind, Identity, rows, 1>;
    kernels.tall[static_cast<int>(Activation::relu)][rows - 1] = tile<Kind, Relu, rows, 1>;
    if constexpr (rows > 1) tall_tiles<Kind, rows - 1>(kernels);
}

template <class T, int rows = dot_rows>
void all_dots(Kernels& kernels) {
    kernels.dots[rows - 1][0] = dots<T, rows, 1>;
    kernels.dots[rows - 1][1] = dots<T, rows, 2>;
    kernels.dots[rows - 1][2] = dots<T, rows, 3>;
    if constexpr (rows > 1) all_dots<T, rows - 1>(kernels);
}

template <class Kind>
Kernels table() {
    using Sum = typename Kind::Sum;
    Kernels kernels{};
    kernels.rows = HK_TILE_ROWS;
    kernels.vectors = max_vectors;
    kernels.lanes = HK_VECTOR_BYTES / sizeof(Sum);
    kernels.depth = Kind::depth;
    kernels.packed_bytes = sizeof(typename Kind::Packed);
    kernels.sum_bytes = sizeof(Sum);
    tiles<Kind, HK_TILE_ROWS>(kernels);
    if constexpr (Kind::depth == 1) {
        tall_tiles<Kind, HK_TILE_ROWS * max_vectors>(kernels);
        all_dots<Sum>(kernels);
    }
    kernels.form = form<Kind>;
    kernels.add[0] = add<Sum>;
    kernels.add[1] = add<double>;
    kernels.combine = combine<Sum>;
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
