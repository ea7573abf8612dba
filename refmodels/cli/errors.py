"""From what went wrong to one line and an exit status."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from refmodels.accelerator import AcceleratorError
from refmodels.printing import printable, say

LONGEST_ERROR = 4000
"""Characters of the line that says what went wrong: strangers choose some of them."""

ERROR, USAGE, BROKEN_PIPE, INTERRUPTED = 1, 2, 141, 130
"""Exit statuses; the last two are what a shell reports for a program that SIGPIPE or SIGINT ended."""


def exit_status(error: Exception) -> int:
    """Of what a command raised: whether it was asked for something wrong, or failed on the way."""
    from refmodels.verification.candidate import CandidateError

    asked = (ValueError, FileExistsError, FileNotFoundError, NotADirectoryError, AcceleratorError, CandidateError)
    return USAGE if isinstance(error, asked) else ERROR


def one_line(error: BaseException) -> str:
    """What went wrong, in words; with the name of its type if nobody foresaw it."""
    text = printable(" ".join(str(error).split()), LONGEST_ERROR)
    if isinstance(error, MemoryError):
        return f"not enough memory{f': {text}' if text else ''}"
    names = {kind.__name__ for kind in type(error).__mro__}  # theirs are not imported for this alone
    expected = isinstance(error, ValueError | OSError | ImportError) or names & {
        "AcceleratorError",
        "CandidateError",
        "CompileError",
    }
    return text if expected and text else f"{type(error).__name__}: {text}".removesuffix(": ")


@contextmanager
def cannot_run() -> Iterator[None]:
    """Whatever goes wrong inside has the exit status 2: that of 1 is kept for an implementation that diverges."""
    from refmodels.verification.candidate import CandidateError

    try:
        yield
    except CandidateError as error:
        said = getattr(error, "said", "")
        if "\n" in said:  # of a single line the error has all
            say(textwrap.indent(said, "  | "))
        raise
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, AcceleratorError):
        raise
    except MemoryError as error:
        raise CandidateError(f"not enough memory: {error}") from error
    except BrokenPipeError:
        raise
    except SystemExit as error:  # of theirs: a status of 0 would say that it agrees
        raise CandidateError(f"the implementation ends Python with {error.code!r}") from error
    except Exception as error:
        words = " ".join(str(error).split())
        expected = isinstance(error, OSError | ImportError)
        raise CandidateError(words if expected and words else f"{type(error).__name__}: {words}") from error
