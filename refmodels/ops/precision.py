"""Which type an op computes in, and which it rounds to (`spec/numerics.md`, section 1).

Every primitive widens its inputs to float32 (float64 stays float64), computes there, and rounds its result once, to the type of
its activations. A policy name such as `mixed_bfloat16` says how parameters are stored and what activations are rounded to.
"""

from typing import Any

import numpy as np

from refmodels.op import Array

POLICIES = {
    "float32": ("float32", "float32"),
    "float16": ("float16", "float16"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "float64": ("float64", "float64"),
    "mixed_float16": ("float32", "float16"),
    "mixed_bfloat16": ("float32", "bfloat16"),
}
"""dtype policy -> (type of the parameters, type of the activations)."""

FLOATS = ("float16", "bfloat16", "float32", "float64")
"""The types that parameters may have, if they are not quantised."""


def variable_dtype(policy: str) -> str:
    """The type that parameters are stored in under this policy."""
    return POLICIES[policy][0]


def compute_dtype(policy: str) -> str:
    """The type that activations are rounded to under this policy."""
    return POLICIES[policy][1]


def wide_dtype(policy: str) -> str:
    """The type that scores and biases have under this policy."""
    return "float64" if compute_dtype(policy) == "float64" else "float32"


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy type of this name. bfloat16 needs the ml_dtypes package."""
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise ImportError("dtype 'bfloat16' needs ml_dtypes: pip install ml_dtypes") from None
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def wide(x: Array) -> Array:
    """`x` in the type that ops compute in: float64 stays, everything narrower becomes float32."""
    return x if x.dtype == np.float64 else x.astype(np.float32, copy=False)


def narrow(y: Array, dtype: np.dtype[Any]) -> Array:
    """`y` rounded once to `dtype`. Overflow gives an infinity, as the type defines it."""
    if y.dtype == dtype:
        return y
    with np.errstate(over="ignore"):
        return y.astype(dtype)
