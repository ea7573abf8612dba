"""The accelerator that a command runs on: the one that is asked for, or the fastest that can run here."""

import argparse
from collections.abc import Iterable
from typing import Any

from refmodels.accelerator import REFERENCE, Accelerator, AcceleratorError, find, installed, plugin
from refmodels.cli.errors import one_line
from refmodels.printing import progress, say

FASTEST_FIRST = ("cupy", "numba")
"""Accelerators in the order the command line tries them; others that are installed come after these."""


def chosen_accelerator(arguments: argparse.Namespace) -> Accelerator | None:
    """What --accelerator and --threads ask for. What was not asked for is named on a terminal."""
    settings = {} if arguments.threads is None else {"threads": arguments.threads}
    if arguments.accelerator is not None:
        return find(arguments.accelerator, **settings)
    found = fastest_accelerator(**settings)
    if found is None:
        return find(None, **settings)
    progress(f"running on {found.name}")
    return found


def fastest_accelerator(**settings: Any) -> Accelerator | None:
    """The first installed accelerator that can run here with these settings, the fastest first; None if only the reference can.
    One that somebody meant to run, and that cannot, is named with the reason on standard error."""
    left_out: list[str] = []
    chosen = None
    for name in fastest_first(installed()):
        intended = False
        try:
            intended = plugin(name).intended()
            chosen = find(name, **settings)
            break
        except AcceleratorError as error:
            cause = error.__cause__
            if intended and cause is None:
                left_out.append(str(error))
            elif cause is not None and not isinstance(cause, ImportError):
                say(f"refmodels: note: accelerator {name!r} does not load and is left out: {one_line(cause)}")
    for reason in left_out:
        say(f"refmodels: note: {reason}; running on {REFERENCE if chosen is None else chosen.name}")
    return chosen


def fastest_first(names: Iterable[str]) -> list[str]:
    """Names of accelerators in the order in which the command line tries them."""
    names = set(names)
    return [name for name in FASTEST_FIRST if name in names] + sorted(names.difference(FASTEST_FIRST))


def problem(name: str) -> str | None:
    """Why this plug-in cannot run here, in one line; None if it can."""
    try:
        find(name)
    except AcceleratorError as error:
        return " ".join(str(error).split()).removeprefix(f"accelerator {name!r} ")
    return None
