// Element by element: a scaled sum or product with another array, then an activation, rounded once.
//
//     x[count]   one value a thread, one after the other
#include "device.cuh"

constexpr int THREADS = 256;

enum Combination { ALONE, ADD, MULTIPLY };

// y = activation(factor * x), or of x + other, or of x * other
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
    else
        value *= factor;
    y[i] = narrow<X>(activated(activation, value));
}
