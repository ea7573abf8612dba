"""An op is a plain function with a contract.

`@op` turns a function into an `Op`. Calling it runs the function (the reference), or the kernel of the accelerator in force.
A *primitive* op contains NumPy and lives in `refmodels/ops`; a *composite* op contains only calls to other ops, so whatever
an accelerator or an observer does to the primitives reaches every layer and every model built from them.

The contract is the signature. `Float[Array, "*b n"]` says that an argument is a floating-point array whose last axis has size
n, with any leading axes; a letter that occurs twice must have one size. From it come the shape check, the page
`spec/ops.md` and the sizes that an error model needs. The letters are the same everywhere: `b` batch, `t` queries, `s` keys,
`h` heads, `d` head size, `n` hidden, `m` intermediate, `v` vocabulary, `r` buckets, `*b` any leading axes, `#b` either 1 or b
(and `*#b` likewise, axis by axis).
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeAlias, TypeVar

import numpy as np

from refmodels.numerics import ErrorModel, calibrated

__all__ = [
    "OPS",
    "Array",
    "Bool",
    "Float",
    "Int",
    "Op",
    "Params",
    "Shape",
    "ShapeError",
    "executing",
    "executor_in_force",
    "op",
    "watching",
]

P = ParamSpec("P")
R = TypeVar("R")

Array: TypeAlias = np.ndarray[Any, Any]
Params: TypeAlias = dict[str, Any]
"""A tree of parameters: dictionaries and lists whose leaves are arrays."""

Observer: TypeAlias = Callable[["Op[..., Any]", tuple[Any, ...], dict[str, Any], Callable[[], Any]], Any]


@dataclass(frozen=True)
class Shape:
    """The run-time side of an annotation: `kind` is float, int, bool or array; `dims` the letters, leading axes first."""

    kind: str
    dims: tuple[str, ...]
    optional: bool = False

    def __or__(self, other: None) -> "Shape":
        return replace(self, optional=True)

    def __str__(self) -> str:
        return f"[{' '.join(self.dims)}]"

    def __repr__(self) -> str:
        return f"{self.kind}{self}{' | None' if self.optional else ''}"


if TYPE_CHECKING:  # what a type checker sees: Float[Array, "*b n"] is an Array
    from typing import Annotated as Bool
    from typing import Annotated as Float
    from typing import Annotated as Int
else:

    class _Annotation:
        def __init__(self, kind: str) -> None:
            self.kind = kind

        def __getitem__(self, item: tuple[Any, str]) -> Shape:
            return Shape(self.kind, tuple(item[1].split()))

    Float, Int, Bool = _Annotation("float"), _Annotation("int"), _Annotation("bool")


class ShapeError(ValueError):
    """An argument whose rank, a dimension or the kind of number is not what the op's signature says."""


