"""`refmodels verify-op`: somebody's own function, held to an op (`spec/verification.md`)."""

import argparse
import sys
from dataclasses import asdict

from refmodels.cli.errors import cannot_run
from refmodels.cli.streams import stdout_aside
from refmodels.conformance import EXAMPLES
from refmodels.numerics import UNIT_ROUNDOFF
from refmodels.printing import aligned, print_json, printable, progress
from refmodels.verification.candidate import CandidateError
from refmodels.verification.forms import load_object
from refmodels.verification.single_op import check_function, op_named
from refmodels.verification.verify import AGREES, DIVERGES

LONGEST_LINE = 2000
"""Characters of a line that a foreign function had a part in."""


def run(arguments: argparse.Namespace) -> int:
    """`refmodels verify-op`."""
    checked = []
    with cannot_run():
        op = op_named(arguments.op)
        dtypes = arguments.dtype or ["float32"]
        for dtype in dtypes:
            if dtype not in UNIT_ROUNDOFF:
                raise ValueError(f"dtype must be one of {', '.join(UNIT_ROUNDOFF)}, got {dtype!r}")
        with stdout_aside():
            function = load_object(arguments.function)
            if not callable(function):
                raise CandidateError(f"{arguments.function} is {type(function).__name__}, wanted a function")
            for dtype in dtypes:
                progress(f"checking {op.name} in {dtype}")
                checked.append(
                    check_function(
                        op,
                        function,
                        arguments.function,
                        dtype,
                        examples=arguments.examples or EXAMPLES,
                        seed=arguments.seed,
                        example=arguments.example,
                    )
                )
    wrong = any(entry.failures for entry in checked)
    if arguments.json:
        print_json(
            {
                "op": op.name,
                "function": arguments.function,
                "right": not wrong,
                "checked": [
                    {
                        "dtype": entry.dtypes[0],
                        "verdict": entry.verdict,
                        "examples": entry.examples,
                        "by_function": entry.taken,
                        "declined": dict(sorted(entry.refused.items())),
                        "failures": [asdict(failure) for failure in entry.failures],
                    }
                    for entry in checked
                ],
            }
        )
        return DIVERGES if wrong else AGREES
    rows = [("OP", "TYPE", "EXAMPLES", "BY FUNCTION", "VERDICT")]
    rows += [(op.name, entry.dtypes[0], str(entry.examples), str(entry.taken), entry.verdict) for entry in checked]
    print("\n".join(aligned(rows, right=(2, 3))))
    for reason in sorted({reason for entry in checked for reason in entry.refused}):
        print(f"not tried where {reason}")
    for entry in checked:
        for failure in entry.failures:
            print("", *(printable(line, LONGEST_LINE) for line in str(failure).splitlines()), sep="\n")
    sys.stdout.flush()
    return DIVERGES if wrong else AGREES
