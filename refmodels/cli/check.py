"""`refmodels check`: is an accelerator right? A table or one JSON object, a JUnit file, and small examples of what is wrong."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from refmodels.accelerator import REFERENCE, find
from refmodels.conformance import EXAMPLES, Checked, check_accelerator
from refmodels.junit import TestCase, write_junit
from refmodels.printing import aligned, print_json, show_status

RIGHT, FAULTY = 0, 1


def run(arguments: argparse.Namespace) -> int:
    """Check, print, write; the exit status. AcceleratorError or ValueError for what cannot be checked, or not here."""
    name = arguments.accelerator
    begun = time.monotonic()
    with redirect_stdout(sys.stderr):  # whatever a plug-in prints
        found = find(name)
        try:
            report = check_accelerator(
                name if found is None else found,
                ops=arguments.op,
                dtypes=arguments.dtype,
                examples=arguments.examples or EXAMPLES,
                seed=arguments.seed,
                example=arguments.example,
                progress=lambda op, done, count: show_status(f"{done:3} of {count}  {op}"),
            )
        finally:
            show_status("")
    seconds = time.monotonic() - begun
    if arguments.junit is not None:
        write_junit(Path(arguments.junit), f"refmodels check {name or REFERENCE}", cases_of(report))
    if arguments.json:
        print_json(_record(name, report, seconds))
    else:
        print_report(name, report)
    return FAULTY if any(entry.failures for entry in report) else RIGHT


def print_report(accelerator: str, report: Sequence[Checked]) -> None:
    """The table, then what is wrong, then one line."""
    rows = [("NAME", "RUNS", "TYPES", "EXAMPLES", "BY KERNEL", "VERDICT")]
    rows += [
        (
            entry.name,
            entry.runs,
            " ".join(entry.dtypes),
            str(entry.examples),
            str(entry.taken) if entry.runs == "own kernel" else "",
            entry.verdict + (f": {entry.skipped}" if entry.skipped else ""),
        )
        for entry in report
    ]
    print("\n".join(aligned(rows, right=(3, 4))))
    for entry in report:
        for failure in entry.failures:
            print(f"\n{failure}")
    wrong, skipped = (sum(entry.verdict == verdict for entry in report) for verdict in ("WRONG", "skipped"))
    examples = sum(entry.examples for entry in report)
    said = f"{accelerator}: {len(report) - wrong - skipped} right, {wrong} wrong" + (f", {skipped} skipped" if skipped else "")
    print(f"{chr(10) if wrong else ''}{said}; {examples} examples", flush=True)


def _record(accelerator: str, report: Sequence[Checked], seconds: float) -> dict[str, Any]:
    return {
        "accelerator": accelerator,
        "right": not any(entry.failures for entry in report),
        "seconds": round(seconds, 1),
        "checked": [
            {
                "name": entry.name,
                "runs": entry.runs,
                "dtypes": entry.dtypes,
                "examples": entry.examples,
                "by_kernel": entry.taken,
                "verdict": entry.verdict,
                "skipped": entry.skipped or None,
                "features": dict(sorted(entry.features.items())),
                "failures": [vars(failure) for failure in entry.failures],
            }
            for entry in report
        ],
    }


def cases_of(report: Sequence[Checked]) -> Iterator[TestCase]:
    """One for each op and type."""
    for entry in report:
        failed = {failure.dtype: failure for failure in entry.failures}
        for dtype in entry.dtypes:
            case = TestCase(entry.name, dtype, seconds=entry.seconds / len(entry.dtypes))
            if dtype in failed:
                case = replace(case, outcome="failure", message=failed[dtype].reason, text=str(failed[dtype]))
            elif entry.skipped:
                case = replace(case, outcome="skipped", message=entry.skipped)
            yield case
