"""`refmodels ops`: what there is to accelerate, or what runs each op on an accelerator."""

import argparse
import sys
from collections import Counter
from contextlib import redirect_stdout
from typing import Any

from refmodels.accelerator import REFERENCE, Accelerator, plugin
from refmodels.cli.selection import problem
from refmodels.coverage import COMPOSITE, OWN, coverage, inner_ops
from refmodels.coverage import REFERENCE as ALONE
from refmodels.op import Op, Shape
from refmodels.opdoc import shapes, signature, table
from refmodels.printing import aligned, print_json, say


def run(arguments: argparse.Namespace) -> None:
    """`refmodels ops`."""
    if arguments.accelerator is None:
        print_ops(as_json=arguments.json)
    else:
        print_coverage(arguments.accelerator, as_json=arguments.json)


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
        obstacle = None if name == REFERENCE else problem(name)
    entries = coverage(accelerator)
    if as_json:
        ops = [
            {"name": entry.op.name, "kind": _kind(entry.op), "runs": entry.runs, "why": entry.why}
            | {"kernels": list(entry.kernels), "reference": list(entry.reference)}
            for entry in entries
        ]
        print_json({"accelerator": name, "can_run": obstacle is None, "problem": obstacle, "ops": ops})
        return
    rows = [("NAME", "KIND", "RUNS", "WHY")]
    rows += [(entry.op.name, _kind(entry.op), entry.runs, entry.why) for entry in entries]
    print("\n".join(aligned(rows)))
    counts = Counter(entry.runs for entry in entries)
    print(f"{len(entries)} ops: {', '.join(f'{counts[runs]} {runs}' for runs in (OWN, COMPOSITE, ALONE))}", flush=True)
    if obstacle is not None:
        say(f"refmodels: note: accelerator {name!r} {obstacle}")
