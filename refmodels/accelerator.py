"""Accelerators: faster kernels for ops, found by entry point and swapped in per model or per block.

    numba = find("numba")                       # or AcceleratorError that says why it cannot run here
    with use(numba): layer_norm(x, gamma, beta)

A plug-in makes one `Accelerator`, registers kernels against op objects and names it in the entry-point group
`refmodels.accelerators`. An op without a kernel runs its reference: a composite's readable body, whose inner ops dispatch
again, or a primitive's NumPy, for which foreign arrays cross to the host and back; every crossing is counted.
"""

import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from refmodels.numerics import UNIT_ROUNDOFF
from refmodels.op import Op, Params, executing

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "refmodels.accelerators"
REFERENCE = "reference"
"""The name of having no accelerator."""

Kernel = Callable[..., Any]
When = Callable[..., "bool | str"]


class Registered(NamedTuple):
    """A kernel and when it runs: always (None), never on this machine (the reason), or when a function of the call says so."""

    function: Kernel
    when: When | str | None

    @property
    def name(self) -> str:
        """The function's name."""
        return str(getattr(self.function, "__name__", type(self.function).__name__))


class CompileError(RuntimeError):
    """Kernels that could not be compiled."""


class AcceleratorError(RuntimeError):
    """An accelerator that is not installed, cannot run on this machine, or breaks its contract."""


class Room(NamedTuple):
    """The memory of a device, whose name this is: bytes that are free, and all bytes."""

    device: str
    free: int
    total: int


