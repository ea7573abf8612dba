"""One example: its inputs on the host, and a script that puts them through ops on any accelerator."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refmodels.accelerator import Accelerator
from refmodels.op import Array, Op, executing

Inputs = dict[str, Any]
Script = Callable[[Inputs, "Environment"], Any]


class Environment:
    """Where a script runs: how arrays and trees of parameters go in, and results come back. None is the reference."""

    def __init__(self, accelerator: Accelerator | None, body_of: Op[..., Any] | None = None) -> None:
        """`body_of` is a composite whose body is to run in place of its kernel."""
        self.accelerator, self.body_of = accelerator, body_of
        self.given: Any = None  # the results as the accelerator gave them
        self.kernel_calls = 0
        self.refused: list[str] = []

    def array(self, value: Any) -> Any:
        """The value with its arrays as this accelerator's kind, in trees too. Anything else stays as it is."""
        if self.accelerator is None:
            return value
        return mapped(value, lambda x: self.accelerator.asarray(x) if isinstance(x, np.ndarray) else x)  # type: ignore[union-attr]

    def load(self, tree: Any) -> Any:
        """Parameters as a model would have them."""
        return tree if self.accelerator is None else self.accelerator.load(tree)

    def host(self, value: Any) -> Any:
        """The value with its arrays as NumPy's."""
        if self.accelerator is None:
            return mapped(value, own)
        asnumpy = self.accelerator.asnumpy
        return mapped(value, lambda x: own(asnumpy(x)) if hasattr(x, "shape") else x)

    def call(self, op: Op[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The op under test, counted where one of its own kernels takes the call."""
        if self.accelerator is not None:
            if self.accelerator.pick(op, args, kwargs) is not None:
                self.kernel_calls += 1
            else:
                self.refused += self.accelerator.reasons(op, args, kwargs)
        return op.reference(*args, **kwargs) if op is self.body_of else op(*args, **kwargs)


def own(x: Any) -> Any:
    """A copy: what a kernel gives may be a view of memory that is written to later."""
    return np.array(x) if isinstance(x, np.ndarray | np.generic) else x


def mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """`value` with leaf(x) for every x that is no dictionary, list or tuple."""
    if isinstance(value, dict):
        return {key: mapped(child, leaf) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(child, leaf) for child in value)
    return leaf(value)


@dataclass
class Case:
    """One example of an op, or of a law of models.

    op          what is under test
    inputs      everything that the script reads: NumPy arrays, trees of parameters, configs, numbers
    script      calls the op, for a cache several times; gives all results
    other_way   of a law: another script whose results must be the same, and which is taken for the truth
    reordered   whether the other way adds up in another order: then an invariant accelerator's bits may differ as well
    features    what this example shows: `empty`, `fully masked` ...
    code        replays it
    seed        chooses its neighbour and the row that is tried alone
    thorough    the laws that cost more are tried
    threaded    it is run in two threads at once
    """

    op: Op[..., Any]
    inputs: Inputs
    script: Script
    dtype: str
    other_way: Script | None = None
    reordered: bool = False
    features: set[str] = field(default_factory=set)
    code: str = "0"
    seed: int = 0
    thorough: bool = False
    threaded: bool = False

    def run(self, accelerator: Accelerator | None) -> tuple[Any, Environment]:
        """The results on the host, and what happened."""
        environment = Environment(accelerator)
        with executing(accelerator), np.errstate(all="ignore"):
            environment.given = self.script(self.inputs, environment)
            return environment.host(environment.given), environment

    def reference(self, inputs: Inputs) -> Any:
        """The reference's results on these inputs."""
        script = self.other_way or self.script
        environment = Environment(None)
        with executing(None), np.errstate(all="ignore"):
            return environment.host(script(inputs, environment))


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees of results are the same, bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same_bits, a, b))
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()
    return bool(a == b)


def fingerprints(inputs: Inputs) -> dict[str, bytes]:
    """The bytes of every array of the inputs, by its path."""
    found: dict[str, bytes] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, np.ndarray):
            found[path] = value.tobytes()
        elif isinstance(value, dict | list | tuple):
            for key, child in value.items() if isinstance(value, dict) else enumerate(value):
                walk(child, f"{path}.{key}" if path else str(key))

    walk(inputs, "")
    return found


def described(inputs: Inputs, most: int = 12) -> list[str]:
    """The inputs in a few lines: shapes, and the values of small arrays."""
    lines: list[str] = []

    def walk(value: Any, path: str) -> None:
        if isinstance(value, np.ndarray):
            lines.append(f"{path} = {array_text(value)}")
        elif isinstance(value, dict | list):
            for key, child in value.items() if isinstance(value, dict) else enumerate(value):
                walk(child, f"{path}.{key}" if path else str(key))
        elif value is not None:
            lines.append(f"{path} = {value!r}")

    walk({key: value for key, value in inputs.items() if key != "params"}, "")
    return [*lines[:most], f"... and {len(lines) - most} more"] if len(lines) > most + 1 else lines


def array_text(value: Array) -> str:
    """`float32 (2, 3) [[...]]`."""
    head = f"{value.dtype} {value.shape}"
    if value.size > 24:
        return head
    with np.printoptions(precision=9, floatmode="maxprec"):
        return f"{head} {np.array2string(np.asarray(value), separator=', ', max_line_width=10_000, formatter=None)}".replace(
            "\n", ""
        )
