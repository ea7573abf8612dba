"""Arrays as CuPy's are, where that differs from NumPy: they keep to themselves, know less of bfloat16, and flush.

Mixed with an array of the host, NumPy's would do, and the GPU's raise. CuPy compiles its functions with `-ftz=true`: float32
numbers below the smallest normal one are 0 in arithmetic, in comparisons, and in conversions to and from float64. What only
moves numbers leaves them alone, and so do cuBLAS, sorting, and conversions between float32 and half precision.
"""

import numpy as np
from emulated import Emulated

from refmodels.ops.precision import numpy_dtype

BFLOAT16 = numpy_dtype("bfloat16")
NOT_OF_BFLOAT16 = {
    "where", "clip", "round", "divmod", "tril", "var", "cumsum", "einsum", "all", "any", "argmax", "argmin", "sort", "argsort"
}  # fmt: skip
"""What CuPy has not, or gives as float32."""


class MixedError(TypeError):
    """An array of the host among those of the device."""


def flushed(value):
    """Without numbers below the smallest normal one of float32, which bfloat16 has in common with it."""
    if not isinstance(value, np.ndarray | np.generic) or value.dtype not in (np.float32, BFLOAT16):
        return value
    zero = np.copysign(value.dtype.type(0), value)
    return np.where(abs(value) < np.finfo(np.float32).tiny, zero, value).astype(value.dtype)


def refused(name, *values):
    halves = [value for value in values if getattr(value, "dtype", None) == BFLOAT16]
    if halves and (name in NOT_OF_BFLOAT16 or (name == "matmul" and max(value.ndim for value in halves) > 2)):
        raise TypeError(f"{name} of bfloat16")
    if halves and any(isinstance(value, float) for value in values):
        raise TypeError(f"{name} of bfloat16 and Python's float, which CuPy gives as float32")


def is_host(value):
    return isinstance(value, np.ndarray) and not isinstance(value, Apart)


def plain(value):
    return value.view(np.ndarray) if isinstance(value, Apart) else value


def apart(value):
    if isinstance(value, tuple | list):
        return type(value)(map(apart, value))
    return np.asarray(value).view(Apart) if isinstance(value, np.ndarray | np.generic) else value


def checked(what, *values):
    if any(map(is_host, values)):
        raise MixedError(f"{what} of an array of the host and one of the device")


class Apart(np.ndarray):
    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **how):
        checked(ufunc.__name__, *inputs, *out)
        refused(ufunc.__name__, *inputs)
        inputs = tuple(map(plain, inputs))
        if ufunc is np.matmul:  # cuBLAS'
            return apart(ufunc(*inputs, **how))
        result = getattr(ufunc, method)(*map(flushed, inputs), **how)
        result = tuple(map(flushed, result)) if isinstance(result, tuple) else flushed(result)
        if out:
            plain(out[0])[...] = result
            return out[0]
        return apart(result)

    def astype(self, dtype, copy=True):
        if not copy and self.dtype == dtype:
            return self
        array = plain(self)
        return apart(flushed(flushed(array).astype(dtype)) if np.float64 in (array.dtype, dtype) else array.astype(dtype))

    def argmax(self, axis=None):
        refused("argmax", self)
        return apart(np.argmax(flushed(plain(self)), axis))

    def __setitem__(self, key, value):
        keys = key if isinstance(key, tuple) else (key,)
        checked("assignment", *keys, *([value] if np.ndim(value) else []))
        self.view(np.ndarray)[tuple(map(plain, keys))] = plain(value)

    def __getitem__(self, key):
        return apart(super().__getitem__(key))  # by positions of the host too: NumPy's own functions do so


class Functions:
    """NumPy's functions, for arrays of the device."""

    def __getattr__(self, name):
        function = getattr(np, name)
        if isinstance(function, type) or not callable(function):
            return function

        def called(*args, **kwargs):
            if name != "asarray":
                checked(name, *args, *kwargs.values())
            refused(name, *args)
            return apart(function(*args, **kwargs))

        return called


class EmulatedApart(Emulated):
    """The emulated device with such arrays."""

    xp = Functions()

    def to_device(self, array):
        return apart(np.array(array, order="C"))

    def to_host(self, array):
        return np.array(plain(array))

    def empty(self, shape, dtype):
        return apart(super().empty(shape, dtype))

    def launch(self, launch):
        checked("launch", *(getattr(argument, "array", argument) for argument in launch.arguments))
        super().launch(launch)

    def product(self, a, b, *, out=None, **how):
        checked("product", a, b, out)
        return apart(Emulated.product(Emulated(self.cache), plain(a), plain(b), out=plain(out), **how))