class Accelerator:
    """Kernels for some ops, and how arrays of their kind come and go.

    `strict` turns a host crossing into an error. `crossings` counts them by op name. The contract is in `accel/README.md`.
    Three attributes say what is claimed, for `refmodels check` to hold the accelerator to it:

    dtypes      types of activations that its kernels are for; the reference runs the others
    tiles       sizes at which its kernels begin another block: sizes about them are tried
    invariant   a row's result is the same bits whatever its batch, padding, chunks and number of threads, and in every run

    `ahead` is how many tokens generation may have `decode_tokens` choose before it looks at them; 1, the default: none.
    """

    ahead = 1

    def __init__(
        self,
        name: str,
        *,
        strict: bool = False,
        dtypes: tuple[str, ...] = tuple(UNIT_ROUNDOFF),
        tiles: tuple[int, ...] = (),
        invariant: bool = False,
    ) -> None:
        self.name = name
        self.strict = strict
        self.dtypes, self.tiles, self.invariant = dtypes, tiles, invariant
        self.crossings: Counter[str] = Counter()
        self._kernels: dict[Op[..., Any], list[Registered]] = {}
        self._counting = threading.Lock()

    def kernel(self, op: Op[..., Any], *, when: When | bool | str | None = None) -> Callable[[Kernel], Kernel]:
        """Register the decorated function for `op`. It must take the op's parameters, by the same names.

        `when(*args, **kwargs)` may decline a call: it returns True to accept, or False or a reason. What is known beforehand is
        given as it is: `when=has_avx512 or "no AVX-512 here"`. Kernels are asked in order.
        """

        if not isinstance(op, Op):
            raise TypeError(f"kernel() takes an op such as refmodels.ops.norm.layer_norm, got {op!r}")

        def register(function: Kernel) -> Kernel:
            wanted, got = _parameters(op.signature), _parameters(inspect.signature(function))
            if wanted != got:
                raise AcceleratorError(
                    f"{self.name}: kernel of {op.name} takes ({', '.join(got)}), wanted ({', '.join(wanted)})"
                )
            condition: When | str | None
            if isinstance(when, bool | str | None):
                condition = when if isinstance(when, str) else None if when is not False else "not on this machine"
            else:
                condition = when
                problem = _refused_call(op.signature, when)
                if problem:
                    raise AcceleratorError(f"{self.name}: when= of {op.name} must take its ({', '.join(wanted)}): {problem}")
            self._kernels.setdefault(op, []).append(Registered(function, condition))
            return function

        return register

    def kernels(self, op: Op[..., Any]) -> tuple[Registered, ...]:
        """The kernels of this op, in the order in which they are asked."""
        return tuple(self._kernels.get(op, ()))

    def pick(self, op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kernel | None:
        """The first kernel that accepts this call, or None."""
        for function, when in self._kernels.get(op, ()):
            if when is None or (not isinstance(when, str) and self._verdict(op, when, args, kwargs) is True):
                return function
        return None

    def reasons(self, op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """Why each kernel of this op that is asked declines this call: the reason it gives, or its name."""
        found: list[str] = []
        for entry in self.kernels(op):
            when = entry.when
            verdict = when if when is None or isinstance(when, str) else self._verdict(op, when, args, kwargs)
            if verdict is None or verdict is True:
                break
            found.append(verdict or f"{entry.name} declines")
        return found

    def _verdict(self, op: Op[..., Any], when: When, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool | str:
        verdict: Any = when(*args, **kwargs)
        if isinstance(verdict, bool | str):
            return verdict
        if isinstance(verdict, np.bool_):
            return bool(verdict)
        raise AcceleratorError(f"{self.name}: when= of {op.name} gave {verdict!r}, wanted True, False or a reason")

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
            declined = "; ".join(self.reasons(op, args, kwargs))
            here = f"here ({declined})" if declined else "here"
            raise AcceleratorError(f"{self.name} has no kernel for {op.name} {here}, and {why}: not crossing to the host")
        with self._counting:
            self.crossings[op.name] += 1
        on_host = [self.asnumpy(value) if self.foreign(value) else value for value in args]
        named = {key: self.asnumpy(value) if self.foreign(value) else value for key, value in kwargs.items()}
        op.check(*on_host, **named)
        return self._back(op.reference(*on_host, **named))

    def _back(self, result: Any) -> Any:
        """The arrays of a result as this accelerator's kind; some ops give several."""
        if isinstance(result, tuple | list):
            return type(result)(self._back(part) for part in result)
        return self.asarray(np.asarray(result)) if isinstance(result, np.ndarray | np.generic) else result

    def foreign(self, value: Any) -> bool:
        """True for an array that NumPy code cannot take: by default, anything else that has a shape and a dtype."""
        return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, np.ndarray | np.generic)

    def load(self, params: Params) -> Params:
        """A new tree as kernels want it: same keys, plus private ones that begin with `_`. By default the tree itself.

        Called once for each model and tree. `params` stays the model's: nothing in it may be written to.
        """
        return params

    def take(self, params: Params) -> Params | None:
        """As `load`, but the tree is given away, so that there need not be two. None, the default: `load` is to be called.

        Nobody else holds `params`: what is packed is to leave its dictionary before the next leaf is packed, and the memory of
        an array that is writeable and owns its data may be used again. An accelerator that takes a tree can `unload` it.
        """
        return None

    def unload(self, tree: Params) -> Params | None:
        """The host's tree again, bit for bit, of a tree that `take` gave, or of a part: a layer, or a dictionary of leaves.

        The dictionaries and lists of `tree` are this call's own, to be taken apart as it goes. Leaves and private entries may
        be in use: nothing in them may be written to, and the arrays that are given share no memory with them. None, the
        default, is for an accelerator that takes nothing.
        """
        return None

    def decode_tokens(
        self,
        step: Op[..., Any],
        token_ids: Any,
        positions: Any,
        remaining: Any,
        params: Params,
        cache: Params,
        config: Any,
        *,
        count: int,
        uniform: Any = None,
        **settings: Any,
    ) -> Any:
        """The next `count` tokens of every row, (b, count), or None, the default: they are chosen one at a time, on the host.

        step        the composite to run in a row: `opt_decode_step`, `bloom_decode_step` or `t5_decode_step`
        token_ids   (b,) the tokens to begin with, to be taken in at `positions` (b,); those of step i at
                    positions + min(i, remaining): a row that has its `remaining` (b,) tokens stays where it is
        uniform     (count, b), with the settings of `sample_token`, which then chooses; None: `greedy_token` does

        Only an accelerator with `ahead` above 1 is asked, for up to that many tokens. All arrays are its own.
        """
        return None

    @property
    def takes(self) -> bool:
        """Whether parameters can be given away to it: it has a `take` of its own."""
        return type(self).take is not Accelerator.take

    def room(self) -> Room | None:
        """The memory that parameters are loaded to, for a model to be weighed against before any is moved. None, the default,
        is for the host's."""
        return None

    def asarray(self, x: np.ndarray[Any, Any]) -> Any:
        """A NumPy array as this accelerator's kind. By default itself."""
        return x

    def asnumpy(self, x: Any) -> np.ndarray[Any, Any]:
        """This accelerator's array as a NumPy array."""
        return np.asarray(x)

    def configured(self, **settings: Any) -> "Accelerator":
        """This accelerator with other settings, such as `threads=2`. AcceleratorError for a setting that it does not have."""
        for name in settings:
            raise AcceleratorError(f"accelerator {self.name!r} has no setting {name!r}")
        return self

    def compile(self, report: Callable[[str], None]) -> str | None:
        """Make ready whatever would otherwise be compiled when first used. None: there is nothing to compile.

        Gives what was done in a few words: `ready, 9 kernels in 12.3 s, cached in DIRECTORY`. `report` is given lines that say
        how far it is: `compiling 3/9: attention`. What is compiled when first used says so by `refmodels.printing.progress`.
        """
        return None

    def hardware(self) -> dict[str, str] | None:
        """What it runs on, in words by name (`device`, then others), if that is no processor of the host. None if it is."""
        return None

    def limits(self) -> tuple[float, float] | None:
        """What `hardware` can do, measured now: bytes a second that its memory gives, operations a second of its fastest
        product of bfloat16 matrices. None where there is no `hardware`: the host's limits are this accelerator's."""
        return None

    def missing(self) -> str | None:
        """None, or the reason why this accelerator cannot run on this machine."""
        return None

    def intended(self) -> bool:
        """Whether what it needs was installed by somebody, who is to be told why it cannot run: then the command line says so
        where another takes its place. By default nobody is."""
        return False

    def __repr__(self) -> str:
        return f"<accelerator {self.name}: kernels for {len(self._kernels)} ops>"


def _parameters(signature: inspect.Signature) -> list[str]:
    """Name, place and optionality of each parameter: `x`, `*epsilon` (by name only), `bias=` (may be left out)."""
    return [
        f"{'*' * (parameter.kind is parameter.KEYWORD_ONLY)}{name}{'=' * (parameter.default is not parameter.empty)}"
        for name, parameter in signature.parameters.items()
    ]


def _refused_call(signature: inspect.Signature, when: When) -> str | None:
    """What `when` does not take of the calls that this signature allows: all by place or by name, or the least."""
    given = signature.parameters.values()
    by_place = [p.name for p in given if p.kind is not p.KEYWORD_ONLY]
    by_name = {p.name: None for p in given if p.kind is p.KEYWORD_ONLY}
    needed = {p.name: None for p in given if p.default is p.empty}
    taken = inspect.signature(when)
    try:
        taken.bind(*by_place, **by_name)
        taken.bind(**dict.fromkeys(by_place), **by_name)
        taken.bind(**needed)
    except TypeError as error:
        return str(error)
    return None


def installed() -> "dict[str, EntryPoint]":
    """The plug-ins that are installed, by name; none of them is imported."""
    from importlib.metadata import entry_points  # slow to import

    return {entry.name: entry for entry in entry_points(group=GROUP)}


def find(accelerator: "str | Accelerator | None", **settings: Any) -> Accelerator | None:
    """The accelerator of this name, imported now, with these settings. None and `reference` give None: the reference.

    `OPTCausalLM.from_preset(..., accelerator=find("numba", threads=2))`.
    """
    if accelerator is None or accelerator == REFERENCE:
        if settings:
            raise AcceleratorError(f"the reference has no setting {next(iter(settings))!r}: it is for accelerators")
        return None
    if isinstance(accelerator, Accelerator):
        return accelerator.configured(**settings) if settings else accelerator
    if not isinstance(accelerator, str):
        raise TypeError(f"accelerator must be a name, an Accelerator or None, got {type(accelerator).__name__}")
    found = plugin(accelerator)
    try:
        reason = found.missing()
    except Exception as error:
        raise AcceleratorError(f"accelerator {accelerator!r} cannot say whether it can run here: {_told(error)}") from error
    if reason is not None:
        raise AcceleratorError(f"accelerator {accelerator!r} cannot run here: {reason}")
    return found.configured(**settings) if settings else found


def plugin(name: str) -> Accelerator:
    """The plug-in of this name, imported now, whether or not it can run on this machine."""
    plugins = installed()
    if name not in plugins:
        names = ", ".join([REFERENCE, *sorted(plugins)])
        raise AcceleratorError(f"no accelerator {name!r} is installed; here: {names}")
    try:
        found = plugins[name].load()
    except (Exception, SystemExit) as error:  # a plug-in is somebody else's: whatever it raises is said of it
        raise AcceleratorError(f"accelerator {name!r} cannot be imported: {_told(error)}") from error
    if not isinstance(found, Accelerator):
        raise AcceleratorError(f"entry point {name!r} is a {type(found).__name__}, wanted an Accelerator")
    return found


def _told(error: BaseException) -> str:
    """The error in one line, with its class where that says more."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ImportError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")


@contextmanager
def use(accelerator: str | Accelerator | None) -> Iterator[Accelerator | None]:
    """Run every op inside the block on this accelerator; None or `reference` is the reference."""
    found = find(accelerator)
    with executing(found):
        yield found
