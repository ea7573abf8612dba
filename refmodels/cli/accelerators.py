"""`refmodels accelerators`: what can stand in for the reference, and whether it can here."""

import argparse
import sys
from contextlib import redirect_stdout
from importlib.metadata import EntryPoint

from refmodels import __version__
from refmodels.accelerator import REFERENCE, installed
from refmodels.cli.selection import fastest_first, problem
from refmodels.printing import aligned, print_json


def run(arguments: argparse.Namespace) -> None:
    """The plug-ins, the fastest first, and the reference: which can run here, and why the others cannot."""
    plugins = installed()
    names = fastest_first(plugins)
    with redirect_stdout(sys.stderr):
        problems = {name: problem(name) for name in names}
    default = next((name for name in names if problems[name] is None), REFERENCE)
    packages = {name: _package(plugins[name]) for name in names} | {REFERENCE: f"refmodels {__version__}"}
    if arguments.json:
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


def _package(entry: EntryPoint) -> str | None:
    """The distribution that brings an entry point, and its version."""
    distribution = getattr(entry, "dist", None)
    return None if distribution is None else f"{distribution.name} {distribution.version}"
