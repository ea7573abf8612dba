"""The accelerator: its threads, its packed weights, its compiled code."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from refmodels.accelerator import Accelerator, AcceleratorError
from refmodels.op import Array, Op, Params, executor_in_force
from refmodels_numba import native, packing
from refmodels_numba.layout import LANES, QUERIES
from refmodels_numba.packing import Packed
from refmodels_numba.team import Team, default_threads

CLAIMED = ("float32", "float16", "bfloat16")


class Numba(Accelerator):
    """Kernels compiled by Numba. `threads` is how many run one call, by default as many as there are processors here."""

    def __init__(self) -> None:
        super().__init__("numba", dtypes=CLAIMED, tiles=(QUERIES, LANES, 4 * LANES), invariant=True)
        self._team: Team | None = None

    @property
    def team(self) -> Team:
        """The threads; they start with the first call that has work for more than one."""
        if self._team is None:
            self._team = Team(default_threads())
        return self._team

    @property
    def threads(self) -> int:
        """How many threads run one call."""
        return self.team.threads

    def configured(self, **settings: Any) -> "Numba":
        """Another accelerator with the same kernels and `threads=N`."""
        threads = settings.pop("threads", None)
        super().configured(**settings)
        if threads is None:
            return self
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise AcceleratorError(f"accelerator 'numba': threads must be an integer from 1 on, got {threads!r}")
        other = copy.copy(self)
        other._team = Team(threads)
        return other

    def load(self, params: Params) -> Params:
        return loaded(params, owned=False)

    def take(self, params: Params) -> Params:
        return loaded(params, owned=True)

    def unload(self, tree: Params) -> Params:
        return packing.unpacked_tree(tree)

    def asnumpy(self, x: Any) -> Array:
        return x.unpacked() if isinstance(x, Packed) else np.asarray(x)

    def compile(self, report: Callable[[str], None]) -> str:
        return native.compile_ahead(report)

    def missing(self) -> str | None:
        for package in ("llvmlite", "numba"):
            if not _installed(package):
                return f"{package} is not installed: pip install 'refmodels[numba]'"
        return None


def _installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


numba = Numba()


def team() -> Team:
    """The threads of the accelerator in force."""
    accelerator = executor_in_force()
    return accelerator.team if isinstance(accelerator, Numba) else numba.team


def kernel(op: Op[..., Any], *, when: Any = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a kernel that is called when the arguments have been checked: behind it are bare addresses."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            op.check(*args, **kwargs)
            return function(*args, **kwargs)

        numba.kernel(op, when=when)(checked)
        return function

    return register


# -- weights --------------------------------------------------------------------------------------------------------------


def loaded(tree: Any, *, owned: bool, name: str = "") -> Any:
    """The tree with packed matrices. If it is `owned`, leaves leave it as they are packed, so that none is there twice."""
    if isinstance(tree, list):
        return [loaded(part, owned=owned) for part in tree]
    if not isinstance(tree, dict):
        return tree
    result = dict.fromkeys(tree)
    if any(isinstance(part, dict | list) for part in tree.values()):
        result["_programs"] = {}  # where fused kernels keep theirs
        for key in list(tree):
            result[key] = loaded(tree[key], owned=owned, name=key)
            if owned:
                del tree[key]
        return result
    rest = dict(tree)
    for key in list(tree):
        leaf = tree[key]
        if owned:
            del tree[key]
            del rest[key]
        result[key] = _packed_leaf(key, leaf, {**result, **rest}, name, owned=owned)
        del leaf
    return result


def _packed_leaf(key: str, leaf: Any, others: Params, name: str, *, owned: bool) -> Any:
    """A leaf as kernels want it; `others` are all leaves of its layer, by name."""
    table = name == "token_embedding"
    if key not in ("kernel", "lora_kernel_a", "lora_kernel_b") and not (table and key in ("embeddings", "reverse_embeddings")):
        return leaf
    if leaf.dtype == np.float64 or (leaf.dtype.kind == "f" and leaf.ndim < 2):
        return leaf
    by_rows = key == "embeddings"
    if leaf.dtype != np.int8:
        return packing.packed(leaf, by_rows=by_rows, owned=owned)
    if f"{key}_zero" in others:
        scale, zero, g_idx = others[f"{key}_scale"], others[f"{key}_zero"], others["g_idx"]
        # Kernels and tables have two numbers of a row in a byte, the untied head's table two of a column.
        axis = -1 if by_rows or leaf.shape == (len(g_idx), -(-scale.shape[1] // 2)) else 0
        return packing.packed_int4(leaf, scale, zero, g_idx, by_rows=by_rows, axis=axis)
    return packing.packed_int8(leaf, by_rows=by_rows, integer=f"{key}_scale" in others)
