"""Kernels planted to test the conformance suite: wrong ones that it must reject, right ones that it must not.

Each is written as somebody's own kernel, with NumPy in place of a compiler, and has one fault that accelerators have had.
`test_conformance.py` runs them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmodels.ops.precision import numpy_dtype


@dataclass(frozen=True)
class Planted:
    """A kernel of `op`; `make()` gives a fresh one, with no state yet."""

    name: str
    op: Any
    what: str
    make: Callable[[], Callable[..., Any]]
    dtype: str = "float32"
    tiles: tuple[int, ...] = ()
    when: Any = None
    invariant: bool = False


WRONG: list[Planted] = []
RIGHT: list[Planted] = []


def _enter(entries, op, what, options, state):
    def decorate(function):
        entries.append(Planted(f"{op.name}: {what}", op, what, function if state else lambda: function, **options))
        return function

    return decorate


def wrong(op, what, *, state=False, **options):
    """Enter the decorated kernel as wrong; with `state` it is a function that makes the kernel."""
    return _enter(WRONG, op, what, options, state)


def right(op, what, *, state=False, **options):
    """Enter the decorated kernel as right."""
    return _enter(RIGHT, op, what, options, state)


def f32(x):
    """What kernels compute in."""
    return x if x.dtype == np.float64 else x.astype(np.float32)


def cast(y, dtype):
    with np.errstate(over="ignore"):
        return np.asarray(y).astype(numpy_dtype(dtype) if isinstance(dtype, str) else dtype)


def rows_of(x):
    """The rows as a matrix, and how to put the axes back."""
    lead = x.shape[:-1]
    return f32(x).reshape(int(np.prod(lead)), x.shape[-1]), lambda y: y.reshape(*lead, y.shape[-1])


from planted import attention, caches, elementwise, layers, linear, norms, positions, quantised, sampling, steps  # noqa: E402, F401
