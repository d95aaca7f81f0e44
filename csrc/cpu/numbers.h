// The kinds of number that the kernels multiply, and how they are loaded, rounded and packed; a part of kernels.cpp.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace hk {
namespace {

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

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

}  // namespace
}  // namespace hk
