"""`refmodels compile`: an accelerator's kernels, made ready before they are used."""

import argparse
import sys
from contextlib import redirect_stdout

from refmodels.accelerator import REFERENCE, CompileError, find
from refmodels.cli.selection import fastest_accelerator
from refmodels.printing import say


def run(arguments: argparse.Namespace) -> None:
    """Compile what the accelerator would compile when it is first used. CompileError if that fails."""
    accelerator = fastest_accelerator() if arguments.accelerator is None else find(arguments.accelerator)
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
