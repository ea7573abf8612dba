"""Arrays that keep to themselves, as CuPy's do: mixed with an array of the host, NumPy's would do, and the GPU's raise."""

import numpy as np
from emulated import Emulated


class MixedError(TypeError):
    """An array of the host among those of the device."""


def is_host(value):
    return isinstance(value, np.ndarray) and not isinstance(value, Apart) and value.ndim > 0


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
        if out:
            how["out"] = tuple(map(plain, out))
        return apart(getattr(ufunc, method)(*map(plain, inputs), **how))

    def __setitem__(self, key, value):
        keys = key if isinstance(key, tuple) else (key,)
        checked("assignment", value, *keys)
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
            return apart(function(*args, **kwargs))

        return called


class EmulatedApart(Emulated):
    """The emulated device with such arrays."""

    xp = Functions()

    def to_device(self, array):
        return apart(np.array(array))

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
