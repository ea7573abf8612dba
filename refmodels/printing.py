"""What the commands print: JSON, columns, sizes."""

import json
from collections.abc import Sequence
from typing import Any


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


def byte_size(count: int) -> str:
    """Bytes in the largest unit that leaves at least 1."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:,.1f} {unit}"
    return f"{count} B"
