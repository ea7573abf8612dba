"""Accelerators: faster kernels for ops, found by entry point and swapped in per model or per block.

    numba = find("numba")                       # or AcceleratorError that says why it cannot run here
    with use(numba): layer_norm(x, gamma, beta)

A plug-in makes one `Accelerator`, registers kernels against op objects and names it in the entry-point group
`refmodels.accelerators`. An op without a kernel runs its reference: a composite's readable body, whose inner ops dispatch
again, or a primitive's NumPy, for which foreign arrays cross to the host and back; every crossing is counted.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from refmodels.op import Op, Params, executing

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "refmodels.accelerators"
REFERENCE = "reference"
"""The name of having no accelerator."""

Kernel = Callable[..., Any]
When = Callable[..., "bool | str"]


class AcceleratorError(RuntimeError):
    """An accelerator that is not installed, cannot run on this machine, or breaks its contract."""


class Accelerator:
    """Kernels for some ops, and how arrays of their kind come and go.

    `strict` turns a host crossing into an error. `crossings` counts them by op name.
    """

    def __init__(self, name: str, *, strict: bool = False) -> None:
        self.name = name
        self.strict = strict
        self.crossings: Counter[str] = Counter()
        self._kernels: dict[Op[..., Any], list[tuple[When | None, Kernel]]] = {}

    def kernel(self, op: Op[..., Any], *, when: When | None = None) -> Callable[[Kernel], Kernel]:
        """Register the decorated function for `op`. It must take the op's parameters, by the same names.

        `when(*args, **kwargs)` may decline a call: it returns True to accept, or False or a reason. Kernels are asked in order.
        """

        if not isinstance(op, Op):
            raise TypeError(f"kernel() takes an op such as refmodels.ops.norm.layer_norm, got {op!r}")

        def register(function: Kernel) -> Kernel:
            wanted, got = _parameters(op.signature), _parameters(inspect.signature(function))
            if wanted != got:
                raise AcceleratorError(
                    f"{self.name}: kernel of {op.name} takes ({', '.join(got)}), wanted ({', '.join(wanted)})"
                )
            self._kernels.setdefault(op, []).append((when, function))
            return function

        return register

    def pick(self, op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kernel | None:
        """The first kernel that accepts this call, or None."""
        for when, function in self._kernels.get(op, ()):
            if when is None or when(*args, **kwargs) is True:
                return function
        return None

    def run(self, op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of the call: by a kernel, by the body of a composite, or by the reference on the host."""
        function = self.pick(op, args, kwargs)
        if function is not None:
            return function(*args, **kwargs)
        if not op.composite and any(self.foreign(value) for value in [*args, *kwargs.values()]):
            return self._cross(op, args, kwargs)
        op.check(*args, **kwargs)
        return op.reference(*args, **kwargs)

    def _cross(self, op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.strict or op.mutates:
            why = "strict is set" if self.strict else f"{op.name} writes to {', '.join(op.mutates)}"
            raise AcceleratorError(f"{self.name} has no kernel for {op.name} here, and {why}: not crossing to the host")
        self.crossings[op.name] += 1
        on_host = [self.asnumpy(value) if self.foreign(value) else value for value in args]
        named = {key: self.asnumpy(value) if self.foreign(value) else value for key, value in kwargs.items()}
        op.check(*on_host, **named)
        return self.asarray(op.reference(*on_host, **named))

    def foreign(self, value: Any) -> bool:
        """True for an array that NumPy code cannot take: by default, anything else that has a shape and a dtype."""
        return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, np.ndarray | np.generic)

    def load(self, params: Params) -> Params:
        """The tree as kernels want it: same keys, plus private leaves. By default the tree itself."""
        return params

    def asarray(self, x: np.ndarray[Any, Any]) -> Any:
        """A NumPy array as this accelerator's kind. By default itself."""
        return x

    def asnumpy(self, x: Any) -> np.ndarray[Any, Any]:
        """This accelerator's array as a NumPy array."""
        return np.asarray(x)

    def missing(self) -> str | None:
        """None, or the reason why this accelerator cannot run on this machine."""
        return None

    def __repr__(self) -> str:
        return f"<accelerator {self.name}: kernels for {len(self._kernels)} ops>"


def _parameters(signature: inspect.Signature) -> list[str]:
    """Name, place and optionality of each parameter: `x`, `*epsilon` (by name only), `bias=` (may be left out)."""
    return [
        f"{'*' * (parameter.kind is parameter.KEYWORD_ONLY)}{name}{'=' * (parameter.default is not parameter.empty)}"
        for name, parameter in signature.parameters.items()
    ]


def installed() -> "dict[str, EntryPoint]":
    """The plug-ins that are installed, by name; none of them is imported."""
    from importlib.metadata import entry_points  # slow to import

    return {entry.name: entry for entry in entry_points(group=GROUP)}


def find(accelerator: "str | Accelerator | None") -> Accelerator | None:
    """The accelerator of this name, imported now. None and `reference` give None: the reference itself."""
    if accelerator is None or accelerator == REFERENCE:
        return None
    if isinstance(accelerator, Accelerator):
        return accelerator
    if not isinstance(accelerator, str):
        raise TypeError(f"accelerator must be a name, an Accelerator or None, got {type(accelerator).__name__}")
    plugins = installed()
    if accelerator not in plugins:
        names = ", ".join([REFERENCE, *sorted(plugins)])
        raise AcceleratorError(f"no accelerator {accelerator!r} is installed; here: {names}")
    try:
        found = plugins[accelerator].load()
    except ImportError as error:
        raise AcceleratorError(f"accelerator {accelerator!r} cannot be imported: {error}") from error
    if not isinstance(found, Accelerator):
        raise AcceleratorError(f"entry point {accelerator!r} is a {type(found).__name__}, wanted an Accelerator")
    reason = found.missing()
    if reason is not None:
        raise AcceleratorError(f"accelerator {accelerator!r} cannot run here: {reason}")
    return found


@contextmanager
def use(accelerator: str | Accelerator | None) -> Iterator[Accelerator | None]:
    """Run every op inside the block on this accelerator; None or `reference` is the reference."""
    found = find(accelerator)
    with executing(found):
        yield found
