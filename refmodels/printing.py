"""What the commands print: JSON, columns, sizes; and what is said on standard error on the way."""

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

PROSE_WIDTH = 120
"""Characters of a line of text among tables."""

_line_is_open = False
"""Whether standard output stands in the middle of a line."""


def write(text: str) -> None:
    """A piece of a text on standard output, at once."""
    global _line_is_open
    sys.stdout.write(text)
    sys.stdout.flush()
    _line_is_open = not text.endswith("\n")


def say(text: str) -> None:
    """A line on standard error."""
    if sys.stderr is not None:  # else print would take standard output
        print(text, file=sys.stderr, flush=True)


def progress(text: str) -> None:
    """Tell somebody who waits at a terminal what is being done: `refmodels: compiling attention`, a line on standard error.

    If that is no terminal, nothing. It never fails, so that libraries and plug-ins can call it anywhere.
    """
    with suppress(OSError, ValueError):  # it is closed, or a broken pipe
        if sys.stderr is not None and sys.stderr.isatty():
            say(f"{_fresh_line()}refmodels: {text}")


def show_status(text: str) -> None:
    """Show this on a terminal in place of what was shown so before; an empty text clears it."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _fresh_line() -> str:
    """What ends the line in whose middle a text on the same terminal stands."""
    global _line_is_open
    if not _line_is_open or sys.stdout is None or not sys.stdout.isatty():
        return ""
    _line_is_open = False
    return "\n"


def print_json(value: Any) -> None:
    """One JSON value on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False), flush=True)


def print_rows(rows: Sequence[tuple[str, ...]], right: tuple[int, ...] = ()) -> None:
    """The rows as `aligned` sets them, indented."""
    for line in aligned(rows, right):
        print(f"  {line}")


def aligned(rows: Sequence[tuple[str, ...]], right: tuple[int, ...] = ()) -> list[str]:
    """Each row as a line, its columns padded to one width; those in `right` are set flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:{'>' if i in right else '<'}{width}}}" for i, width in enumerate(widths))
    return [form.format(*row).rstrip() for row in rows]


def printable(text: str, most: int = 200) -> str:
    """A name that a stranger chose, fit to print: control characters escaped, and of what is longer than this the middle left
    out."""
    return _shortened("".join(map(_printable_character, _shortened(text, 2 * most))), most)


def _printable_character(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def _shortened(text: str, most: int) -> str:
    kept = max(most - 3, 0)
    return text if len(text) <= most else f"{text[: kept - kept // 2]}...{text[len(text) - kept // 2 :]}"


def byte_size(count: int) -> str:
    """Bytes in the largest unit that leaves at least 1."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:,.1f} {unit}"
    return f"{count} B"
