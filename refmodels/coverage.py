"""What an accelerator runs, op by op, as far as that can be known without a call: which ops have kernels, which reach some.

An op has a kernel of its own; or it is a composite and its body reaches ops that have some; or the reference runs it.
"""

import dis
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

from refmodels.accelerator import Accelerator, Registered
from refmodels.op import Op
from refmodels.opdoc import table

OWN, COMPOSITE, REFERENCE = "own kernel", "composite of kernels", "reference"


@dataclass(frozen=True)
class Coverage:
    """What runs one op: `runs` is `own kernel`, `composite of kernels` or `reference`, and `why` says it in words.

    `kernels` are the ops inside with kernels of their own, as near to this op as there are any; `reference` those that have
    none, at any depth.
    """

    op: Op[..., Any]
    runs: str
    why: str
    kernels: tuple[str, ...] = ()
    reference: tuple[str, ...] = ()


def coverage(accelerator: Accelerator) -> list[Coverage]:
    """For every op, in the order of `spec/ops.md`, what runs it on this accelerator."""
    return [_of(op, accelerator) for op in table()]


def inner_ops(op: Op[..., Any]) -> list[Op[..., Any]]:
    """The ops that the body of a composite names, also as values of a table such as T5's activations. A primitive has none."""
    if not op.composite:
        return []
    found: dict[Op[..., Any], None] = {}
    for name in _globals_read(op.reference.__code__):
        value = op.reference.__globals__.get(name)
        values = value.values() if isinstance(value, dict) else [value]
        found |= dict.fromkeys(entry for entry in values if isinstance(entry, Op))
    return list(found)


def _globals_read(code: CodeType) -> Iterator[str]:
    yield from (step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a comprehension has code of its own
            yield from _globals_read(constant)


def _of(op: Op[..., Any], accelerator: Accelerator) -> Coverage:
    entries = accelerator.kernels(op)
    said = [_said(entry) for entry in entries]
    if any(_may_run(entry) for entry in entries):
        return Coverage(op, OWN, "; ".join(said))
    if not op.composite:
        return Coverage(op, REFERENCE, "; ".join(said) or "no kernel")
    reached = {inner.name: has for inner, has in _reached(op, accelerator)}
    kernels, reference = (tuple(name for name, has in reached.items() if has is wanted) for wanted in (True, False))
    if kernels:
        why = f"{len(kernels)} of {len(reached)} ops inside: {', '.join(kernels)}"
        return Coverage(op, COMPOSITE, "; ".join([*said, why]), kernels, reference)
    return Coverage(
        op, REFERENCE, "; ".join([*said, f"no kernel, nor for any of the {len(reached)} ops inside"]), (), reference
    )


def _reached(op: Op[..., Any], accelerator: Accelerator) -> Iterator[tuple[Op[..., Any], bool]]:
    """The ops at which a call of this composite ends, and whether that is at a kernel."""
    for inner in inner_ops(op):
        has = any(_may_run(entry) for entry in accelerator.kernels(inner))
        if has or not inner.composite:
            yield inner, has
        else:
            yield from _reached(inner, accelerator)


def _may_run(entry: Registered) -> bool:
    return not isinstance(entry.when, str)


def _said(entry: Registered) -> str:
    if entry.when is None:
        return entry.name
    if isinstance(entry.when, str):
        return f"{entry.name} declines: {entry.when}"
    about = (getattr(entry.when, "__doc__", None) or "").strip().partition("\n")[0].rstrip(".")
    return f"{entry.name} may decline at run time" + (f": {about}" if about else "")
