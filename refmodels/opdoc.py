"""The page `spec/ops.md`, written from the op table: `python -m refmodels.opdoc > spec/ops.md`.

One section for each family of primitive ops (a file of `refmodels/ops`), then one for the composites of each model. Everything
in it comes from the ops themselves, so it cannot say anything that the code does not.
"""

import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import refmodels.ops
from refmodels.op import OPS, Array, Op, Params, Shape

MODELS = ("t5", "opt", "bloom")

HEADER = """\
<!-- Generated from the op table by `python -m refmodels.opdoc > spec/ops.md`. Do not edit: change the op and run it again. -->

# Ops

This page is generated from the op table: `python -m refmodels.opdoc > spec/ops.md`. A test holds the two together.

An op is a function with a contract. A *primitive* contains NumPy; a *composite* contains only calls to other ops. Each entry
gives the signature, what the op computes, the error model that judges another implementation of it (`numerics.md`), the laws
that it keeps, the arguments that it writes to, and where the equation comes from.

`float[*b n]` is a floating-point array whose last axis has size n, with any leading axes. A letter that occurs twice in one
signature stands for one size. `#b` is b or 1, and `*#b` likewise for every leading axis. `Params` is a tree of arrays. The
letters are those of `README.md`.
"""


def modules() -> list[str]:
    """The families in alphabetical order, then the models: the order of the page."""
    families = sorted(module.name for module in pkgutil.iter_modules(refmodels.ops.__path__))
    return [f"refmodels.ops.{family}" for family in families] + [f"refmodels.{model}" for model in MODELS]


def table() -> list[Op[..., Any]]:
    """Every op, in the order of the page; those that other packages define stand behind."""
    places = {module: place for place, module in enumerate(modules())}
    for module in places:
        importlib.import_module(module)
    return sorted(OPS.values(), key=lambda op: places.get(op.__module__, len(places)))


def render() -> str:
    """The whole page."""
    parts = [HEADER]
    for module, entries in groupby(table(), lambda op: op.__module__):
        if module in modules():
            about = importlib.import_module(module).__doc__ or ""
            parts.append(f"## {module.removeprefix('refmodels.')}\n\n{inspect.cleandoc(about).splitlines()[0]}\n")
            parts += [_entry(op) for op in entries]
    return "\n".join(parts)


def _entry(op: Op[..., Any]) -> str:
    # Outside of code, a star would be Markdown's emphasis.
    pieces = inspect.cleandoc(op.__doc__ or "").split("`")
    sentences = "`".join(piece if i % 2 else piece.replace("*", r"\*") for i, piece in enumerate(pieces))
    return "\n".join([f"### {op.name}\n", "```python", signature(op), "```\n", f"{sentences}\n", *_facts(op), ""])


def _facts(op: Op[..., Any]) -> Iterator[str]:
    yield f"- kind: {'composite' if op.composite else 'primitive'}"
    yield f"- error model: {op.error}"
    for label, values in (("laws", op.laws), ("writes to", op.mutates)):
        if values:
            yield f"- {label}: {', '.join(values)}"
    if op.source:
        yield f"- source: {op.source}"


def signature(op: Op[..., Any], width: int | None = 110) -> str:
    """`linear(x: float[*b k], kernel: float[k n]) -> float[*b n]`, over several lines where one of this width is too short."""
    parameters: list[str] = []
    for parameter in op.signature.parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        default = "" if parameter.default is inspect.Parameter.empty else f" = {parameter.default!r}"
        parameters.append(f"{parameter.name}: {_annotation(parameter.annotation)}{default}")
    result = _annotation(op.result)
    line = f"{op.name}({', '.join(parameters)}) -> {result}"
    if width is None or len(line) <= width:
        return line
    return "\n".join([f"{op.name}(", *(f"    {parameter}," for parameter in parameters), f") -> {result}"])


def shapes(op: Op[..., Any]) -> str:
    """`x[*b k] kernel[k n] bias[n]? -> [*b n]`: arrays (`x[...]` is any) and trees (`p{}`) alone; `?` may be left out."""
    parts: list[str] = []
    for name, parameter in op.signature.parameters.items():
        shape, may_miss = parameter.annotation, parameter.default is not inspect.Parameter.empty
        if isinstance(shape, Shape):
            parts.append(f"{name}{shape}{'?' * (may_miss or shape.optional)}")
        elif "Array" in _annotation(shape):
            parts.append(f"{name}[...]{'?' * may_miss}")
        elif "Params" in _annotation(shape):
            parts.append(f"{name}{{}}{'?' * may_miss}")
    result = str(op.result) if isinstance(op.result, Shape) else _annotation(op.result)
    return " ".join([*parts, "->", result])


def _annotation(annotation: Any) -> str:
    if isinstance(annotation, Shape):
        return f"{annotation.kind}{annotation}{' | None' if annotation.optional else ''}"
    for known, name in ((Array, "Array"), (Params, "Params"), (None, "None"), (types.NoneType, "None"), (..., "...")):
        if annotation is known or annotation == known:
            return name
    arguments = typing.get_args(annotation)
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return " | ".join(map(_annotation, arguments))
    name = getattr(annotation, "__name__", str(annotation))
    return f"{name}[{', '.join(map(_annotation, arguments))}]" if arguments else name


if __name__ == "__main__":
    print(render(), end="")
