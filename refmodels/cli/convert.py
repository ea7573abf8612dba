"""`refmodels convert`: a preset written in the other form, which a signal may end at any time."""

import argparse
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from typing import Any

from refmodels.convert import convert
from refmodels.printing import byte_size, print_json, say


class Stopper:
    """Signals that end a program, as SystemExit: at once, or, while tensors are written, between two of them, because what is
    raised inside a library's callback may be lost there. A second signal is obeyed at once."""

    def __init__(self) -> None:
        self._writing = False
        self._received: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals come here, if this is the main thread: no other may say so. One that is ignored stays ignored."""
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        if threading.current_thread() is not threading.main_thread():
            numbers = []
        before = {n: handler for n in numbers if (handler := signal.getsignal(n)) not in (signal.SIG_IGN, None)}
        for number in before:
            signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def between_tensors(self, more: bool) -> None:
        """Obey a signal that has come; `more` says whether there are tensors to write yet."""
        self._writing = more
        if self._received is not None:
            raise SystemExit(128 + self._received)

    def _receive(self, number: int, _frame: Any) -> None:
        again, self._received = self._received is not None, number
        if again or not self._writing:
            raise SystemExit(128 + number)


def run(arguments: argparse.Namespace) -> None:
    """`refmodels convert`."""
    stopper, unfinished_line = Stopper(), False

    def progress(done: int, total: int) -> None:
        nonlocal unfinished_line
        if sys.stderr is not None and sys.stderr.isatty():
            print(f"\r{byte_size(done):>8} of {byte_size(total)} written", end="", file=sys.stderr, flush=True)
            unfinished_line = True
        stopper.between_tensors(done < total)

    options = {name: getattr(arguments, name) for name in ("dtype", "max_shard_size", "force", "dequantize")}
    try:
        with stopper.listening(), redirect_stdout(sys.stderr):  # downloads report their progress on either stream
            converted = convert(arguments.source, arguments.target, arguments.to, progress=progress, **options)
    finally:
        if unfinished_line:
            say("")
    if arguments.json:
        print_json({"source": arguments.source, **asdict(converted)})
        return
    written = f"{converted.tensors} tensors, {byte_size(converted.bytes)}"
    print(f"{converted.directory}: {converted.format}, {converted.dtype}, {written}", flush=True)
