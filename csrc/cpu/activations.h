// The activations of AdditiveHidden and their derivatives: of a whole vector in fp32, of one number in fp64.
//
// fp64 takes the C library's functions. In fp32: exp and expm1 by reduction to |r| <= ln(2)/2 and Taylor's series; erfc
// as exp(-z^2) t p(t), t = 1/(1 + z/2), p a Chebyshev fit of degree 10 in t (off by 1.3e-8, relative); sin and cos
// reduced by pi/2 in fp64, then Taylor's series.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "numbers.h"

namespace hk {
namespace {

using Floats = Plain<float>::Vector;
constexpr int floats = HK_VECTOR_BYTES / sizeof(float);
typedef int32_t Ints __attribute__((vector_size(HK_VECTOR_BYTES)));
typedef double Doubles __attribute__((vector_size(2 * HK_VECTOR_BYTES)));  // as many as Floats

// What an activation is taken of at once.
template <class Sum>
struct Unit {
    using type = double;
    static constexpr int count = 1;
};
template <>
struct Unit<float> {
    using type = Floats;
    static constexpr int count = floats;
};

typedef int64_t Longs __attribute__((vector_size(HK_VECTOR_BYTES)));
using Wide = Plain<double>::Vector;  // relu alone takes whole vectors of fp64, within a product

inline Wide where(Longs condition, Wide a, Wide b) { return condition ? a : b; }
inline Floats where(Ints condition, Floats a, Floats b) { return condition ? a : b; }
inline double where(bool condition, double a, double b) { return condition ? a : b; }
template <class T>
inline T not_negative(T x) { return where(x < 0.0f, T{}, x); }  // NaN stays NaN
#if defined(__AVX512F__) && HK_VECTOR_BYTES == 64  // one instruction, which gcc does not make of the above
inline Floats not_negative(Floats x) { return _mm512_max_ps(Floats{}, x); }
#elif defined(__AVX2__) && HK_VECTOR_BYTES == 32
inline Floats not_negative(Floats x) { return _mm256_max_ps(Floats{}, x); }
#endif
inline Floats all(float x) { return Floats{} + x; }

template <class T>
inline T clamped(T x, float low, float high) {
    x = where(x < low, T{} + low, x);
    return where(x > high, T{} + high, x);
}

struct Exponential {
    Floats scale, rest;  // exp(x) = scale * (1 + rest)
};

inline Exponential exponential(Floats x) {
    constexpr float to_integer = 12582912.0f;  // 1.5 * 2^23: a sum with it has no digits after the point
    x = clamped(x, -87.0f, 88.0f);
    Floats n = (x * 1.44269504f + to_integer) - to_integer;
    Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = all(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    Ints bits = (__builtin_convertvector(n, Ints) + 127) << 23;
    return {(Floats)bits, p * r * r + r};
}

inline Floats exp_(Floats x) {
    Exponential e = exponential(x);
    return where(x < -87.0f, Floats{}, e.scale * e.rest + e.scale);
}
inline double exp_(double x) { return exp(x); }

inline Floats expm1_(Floats x) {
    Exponential e = exponential(x);
    return where(x > 88.0f, all(INFINITY), e.scale * e.rest + (e.scale - 1.0f));
}
inline double expm1_(double x) { return expm1(x); }

inline Floats erfc_(Floats x) {
    Floats z = where(x < 0.0f, -x, x), t = 1.0f / (1.0f + 0.5f * z);
    Floats p = all(0.0431973913f);
    p = p * t - 0.234733518f;
    p = p * t + 0.493674523f;
    p = p * t - 0.454928282f;
    p = p * t + 0.132132217f;
    p = p * t - 0.0591888235f;
    p = p * t + 0.0934569986f;
    p = p * t + 0.175316294f;
    p = p * t + 0.246884668f;
    p = p * t + 0.28209374f;
    p = p * t + 0.282094796f;
    Floats tail = p * t * exp_(-z * z);
    return where(x < 0.0f, 2.0f - tail, tail);
}
inline double erfc_(double x) { return erfc(x); }

// sin(x + quarters * pi / 2); past 1e9, where numbers of fp32 lie 64 apart, that of 1e9
inline Floats sine(Floats x, int quarters) {
    constexpr double to_integer = 6755399441055744.0;  // 1.5 * 2^52
    Doubles wide = __builtin_convertvector(clamped(x, -1e9f, 1e9f), Doubles);
    Doubles n = (wide * 0.63661977236758134 + to_integer) - to_integer;
    Floats r = __builtin_convertvector((wide - n * 1.5707963267948966) - n * 6.123233995736766e-17, Floats);
    Ints quadrant = (__builtin_convertvector(n, Ints) + quarters) & 3;
    Floats s = r * r;
    Floats odd = r + r * s * (-1.0f / 6 + s * (1.0f / 120 + s * (-1.0f / 5040 + s * (1.0f / 362880))));
    Floats even = 1.0f + s * (-0.5f + s * (1.0f / 24 + s * (-1.0f / 720 + s * (1.0f / 40320))));
    Floats value = where((quadrant & 1) != 0, even, odd);
    return where((quadrant & 2) != 0, -value, value) + (x - x);  // NaN of what is not finite
}
inline Floats sin_(Floats x) { return sine(x, 0); }
inline Floats cos_(Floats x) { return sine(x, 1); }
inline double sin_(double x) { return sin(x); }
inline double cos_(double x) { return cos(x); }

template <class T>
inline T sigmoid(T x) {
    return 1.0f / (2.0f + expm1_(-x));
}

inline Floats tanh_(Floats x) {
    Floats e = expm1_(2.0f * where(x > 20.0f, all(20.0f), x));
    return e / (e + 2.0f);
}
inline double tanh_(double x) { return tanh(x); }

// Constants, in the precision of what they multiply.
template <class T>
struct Constants {
    static constexpr double sqrt_half = 0.70710678118654752, sqrt_2_over_pi = 0.79788456080286536, cubic = 0.044715;
};
template <>
struct Constants<Floats> {
    static constexpr float sqrt_half = 0.70710678f, sqrt_2_over_pi = 0.79788456f, cubic = 0.044715f;
};

// One per activation: its value, and its derivative at x.
struct Identity {
    template <class T>
    static T value(T x) { return x; }
    template <class T>
    static T slope(T) { return T{} + 1.0f; }
};
struct Relu {
    template <class T>
    static T value(T x) { return not_negative(x); }
    template <class T>
    static T slope(T x) { return where(x > 0.0f, T{} + 1.0f, T{}); }
};
struct Gelu {
    template <class T>
    static T value(T x) { return 0.5f * x * erfc_(-x * Constants<T>::sqrt_half); }
    template <class T>
    static T slope(T x) {
        return 0.5f * erfc_(-x * Constants<T>::sqrt_half) +
               x * (0.5f * Constants<T>::sqrt_2_over_pi * exp_(-0.5f * x * x));
    }
};
struct GeluTanh {
    template <class T>
    static T inner(T x) { return 2 * Constants<T>::sqrt_2_over_pi * (x + Constants<T>::cubic * x * x * x); }
    template <class T>
    static T value(T x) { return x * sigmoid(inner(x)); }  // (1 + tanh(u)) / 2 = sigmoid(2 u)
    template <class T>
    static T slope(T x) {
        x = clamped(x, -100.0f, 100.0f);  // 0 or 1 from there, and no overflow
        T s = sigmoid(inner(x));
        return s + x * s * sigmoid(-inner(x)) * (2 * Constants<T>::sqrt_2_over_pi) *
                       (1.0f + 3 * Constants<T>::cubic * x * x);
    }
};
struct Silu {
    template <class T>
    static T value(T x) { return x * sigmoid(x); }
    template <class T>
    static T slope(T x) {
        T s = sigmoid(x);
        return s * (1.0f + x * sigmoid(-x));
    }
};
struct Tanh {
    template <class T>
    static T value(T x) { return tanh_(x); }
    template <class T>
    static T slope(T x) {
        T t = tanh_(x);
        return 1.0f - t * t;
    }
};
struct Sin {
    template <class T>
    static T value(T x) { return sin_(x); }
    template <class T>
    static T slope(T x) { return cos_(x); }
};

// run(F{}) for the activation's F
template <class Run>
inline void with_activation(Activation activation, Run run) {
    switch (activation) {
        case Activation::relu: return run(Relu{});
        case Activation::gelu: return run(Gelu{});
        case Activation::gelu_tanh: return run(GeluTanh{});
        case Activation::silu: return run(Silu{});
        case Activation::tanh: return run(Tanh{});
        case Activation::sin: return run(Sin{});
        default: return run(Identity{});
    }
}

}  // namespace
}  // namespace hk
