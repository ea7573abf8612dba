"""The command line: `refmodels generate`, `score`, `verify`, `trace`, `presets`, `info`, `convert`, `bench` and the rest.

What each command takes is in `parser.py`, and what it does is `run` in the module of its name, `verify_op.py` for `verify-op`:
imported when the command is asked for, with all that it needs beyond NumPy. Several commands share `selection.py` (which
accelerator), `streams.py` (standard input and output) and `errors.py` (what went wrong, in a line and a status).

Results go to standard output, everything else to standard error. An error is one line and an exit status: 2 for what was asked,
1 for what went wrong on the way. With REFMODELS_DEBUG=1 in the environment it is a traceback.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from refmodels.cli.errors import BROKEN_PIPE, INTERRUPTED, exit_status, one_line
from refmodels.cli.parser import command_line
from refmodels.printing import say


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    try:
        status = _run(argv)
        if sys.stdout is not None:  # it was not closed before we began
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        _discard_output()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("REFMODELS_DEBUG") == "1":
            raise
        with suppress(OSError):  # standard error may be a broken pipe, too
            say(f"refmodels: error: {one_line(error)}")
        return exit_status(error)


def _run(argv: Sequence[str] | None) -> int:
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:  # a terminal that lacks a character shows its code instead
        reconfigure(errors="backslashreplace")
    try:
        arguments = command_line().parse_args(argv)
    except SystemExit as exit:  # after --help, --version and errors
        return exit.code if isinstance(exit.code, int) else 0
    command = import_module(f"refmodels.cli.{arguments.command.replace('-', '_')}")
    return command.run(arguments) or 0


def _discard_output() -> None:
    """Python flushes the standard streams once more at exit: let that go nowhere."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
