"""Scripts that show a wrong step: written to be read, and to run without anything else.

`of_call` runs the implementation and compares one of its steps with numbers that lie beside the script: it needs NumPy and the
implementation alone. `of_step` has the step by itself: its inputs, what they gave, and our op.
"""

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import numpy as np

from refmodels.op import Array
from refmodels.verification.judgement import Step

CALL = '''\
"""{title}

{facts}

This script runs the implementation on the smallest inputs that show it, and compares this step with what it should give.
Beside it lies {arrays}, with these arrays:

    in.*       the inputs
    expected   what the step should give: refmodels in float64, from the implementation's own values of the steps before
    bound      how far a right implementation may be from that in this type{counts_line}

Exit status: 0 if the step is right, 1 if it is wrong, 2 if the implementation cannot be run. It needs NumPy and the
implementation, which is looked for in the current directory too.
"""

import importlib
import sys
from pathlib import Path

import numpy as np

BUILD = {spec}  # a function that makes the implementation
STEP = {step}
NAME = {name}  # what the implementation calls this step or output


def main():
    arrays = np.load(Path(__file__).with_suffix(".npz"))
    inputs = {{name[3:]: arrays[name] for name in arrays.files if name.startswith("in.")}}
    module, _, name = BUILD.partition(":")
    sys.path.insert(0, "")
    try:
        build = importlib.import_module(module)
        for part in name.split("."):
            build = getattr(build, part)
        implementation = build({arguments})
        run = getattr(implementation, "run", implementation)
        steps = run(inputs)
        got = steps[NAME] if hasattr(steps, "keys") else steps
        if hasattr(got, "detach"):  # PyTorch's
            got = got.detach().cpu().double()
        got = np.asarray(got).astype(np.float64)
    except Exception as error:
        print(f"cannot run {{BUILD}}: {{type(error).__name__}}: {{error}}")
        return 2
    return compare(got, arrays["expected"], arrays)

{compare}
'''

STEP = '''\
"""{title}

{facts}

This script has the step alone: what went into it, what came out of it, and what the same op of refmodels makes of the same.
Beside it lies {arrays}, with these arrays:

    arguments.*   what went into the step, parameters included: the implementation's own values of the steps before
    theirs        what came out of it
    bound         how far a right implementation may be from the truth in this type{counts_line}

Exit status: 0 if the step is right, 1 if it is wrong. It needs NumPy and refmodels (pip install refmodels).
"""

import sys
from pathlib import Path

import numpy as np

from refmodels.numerics import widened
from refmodels.op import OPS
{imports}
STEP = {step}
ARRAYS = np.load(Path(__file__).with_suffix(".npz"))


def array(name, dtype=None):
    """An array of the file; bfloat16 is stored as float32 there."""
    if dtype == "bfloat16":
        import ml_dtypes

        return ARRAYS[name].astype(ml_dtypes.bfloat16)
    return ARRAYS[name]


ARGUMENTS = {arguments}


def their_step():
    """What the implementation gave. To try a correction, compute it here from ARGUMENTS."""
    return array("theirs")


def main():
    op = OPS[{op}]
    # {says}
    expected = op.reference(**widened(ARGUMENTS))
    return compare(np.asarray(their_step()).astype(np.float64), np.asarray(expected), ARRAYS)

{compare}
'''

COMPARE = """
def compare(got, expected, arrays):
    bound = np.broadcast_to(arrays["bound"], expected.shape)
    if got.shape != expected.shape:
        print(f"wrong: {{STEP}} has shape {{got.shape}}, wanted {{expected.shape}}")
        return 1{more}
    with np.errstate(invalid="ignore"):
        error = np.where(got == expected, 0.0, np.abs(got - expected))
    error = np.where(np.isnan(error), np.inf, error)  # NaN is wrong
    error = np.where(np.isinf(bound), 0.0, error)  # what is not judged{counts}
    place = np.unravel_index(np.argmax(error / np.maximum(bound, 1e-300)), error.shape)
    place = tuple(int(i) for i in place)
    found = f"{{STEP}} is {{got[place]:.9g}} at {{place}}, expected {{expected[place]:.9g}}"
    ok = bool((error <= bound).all())
    print(f"{{'right' if ok else 'wrong'}}: {{found}}: error {{error[place]:.3g}}, bound {{bound[place]:.3g}}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())"""

SHIFT = """
    # The softmax does not see what all keys of a query have in common: only differences between keys count.
    off = np.where({counts}, got - expected, np.nan)
    got = got - np.nan_to_num(np.nanmedian(off, axis=-1, keepdims=True))"""