class Executor(Protocol):
    """What `Op` asks of an accelerator."""

    def run(self, op: "Op[..., Any]", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


_executor: ContextVar[Executor | None] = ContextVar("executor", default=None)
_observers: ContextVar[tuple[Observer, ...]] = ContextVar("observers", default=())

OPS: dict[str, "Op[..., Any]"] = {}
"""The op table: every op by its name, in order of definition."""


class Op(Generic[P, R]):
    """A function with its contract: what `@op` returns.

    Attributes: `name`; `reference`, the plain function; `signature`; `shapes` of the annotated array arguments; `result`, the
    annotation of the result; `composite`; `error`, the error model that judges a kernel; `laws` it keeps; `mutates`, the
    arguments that it writes to; `source`, where the equation comes from.
    """

    def __init__(
        self,
        reference: Callable[P, R],
        *,
        error: ErrorModel,
        composite: bool,
        laws: tuple[str, ...],
        mutates: tuple[str, ...],
        source: str,
    ) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.error = error
        self.composite = composite
        self.laws = laws
        self.mutates = mutates
        self.source = source
        self.__doc__ = reference.__doc__
        self.__name__ = self.__qualname__ = reference.__name__
        self.__module__ = reference.__module__
        self.signature = self.__signature__ = inspect.signature(reference)
        self.shapes = {
            name: parameter.annotation
            for name, parameter in self.signature.parameters.items()
            if isinstance(parameter.annotation, Shape)
        }
        self.result = self.signature.return_annotation
        self.check: Callable[..., None] = self._first_check

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        observers = _observers.get()
        result: R = self._observed(observers, args, kwargs) if observers else self._run(args, kwargs)
        return result

    def _first_check(self, *args: Any, **kwargs: Any) -> None:
        self.check = _shape_check(self)  # compiled when first needed: importing the package compiles none
        self.check(*args, **kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        executor = _executor.get()
        if executor is not None:
            return executor.run(self, args, kwargs)
        self.check(*args, **kwargs)
        return self.reference(*args, **kwargs)

    def _observed(self, observers: tuple[Observer, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not observers:
            return self._run(args, kwargs)
        return observers[0](self, args, kwargs, lambda: self._observed(observers[1:], args, kwargs))

    def __repr__(self) -> str:
        return f"<op {self.name}{self.signature}>"


def op(
    *,
    error: ErrorModel | None = None,
    composite: bool = False,
    laws: tuple[str, ...] = (),
    mutates: tuple[str, ...] = (),
    source: str = "",
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Make a function an op and enter it in the op table.

    `error` is how far a kernel may be from the reference (default: `calibrated()`); `laws` and `mutates` name properties and
    written arguments; `source` says where the equation comes from.
    """

    def decorate(reference: Callable[P, R]) -> Op[P, R]:
        if reference.__name__ in OPS:
            raise ValueError(f"op {reference.__name__!r} is defined twice")
        entry = Op(reference, error=error or calibrated(), composite=composite, laws=laws, mutates=mutates, source=source)
        OPS[entry.name] = entry
        return entry

    return decorate


def executor_in_force() -> Executor | None:
    """What `executing` has set; None is the reference."""
    return _executor.get()


@contextmanager
def executing(executor: Executor | None) -> Iterator[None]:
    """Run every op inside the block through `executor`; None is the reference."""
    token = _executor.set(executor)
    try:
        yield
    finally:
        _executor.reset(token)


@contextmanager
def watching(observer: Observer) -> Iterator[None]:
    """Call `observer(op, args, kwargs, proceed)` in place of every op call inside the block.

    `proceed()` runs the op and gives its result; what the observer returns is the result of the call, so it may record, change
    or replace it. Composites are seen as well as the primitives inside them. The observer added last is the innermost.
    """
    token = _observers.set((*_observers.get(), observer))
    try:
        yield
    finally:
        _observers.reset(token)


def _shape_check(entry: Op[..., Any]) -> Callable[..., None]:
    """Compile the annotations into one function with the op's own parameters: a check costs well under a microsecond."""
    lines: list[str] = []
    sizes: dict[str, str] = {}  # letter -> the argument that set it
    for name, shape in entry.shapes.items():
        lines += _check_lines(entry.name, name, shape, sizes)
    parameters = ", ".join(_parameter_source(p) for p in _with_marker(entry.signature))
    source = f"def check({parameters}):\n" + "".join(f"    {line}\n" for line in lines or ["pass"])
    namespace: dict[str, Any] = {"fail": _fail, "broadcasts": _broadcasts}
    exec(compile(source, f"<shape check of {entry.name}>", "exec"), namespace)
    check: Callable[..., None] = namespace["check"]
    return check


def _check_lines(op_name: str, name: str, shape: Shape, sizes: dict[str, str]) -> list[str]:
    dims = shape.dims
    variadic = bool(dims) and dims[0].startswith("*")
    rank = len(dims) - variadic
    label = f"{op_name}: {name}{shape}"
    lines = [
        f"s = {name}.shape",
        f"if len(s) {'<' if variadic else '!='} {rank}: "
        f"fail({label!r}, f'has {{len(s)}} axes {{s}}, wanted {rank}{' or more' if variadic else ''}')",
    ]
    if shape.kind == "float":
        lines.append(f"if {name}.dtype.kind in 'iub': fail({label!r}, f'wants floating-point numbers, got {{{name}.dtype}}')")
    if shape.kind == "int":
        lines.append(f"if {name}.dtype.kind not in 'iu': fail({label!r}, f'wants integers, got {{{name}.dtype}}')")
    if shape.kind == "bool":
        lines.append(f"if {name}.dtype.kind != 'b': fail({label!r}, f'wants booleans, got {{{name}.dtype}}')")
    for axis, dim in enumerate(dims):
        letter = dim.lstrip("*#")
        value = f"s[:len(s) - {rank}]" if dim.startswith("*") else f"s[{axis - len(dims)}]"
        variable = f"size_{'all_' if dim.startswith('*') else ''}{letter}"
        if letter.isdigit():
            lines.append(f"if {value} != {letter}: fail({label!r}, f'axis {axis} is {{{value}}}, wanted {letter}')")
        elif variable not in sizes and not shape.optional and not dim.startswith("#"):
            sizes[variable] = f"{name}{shape}"
            lines.append(f"{variable} = {value}")
        elif variable in sizes:
            differs = f"{value} != {variable}"
            if dim.startswith("#"):
                differs = f"{value} != 1 and {differs}"
            elif dim.startswith("*#"):
                differs = f"{differs} and not broadcasts({value}, {variable})"
            lines.append(
                f"if {differs}: fail({label!r}, f'{letter} = {{{value}}}, but {sizes[variable]} has {letter} = {{{variable}}}')"
            )
    if shape.optional:
        return [f"if {name} is not None:", *(f"    {line}" for line in lines)]
    return lines


def _fail(label: str, what: str) -> None:
    raise ShapeError(f"{label}: {what}")


def _broadcasts(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    return len(small) == len(large) and all(a in (1, b) for a, b in zip(small, large, strict=True))


def _with_marker(signature: inspect.Signature) -> Iterator[inspect.Parameter | str]:
    seen_keyword_only = False
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not seen_keyword_only:
            seen_keyword_only = True
            yield "*"
        yield parameter


def _parameter_source(parameter: inspect.Parameter | str) -> str:
    if isinstance(parameter, str):
        return parameter
    # The check only needs to know that an argument was left out; the reference holds the real default.
    return parameter.name if parameter.default is inspect.Parameter.empty else f"{parameter.name}=None"
