// The activations of AdditiveHidden and their derivatives, without branches, so that a loop over them becomes vectors.
//
// fp64 takes the C library's functions. In fp32: exp and expm1 by reduction to |r| <= ln(2)/2 and Taylor's series; erfc
// as exp(-z^2) t p(t), t = 1/(1 + z/2), p a Chebyshev fit of degree 10 in t (off by 1.3e-8, relative); sin and cos
// reduced by pi/2 in fp64, then Taylor's series.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace hk {
namespace {

struct Exponential {
    float scale, rest;  // exp(x) = scale * (1 + rest)
};

inline Exponential exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    Exponential result;
    memcpy(&result.scale, &bits, 4);
    result.rest = p * r * r + r;
    return result;
}

inline float exp_(float x) {
    Exponential e = exponential(x);
    return x < -87 ? 0 : e.scale * e.rest + e.scale;
}
inline double exp_(double x) { return exp(x); }

inline float expm1_(float x) {
    Exponential e = exponential(x);
    return x > 88 ? INFINITY : e.scale * e.rest + (e.scale - 1);
}
inline double expm1_(double x) { return expm1(x); }

inline float erfc_(float x) {
    float z = fabsf(x), t = 1 / (1 + 0.5f * z);
    float p = 0.0431973913f;
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
    float tail = p * t * exp_(-z * z);
    return x < 0 ? 2 - tail : tail;
}
inline double erfc_(double x) { return erfc(x); }

// sin(x + quarters * pi / 2); past 1e9, where numbers of fp32 lie 64 apart, that of 1e9
inline float sine(float x, int quarters) {
    x = x < -1e9f ? -1e9f : x > 1e9f ? 1e9f : x;
    double n = rint(x * 0.63661977236758134);
    float r = static_cast<float>((x - n * 1.5707963267948966) - n * 6.123233995736766e-17);
    int quadrant = (static_cast<int>(n) + quarters) & 3;
    float s = r * r;
    float odd = r + r * s * (-1.0f / 6 + s * (1.0f / 120 + s * (-1.0f / 5040 + s * (1.0f / 362880))));
    float even = 1 + s * (-0.5f + s * (1.0f / 24 + s * (-1.0f / 720 + s * (1.0f / 40320))));
    float value = quadrant & 1 ? even : odd;
    return quadrant & 2 ? -value : value;
}
inline float sin_(float x) { return sine(x, 0); }
inline float cos_(float x) { return sine(x, 1); }
inline double sin_(double x) { return sin(x); }
inline double cos_(double x) { return cos(x); }

template <class T>
inline T sigmoid(T x) {
    return 1 / (2 + expm1_(-x));
}

inline float tanh_(float x) {
    float e = expm1_(2 * (x > 20 ? 20.0f : x));
    return e / (e + 2);
}
inline double tanh_(double x) { return tanh(x); }

template <class T>
constexpr T sqrt_half = T(0.70710678118654752);
template <class T>
constexpr T sqrt_2_over_pi = T(0.79788456080286536);
template <class T>
constexpr T cubic = T(0.044715);

// One per activation: its value, and its derivative at x.
struct Identity {
    template <class T>
    static T value(T x) { return x; }
    template <class T>
    static T slope(T) { return 1; }
};
struct Relu {
    template <class T>
    static T value(T x) { return x < 0 ? T(0) : x; }  // NaN stays NaN
    template <class T>
    static T slope(T x) { return x > 0 ? T(1) : T(0); }
};
struct Gelu {
    template <class T>
    static T value(T x) { return T(0.5) * x * erfc_(-x * sqrt_half<T>); }
    template <class T>
    static T slope(T x) {
        return T(0.5) * erfc_(-x * sqrt_half<T>) + x * (T(0.5) * sqrt_2_over_pi<T> * exp_(T(-0.5) * x * x));
    }
};
struct GeluTanh {
    template <class T>
    static T inner(T x) { return 2 * sqrt_2_over_pi<T> * (x + cubic<T> * x * x * x); }
    template <class T>
    static T value(T x) { return x * sigmoid(inner(x)); }  // (1 + tanh(u)) / 2 = sigmoid(2 u)
    template <class T>
    static T slope(T x) {
        x = x < -100 ? T(-100) : x > 100 ? T(100) : x;  // 0 or 1 from there, and no overflow
        T s = sigmoid(inner(x));
        return s + x * s * sigmoid(-inner(x)) * 2 * sqrt_2_over_pi<T> * (1 + 3 * cubic<T> * x * x);
    }
};
struct Silu {
    template <class T>
    static T value(T x) { return x * sigmoid(x); }
    template <class T>
    static T slope(T x) {
        T s = sigmoid(x);
        return s * (1 + x * sigmoid(-x));
    }
};
struct Tanh {
    template <class T>
    static T value(T x) { return tanh_(x); }
    template <class T>
    static T slope(T x) {
        T t = tanh_(x);
        return 1 - t * t;
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