COUNTS = """
    error = np.where(arrays["counts"], error, 0.0)  # not where padding is, nor at forbidden keys"""

COUNTS_LINE = "\n    {}which values count: padding and forbidden keys do not"


def of_call(
    spec: str,
    name: str,
    step: Step,
    op: str,
    facts: Mapping[str, str],
    says: Sequence[str],
    *,
    counts: bool,
    checkpoint: str | None = None,
) -> str:
    """The script that builds what `spec` names and compares its step `name`; `checkpoint` is a directory beside the script."""
    return (
        CALL.format(
            title=_title(step, spec),
            facts=_facts(step, facts, says),
            arrays="reproduce.npz",
            counts_line=COUNTS_LINE.format("counts     ") if counts else "",
            spec=repr(spec),
            step=repr(step.name),
            name=repr(name),
            arguments="" if checkpoint is None else f"checkpoint=Path(__file__).resolve().parent / {checkpoint!r}",
            compare=_compare(op, counts),
        ).rstrip("\n")
        + "\n"
    )


def of_step(
    arguments: Mapping[str, Any],
    step: Step,
    op: str,
    facts: Mapping[str, str],
    says: Sequence[str],
    *,
    counts: bool,
    formula: str,
) -> tuple[str, dict[str, Array]]:
    """The script that has the step alone, and the arrays that it wants beside `theirs`, `bound` and `counts`."""
    arrays: dict[str, Array] = {}
    imports: set[str] = set()
    source = _source(arguments, "arguments", arrays, imports, 0)
    script = STEP.format(
        title=_title(step, facts.get("implementation", "")),
        facts=_facts(step, facts, says),
        arrays="reproduce.npz",
        counts_line=COUNTS_LINE.format("counts        ") if counts else "",
        imports="".join(f"{line}\n" for line in sorted(imports)) + "\n" if imports else "",
        step=repr(step.name),
        arguments=source,
        op=repr(op),
        says=_plain(formula),
        compare=_compare(op, counts),
    )
    return script.rstrip("\n") + "\n", arrays


def storable(array: Array) -> Array:
    """An array as a file without pickles can hold it: bfloat16 as float32, which is exact."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _compare(op: str, counts: bool) -> str:
    shift = SHIFT.format(counts='arrays["counts"]' if counts else "True") if op == "attention_scores" else ""
    return COMPARE.format(more=shift, counts=COUNTS if counts else "")


def _title(step: Step, implementation: str) -> str:
    return _plain(f"{step.name} is wrong in {implementation}.")


def _facts(step: Step, facts: Mapping[str, str], says: Sequence[str]) -> str:
    lines = {"step": f"{step.name}, shape {step.shape}", "found": step.local.reason, **facts}
    lines |= {f"looks like{' also' * bool(i)}": text for i, text in enumerate(says[:2])}
    width = max(map(len, lines))
    return "\n".join(f"    {_plain(key):<{width}}   {_plain(text)}" for key, text in lines.items())


def _plain(text: str) -> str:
    """A text that may stand in a docstring or a comment, whoever wrote it: one line, without quotes to end it."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    return shown.replace("\\", "/").replace('"""', "'''").rstrip('"')[:500]


def _source(value: Any, name: str, arrays: dict[str, Array], imports: set[str], depth: int) -> str:
    """Python for a tree of arguments; its arrays go to `arrays`."""
    if isinstance(value, np.ndarray):
        arrays[name] = value
        return f'array("{name}", "bfloat16")' if value.dtype.name == "bfloat16" else f'array("{name}")'
    if isinstance(value, np.generic):
        return repr(value.item())
    pad = "    " * (depth + 1)
    if isinstance(value, Mapping):
        lines = [
            f"{pad}{key!r}: {_source(child, f'{name}.{key}', arrays, imports, depth + 1)},\n" for key, child in value.items()
        ]
        return "{\n" + "".join(lines) + "    " * depth + "}" if lines else "{}"
    if isinstance(value, list | tuple):
        lines = [f"{pad}{_source(child, f'{name}.{i}', arrays, imports, depth + 1)},\n" for i, child in enumerate(value)]
        left, right = "[]" if isinstance(value, list) else "()"
        return left + "\n" + "".join(lines) + "    " * depth + right if lines else left + right
    if is_dataclass(value) and not isinstance(value, type):
        imports.add(f"from {type(value).__module__} import {type(value).__name__}")
        return repr(value)
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    raise TypeError(f"{name} is {type(value).__name__}: it cannot be written into a script")
