"""One op alone: somebody's own attention, norm or softmax, held to ours on examples drawn from the op's annotations."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from refmodels.accelerator import Accelerator
from refmodels.conformance import Checked, searched
from refmodels.op import OPS, Op
from refmodels.verification.candidate import CandidateError
from refmodels.verification.forms import as_array

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
OPEN = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def check_function(
    op: Op[..., Any], function: Callable[..., Any], name: str, dtype: str, *, examples: int, seed: int, example: str | None
) -> Checked:
    """Hold a function to `op`. CandidateError if it cannot be called as the op is, or takes none of the examples.

    It is given the op's arguments by their names, those that it has; without any of these names, by their order. A call that
    needs an argument which it has not is not tried, unless that is at its default. Arrays that are strided, reversed or
    read-only come as plain copies, as other packages cannot take them.
    """
    takes, by_order = _arguments(op, function, name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        bound = op.signature.bind(*args, **kwargs).arguments
        given = {key: value if key in op.mutates else _plain(value) for key, value in bound.items() if key in takes}
        return _arrays(name, function(*given.values()) if by_order else function(**given))

    def when(*args: Any, **kwargs: Any) -> bool | str:
        for parameter, value in op.signature.bind(*args, **kwargs).arguments.items():
            default = op.signature.parameters[parameter].default
            if parameter not in takes and value is not default and not (isinstance(value, int | float) and value == default):
                return f"it takes no {parameter}"
        return True

    kernel.__signature__ = when.__signature__ = op.signature  # type: ignore[attr-defined]
    accelerator = Accelerator(name, dtypes=(dtype,))
    accelerator.kernel(op, when=when)(kernel)
    line = f"refmodels verify-op {op.name} {name} --dtype {dtype} --example {{code}}"
    checked = searched(op, accelerator, dtype, examples=examples, seed=seed, example=example, line=line)
    if not checked.failures and not checked.taken:
        raise CandidateError(f"{name} takes none of {checked.examples} calls of {op.name}: {'; '.join(checked.refused)}")
    return checked


def op_named(name: str) -> Op[..., Any]:
    """The op of this name. ValueError with near ones if there is none."""
    import difflib

    from refmodels.opdoc import table

    table()  # which defines them all
    if name not in OPS:
        near = difflib.get_close_matches(name, OPS, 3, 0.4)
        raise ValueError(f"no op is named {name!r}; near are {', '.join(near) or 'none'}: `refmodels ops` lists them")
    return OPS[name]


def _arguments(op: Op[..., Any], function: Callable[..., Any], name: str) -> tuple[list[str], bool]:
    """Which of the op's arguments it takes, and whether by their order alone."""
    wanted = op.signature.parameters
    needed = [key for key, parameter in wanted.items() if parameter.default is parameter.empty]
    try:
        theirs = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a function of C that does not say
        return needed, True
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in theirs.values()):
        return list(wanted), False
    own = [key for key, parameter in theirs.items() if parameter.kind not in OPEN]
    if not set(own) & set(wanted):
        count = sum(parameter.kind in POSITIONAL for parameter in theirs.values())
        taken, by_order = list(wanted)[:count], True
        unknown = [key for key in own[count:] if theirs[key].default is inspect.Parameter.empty]
    else:
        taken, by_order = [key for key in wanted if key in own], False
        unknown = [key for key in own if key not in wanted and theirs[key].default is inspect.Parameter.empty]
    missing = [key for key in needed if key not in taken]
    if missing or unknown or (by_order and len(own) > len(wanted)):
        raise CandidateError(f"{name} takes ({', '.join(own)}), and {op.name} has ({', '.join(wanted)})")
    return taken, by_order


def _plain(value: Any) -> Any:
    """The same with every array in rows and writeable."""
    if isinstance(value, np.ndarray):
        plain = value.flags.c_contiguous and value.flags.writeable and min(value.strides, default=0) >= 0  # 1 can be reversed
        return value if plain else value.copy(order="C")
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    return [_plain(child) for child in value] if isinstance(value, list) else value


def _arrays(name: str, result: Any) -> Any:
    if isinstance(result, dict):
        return {key: _arrays(name, child) for key, child in result.items()}
    if isinstance(result, list | tuple):
        return type(result)(_arrays(name, child) for child in result)
    return as_array(name, "its result", result)
