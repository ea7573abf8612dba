"""`refmodels generate`: a text continued or answered, as it is generated, and what that took."""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import fields
from itertools import chain
from typing import Any

from refmodels.accelerator import REFERENCE
from refmodels.cli.parser import DEFAULT_NEW_TOKENS
from refmodels.cli.selection import chosen_accelerator
from refmodels.cli.streams import prompt_text
from refmodels.generate import Request, Sampling
from refmodels.machine import peak_memory
from refmodels.ops.precision import POLICIES
from refmodels.presets import locate
from refmodels.printing import print_json, say, write
from refmodels.task import Task, TextStream


class Stopwatch(Iterator[str]):
    """The pieces of a `TextStream`, timed. The first token ends with the prefill (for T5 with the encoder, too)."""

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream
        self._began = time.perf_counter()
        self.first_token_seconds: float | None = None
        self.seconds = 0.0
        """From the start to the last token."""

    def __next__(self) -> str:
        before = len(self._stream.tokens)
        piece = next(self._stream)
        count = len(self._stream.tokens)
        if count > before:
            self.seconds = time.perf_counter() - self._began
        if count == 1 and before == 0:
            self.first_token_seconds = self.seconds
        return piece

    def answers(self) -> list[tuple[str, list[int]]]:
        """All answers of the stream, timed together."""
        found = self._stream.answers()
        self.seconds = time.perf_counter() - self._began
        return found

    @property
    def decoding_speed(self) -> float | None:
        """Tokens a second after the first; None where the tokens did not come one by one."""
        count = len(self._stream.tokens)
        if self.first_token_seconds is None or count < 2:
            return None
        return (count - 1) / max(self.seconds - self.first_token_seconds, 1e-9)


def run(arguments: argparse.Namespace) -> None:
    """`refmodels generate`."""
    # Everything that can be refused without the weights is, before they are read.
    given = {field.name: value for field in fields(Sampling) if (value := getattr(arguments, field.name)) is not None}
    request = Request(given, answers=arguments.num_return_sequences)
    (sampling,) = request.rows(1)
    if "" in arguments.stop:
        raise ValueError("--stop wants a text that is not empty")
    if arguments.dtype is not None and arguments.dtype not in POLICIES:
        raise ValueError(f"dtype must be one of {', '.join(POLICIES)}, got {arguments.dtype!r}")
    locate(arguments.preset)
    accelerator = chosen_accelerator(arguments)
    prompt = prompt_text(arguments.prompt)

    began = time.perf_counter()
    with redirect_stdout(sys.stderr):  # downloads report their progress on either stream
        task = Task.from_preset(arguments.preset, accelerator=accelerator, dtype=arguments.dtype)
    if task.tokenizer is None:
        raise ValueError(f"preset {arguments.preset} has no tokenizer files: there is nothing to read a text with")
    load_seconds = time.perf_counter() - began

    new = arguments.max_new_tokens
    if new is None and arguments.max_length is None:
        new = DEFAULT_NEW_TOKENS
    length = arguments.max_length
    several = request.several(sampling) > 1
    generated = task.stream(
        prompt,
        length,
        arguments.stop_token_ids,
        max_new_tokens=new,
        stop=arguments.stop,
        num_return_sequences=arguments.num_return_sequences,
        **given,
    )
    clock = Stopwatch(generated)
    shown = "" if arguments.strip_prompt else generated.prompt_text
    stream = not (arguments.no_stream or arguments.json or several or sampling.kind == "beam")
    if several:
        answers = [(shown + text, tokens) for text, tokens in clock.answers()]
    else:
        pieces = chain([shown], clock)
        answers = [(_write(pieces) if stream else "".join(pieces), generated.tokens)]
    texts, tokens = [text for text, _ in answers], [tokens for _, tokens in answers]
    stats = {
        "accelerator": REFERENCE if accelerator is None else accelerator.name,
        "dtype": task.backbone.config.dtype,
        "load_seconds": load_seconds,
        "prompt_tokens": len(generated.prompt_ids),
        "new_tokens": sum(map(len, tokens)),
        "first_token_seconds": clock.first_token_seconds,
        "seconds": clock.seconds,
        "decoding_tokens_per_second": clock.decoding_speed,
        "peak_memory_mb": peak_memory_mb(),
    }
    if arguments.json:
        said = {"text": texts, "tokens": tokens} if several else {"text": texts[0], "tokens": tokens[0]}
        print_json({"preset": arguments.preset, "prompt": prompt, **said, **stats})
    elif stream:
        write("\n")
    else:
        print("\n\n".join(texts), flush=True)
    if arguments.stats:
        _print_stats(stats)


def _write(pieces: Iterable[str]) -> str:
    """Write each piece as soon as it is there; gives all of them."""
    written: list[str] = []
    try:
        for piece in filter(None, pieces):
            write(piece)
            written.append(piece)
    except BrokenPipeError:
        raise
    except Exception:
        write("\n")  # the error gets a line of its own
        raise
    return "".join(written)


def peak_memory_mb() -> float | None:
    """The most memory that this process has had, in units of 10**6 bytes; None where the system does not say."""
    peak = peak_memory()
    return None if peak is None else peak / 1e6


def _print_stats(stats: Mapping[str, Any]) -> None:
    first, speed, peak = stats["first_token_seconds"], stats["decoding_tokens_per_second"], stats["peak_memory_mb"]
    rows = {
        "accelerator": stats["accelerator"],
        "dtype": stats["dtype"],
        "load": f"{stats['load_seconds']:.3f} s",
        "prompt": f"{stats['prompt_tokens']} tokens",
        "new": f"{stats['new_tokens']} tokens in {stats['seconds']:.3f} s",
        "first token": None if first is None else f"{first:.4f} s",
        "decoding": None if speed is None else f"{speed:,.1f} tokens/s",
        "peak memory": None if peak is None else f"{peak:,.0f} MB",
    }
    for name, value in rows.items():
        if value is not None:
            say(f"{name:<12} {value}")
