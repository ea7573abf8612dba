"""`refmodels ops`, `accelerators` and `compile`: what there is to accelerate, what does, what can run here; making it ready."""

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.metadata import EntryPoint
from typing import Any

from refmodels import __version__
from refmodels.accelerator import REFERENCE, Accelerator, AcceleratorError, CompileError, find, installed, plugin
from refmodels.coverage import COMPOSITE, OWN, coverage, inner_ops
from refmodels.coverage import REFERENCE as ALONE
from refmodels.op import Op, Shape
from refmodels.opdoc import shapes, signature, table
from refmodels.printing import aligned, print_json, say


def print_ops(*, as_json: bool) -> None:
    """The op table."""
    ops = table()
    if as_json:
        print_json([_record(op) for op in ops])
        return
    rows = [("NAME", "KIND", "ERROR MODEL", "SHAPES")]
    rows += [(op.name, _kind(op), str(op.error), shapes(op)) for op in ops]
    print("\n".join(aligned(rows)))


def _kind(op: Op[..., Any]) -> str:
    return "composite" if op.composite else "primitive"


def _record(op: Op[..., Any]) -> dict[str, Any]:
    return {
        "name": op.name,
        "module": op.__module__,
        "kind": _kind(op),
        "signature": signature(op, width=None),
        "shapes": {name: repr(shape) for name, shape in op.shapes.items()},
        "result": repr(op.result) if isinstance(op.result, Shape) else None,
        "error_model": str(op.error),
        "laws": list(op.laws),
        "mutates": list(op.mutates),
        "source": op.source,
        "calls": [inner.name for inner in inner_ops(op)],
    }


def print_coverage(name: str, *, as_json: bool) -> None:
    """What runs each op on the accelerator of this name; it need not be able to run here."""
    with redirect_stdout(sys.stderr):  # whatever a plug-in prints when it is imported
        accelerator = Accelerator(REFERENCE) if name == REFERENCE else plugin(name)
        problem = None if name == REFERENCE else _problem(name)
    entries = coverage(accelerator)
    if as_json:
        ops = [
            {"name": entry.op.name, "kind": _kind(entry.op), "runs": entry.runs, "why": entry.why}
            | {"kernels": list(entry.kernels), "reference": list(entry.reference)}
            for entry in entries
        ]
        print_json({"accelerator": name, "can_run": problem is None, "problem": problem, "ops": ops})
        return
    rows = [("NAME", "KIND", "RUNS", "WHY")]
    rows += [(entry.op.name, _kind(entry.op), entry.runs, entry.why) for entry in entries]
    print("\n".join(aligned(rows)))
    counts = Counter(entry.runs for entry in entries)
    print(f"{len(entries)} ops: {', '.join(f'{counts[runs]} {runs}' for runs in (OWN, COMPOSITE, ALONE))}", flush=True)
    if problem is not None:
        say(f"refmodels: note: accelerator {name!r} {problem}")


def print_accelerators(names: Sequence[str], *, as_json: bool) -> None:
    """The plug-ins of these names, the fastest first, and the reference: which can run here, and why the others cannot."""
    plugins = installed()
    with redirect_stdout(sys.stderr):
        problems = {name: _problem(name) for name in names}
    default = next((name for name in names if problems[name] is None), REFERENCE)
    packages = {name: _package(plugins[name]) for name in names} | {REFERENCE: f"refmodels {__version__}"}
    if as_json:
        entries = [
            {
                "name": name,
                "package": package,
                "entry_point": plugins[name].value if name in plugins else None,
                "can_run": problems.get(name) is None,
                "default": name == default,
                "problem": problems.get(name),
            }
            for name, package in packages.items()
        ]
        print_json(entries)
        return
    rows = [("NAME", "PACKAGE", "HERE")]
    for name, package in packages.items():
        rows.append((name, package or "", problems.get(name) or "can run"))
    print("\n".join(aligned(rows)))


def compile_kernels(accelerator: Accelerator | None) -> None:
    """Compile what this accelerator would compile when it is first used. CompileError if that fails."""
    if accelerator is None:
        print(f"{REFERENCE}: nothing to compile", flush=True)
        return
    try:
        with redirect_stdout(sys.stderr):  # whatever a compiler prints
            done = accelerator.compile(lambda line: say(f"refmodels: {line}"))
    except Exception as error:
        said = " ".join(str(error).split())
        raise CompileError(
            f"{accelerator.name}: compiling failed: {type(error).__name__}: {said}".removesuffix(": ")
        ) from error
    print(f"{accelerator.name}: {done or 'nothing to compile'}", flush=True)


def _problem(name: str) -> str | None:
    """Why this plug-in cannot run here, in one line; None if it can."""
    try:
        find(name)
    except AcceleratorError as error:
        return " ".join(str(error).split()).removeprefix(f"accelerator {name!r} ")
    return None


def _package(entry: EntryPoint) -> str | None:
    """The distribution that brings an entry point, and its version."""
    distribution = getattr(entry, "dist", None)
    return None if distribution is None else f"{distribution.name} {distribution.version}"
