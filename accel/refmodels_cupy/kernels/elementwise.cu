// Element by element: a scaled sum or product with another array, then an activation, rounded once. CuPy's own functions take
// float32 numbers below the smallest normal one for 0, these do not.
//
//     x[count]   one value a thread, one after the other
#include "device.cuh"

constexpr int THREADS = 256;

enum Combination { ALONE, ADD, MULTIPLY, PENALISE };

// y = activation(factor * x), or of x + other, or of x * other, or of what makes a score less likely: x / other from 0 on
template <class X, class O>
__global__ void __launch_bounds__(THREADS)
    elementwise(const X* x, const O* other, X* y, int64_t count, int combination, float factor, int activation) {
    int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= count) return;
    float value = widen(x[i]);
    if (combination == ADD)
        value += widen(other[i]);
    else if (combination == MULTIPLY)
        value *= widen(other[i]);
    else if (combination == PENALISE)
        value = value < 0.0f ? value * widen(other[i]) : value / widen(other[i]);
    else
        value *= factor;
    y[i] = narrow<X>(activated(activation, value));
}

// y = x, of the type that x_type says: each exactly
__global__ void __launch_bounds__(THREADS) to_float64(const void* x, int x_type, double* y, int64_t count) {
    int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (i < count) y[i] = stored(x, x_type, i);
}
