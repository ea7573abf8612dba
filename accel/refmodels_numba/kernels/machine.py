"""The one compiled entry: every thread of a team runs a program, instruction by instruction, piece by piece.

An instruction is cut into pieces of work whose results do not depend on who computes them, and a thread takes the next piece
that nobody has taken. So nobody is waited for who has not begun: a call is complete with whatever threads come, and its bits
are the same with any number of them.
"""

import inspect
from collections.abc import Callable
from typing import Any

from numba import cfunc, njit, types

from refmodels_numba.kernels import attention, cache, elementwise, linear, norm, quantize
from refmodels_numba.kernels.elementwise import INLINE
from refmodels_numba.kernels.vector import fetch, fetch_add, pause, words, yield_thread
from refmodels_numba.layout import CODES, HEADER, INSTRUCTIONS, WIDTH

MODULES = {
    "linear": linear,
    "norm": norm,
    "quantize": quantize,
    "write": cache,
    "attention": attention,
    "scores": attention,
    "softmax": attention,
    "context": attention,
    "elementwise": elementwise,
}
PATIENCE = 2000
"""Looks at the counter before a waiting thread lets others run."""
SIGNATURE = types.void(*[types.int64] * 4)


def _dispatcher(suffix: str, leading: tuple[str, ...]) -> Callable[..., None]:
    """A function (code, *leading, f) that calls the kernel of an instruction with its operands, f[HEADER] the first."""
    lines, namespace = [f"def dispatch(code, {', '.join((*leading, 'f'))}):"], {}
    for name, module in MODULES.items():
        kernel = getattr(module, name + suffix)
        parameters = list(inspect.signature(kernel.py_func).parameters)[len(leading) :]
        operands = INSTRUCTIONS[name].split()
        if parameters != operands[: len(parameters)] or (not suffix and len(parameters) != len(operands)):
            raise TypeError(f"kernel {name}{suffix} takes {parameters}, wanted {operands}")
        values = ", ".join([*leading, *(f"f[{HEADER + i}]" for i in range(len(parameters)))])
        lines += [f"    if code == {CODES[name]}:", f"        return {name}{suffix}({values})"]
        namespace[name + suffix] = kernel
    lines.append("    return 0" if suffix else "    return")
    exec("\n".join(lines), namespace)
    return njit(**INLINE)(namespace["dispatch"])


chunks_of = _dispatcher("_chunks", ())
run_chunk = _dispatcher("", ("chunk", "scratch"))


@njit(**INLINE)
def wait_until(counter, value):
    """Wait until so many pieces of work are done."""
    looks = 0
    while fetch(counter) < value:
        looks += 1
        if looks < PATIENCE:
            pause()
        else:
            yield_thread()


def execute(program, count, counters, scratch):
    """Run `count` instructions. counters: int64, pieces done at 0, then pieces taken of each instruction, all 0 at first."""
    total = 0
    for i in range(count):
        f = words(program + 8 * WIDTH * i, WIDTH)
        if f[1] != 0:
            wait_until(counters, total)
        chunks = chunks_of(f[0], f)
        while True:
            chunk = fetch_add(counters + 8 * (i + 1), 1)
            if chunk >= chunks:
                break
            run_chunk(f[0], chunk, scratch, f)
            fetch_add(counters, 1)
        total += chunks
    wait_until(counters, total)


def compiled(report: Callable[[str], None]) -> tuple[bytes, str]:
    """The object code of `execute` for this CPU, and the name of its symbol, which takes four integers as C passes them.

    The kernels are compiled one by one first, so that `report` can say how far it is.
    """
    steps = [*INSTRUCTIONS, "the machine"]
    for i, step in enumerate(steps):
        report(f"compiling the kernels for this CPU, once: {i + 1}/{len(steps)}, {step}")
        if step in MODULES:
            getattr(MODULES[step], step).compile((types.int64,) * (2 + len(INSTRUCTIONS[step].split())))
    entry: Any = cfunc(SIGNATURE, **INLINE)(execute)
    library = entry._library
    return library._codegen._tm.emit_object(library._final_module), entry._wrapper_name
