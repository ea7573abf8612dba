"""Standard input, read as a prompt, and standard output, kept for results alone."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress

from refmodels.printing import say


def prompt_text(argument: str) -> str:
    """The prompt; from standard input if it is -, less one newline at its end."""
    if argument != "-":
        text = argument
    elif sys.stdin is None:
        raise ValueError("no PROMPT is given, and there is no standard input")
    else:
        if sys.stdin.isatty():
            say("refmodels: reading the prompt from the terminal; end it with Ctrl-D")
        text = sys.stdin.buffer.read().decode(errors="surrogateescape") if hasattr(sys.stdin, "buffer") else sys.stdin.read()
        text = text.removesuffix("\n").removesuffix("\r")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not valid UTF-8, at character {error.start}") from None
    return text


@contextmanager
def stdout_aside() -> Iterator[None]:
    """What the block prints, in Python or below it, goes to standard error: standard output is for results alone."""
    try:
        kept = os.dup(1)
    except OSError:  # there is none
        kept = None
    sys.stdout.flush()
    try:
        if kept is not None:
            with suppress(OSError):
                os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)
