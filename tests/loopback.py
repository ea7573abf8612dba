"""An accelerator whose arrays are opaque: a model line that touches an array fails on it.

Composites run their bodies on `Opaque` arrays, which have a shape and a dtype and nothing else; primitives unwrap them, run the
reference, and wrap its result. A model that runs on it uses nothing but ops; and since the arithmetic is the reference's, its
outputs are the same bits.
"""

from typing import Any

import numpy as np

from refmodels.accelerator import Accelerator


class Opaque:
    """An array that nobody but the loopback can look into."""

    __slots__ = ("__array",)
    __array_ufunc__ = None
    __hash__ = None

    def __init__(self, array):
        self.__array = array

    @property
    def shape(self):
        return self.__array.shape

    @property
    def dtype(self):
        return self.__array.dtype

    def _refuse(self, *_, **__):
        raise TypeError("an opaque array: only ops may look inside")

    # What Python gives to every object; without a word of its own an object would be true, equal to itself and printable, and
    # NumPy would make an object array of it.
    __bool__ = __eq__ = __ne__ = __array__ = __repr__ = __str__ = __reduce_ex__ = __getstate__ = _refuse


def contents(opaque):
    return opaque._Opaque__array


def mapped(value: Any, leaf, kind):
    """`value` with leaf(x) in place of every x of this kind, in dictionaries, lists and tuples."""
    if isinstance(value, kind):
        return leaf(value)
    if isinstance(value, dict):
        return {key: mapped(child, leaf, kind) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(child, leaf, kind) for child in value)
    return value


def wrapped(value):
    return mapped(value, Opaque, np.ndarray | np.generic)


def unwrapped(value):
    return mapped(value, contents, Opaque)


class Loopback(Accelerator):
    """The reference behind opaque arrays. `calls` counts the primitives that ran."""

    def __init__(self):
        super().__init__("loopback", strict=True)
        self.calls = 0

    def load(self, params):
        return wrapped(params)

    def asarray(self, x):
        return Opaque(x)

    def asnumpy(self, x):
        return unwrapped(x)

    def run(self, op, args, kwargs):
        if op.composite:
            # What comes from the host is wrapped at the border, so that no body ever holds a NumPy array.
            args, kwargs = wrapped(args), wrapped(kwargs)
            op.check(*args, **kwargs)
            return op.reference(*args, **kwargs)
        self.calls += 1
        args, kwargs = unwrapped(args), unwrapped(kwargs)
        op.check(*args, **kwargs)
        return wrapped(op.reference(*args, **kwargs))
