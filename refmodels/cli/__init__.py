"""The command line: `refmodels generate`, `score`, `verify`, `trace`, `presets`, `info`, `convert`, `bench` and the rest.

Results go to standard output, everything else to standard error. An error is one line and an exit status: 2 for what was asked,
1 for what went wrong on the way. With REFMODELS_DEBUG=1 in the environment it is a traceback. What a command needs beyond
NumPy is imported inside it.
"""

import argparse
import math
import os
import re
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, fields
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, NoReturn

from refmodels import __version__
from refmodels.printing import aligned, byte_size, print_json, print_rows, printable, progress, say, write

if TYPE_CHECKING:
    from refmodels.accelerator import Accelerator
    from refmodels.backbone import Backbone
    from refmodels.parameters import Parameter
    from refmodels.task import TextStream

DEFAULT_NEW_TOKENS = 128
FASTEST_FIRST = ("cupy", "numba")
"""Accelerators in the order the command line tries them; others that are installed come after these."""

SAMPLERS = ("greedy", "random", "top_k", "top_p", "beam", "contrastive")
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
WIDTH = 120

LONGEST_ERROR = 4000
"""Characters of the line that says what went wrong: strangers choose some of them."""

ERROR, USAGE, BROKEN_PIPE, INTERRUPTED = 1, 2, 141, 130
"""Exit statuses; the last two are what a shell reports for a program that SIGPIPE or SIGINT ended."""


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
            say(f"refmodels: error: {_one_line(error)}")
        return _status(error)


def _run(argv: Sequence[str] | None) -> int:
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:  # a terminal that lacks a character shows its code instead
        reconfigure(errors="backslashreplace")
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as exit:  # after --help, --version and errors
        return exit.code if isinstance(exit.code, int) else 0
    return arguments.command(arguments) or 0


def _status(error: Exception) -> int:
    from refmodels.accelerator import AcceleratorError
    from refmodels.verification.candidate import CandidateError

    asked = (ValueError, FileExistsError, FileNotFoundError, NotADirectoryError, AcceleratorError, CandidateError)
    return USAGE if isinstance(error, asked) else ERROR


def _one_line(error: BaseException) -> str:
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


def _discard_output() -> None:
    """Python flushes the standard streams once more at exit: let that go nowhere."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())


# -- arguments ------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Errors are one line, and abbreviated options are errors."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self._intermixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:  # type: ignore[override]
        # Options may stand between PRESET and PROMPT: argparse alone would take the missing prompt as given there.
        if self._subparsers is not None or self._intermixing:
            return super().parse_known_args(args, namespace)
        self._intermixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixing = False

    def error(self, message: str) -> NoReturn:
        say(f"refmodels: error: {' '.join(message.split())} (see {self.prog} --help)")
        raise SystemExit(USAGE)


def _positive(text: str) -> int:
    if not re.fullmatch(r"\d{1,12}", text, re.ASCII) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"wanted a positive integer, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not re.fullmatch(r"\d{1,40}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"wanted an integer from 0 on, got {text!r}")
    return int(text)


def _stop_ids(text: str) -> str | list[int] | None:
    if text in ("auto", "none"):
        return "auto" if text == "auto" else None
    if not re.fullmatch(r"\d{1,12}(,\d{1,12})*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"wanted auto, none or token ids such as 2,50118, got {text!r}")
    return [int(part) for part in text.split(",")]


def _batches(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(map(_positive, text.split(","))))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="refmodels", description="T5, OPT and BLOOM: the NumPy reference, and accelerators that keep to it.")
    parser.add_argument("--version", action="version", version=f"refmodels {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    generate = commands.add_parser("generate", help="continue or answer a text", description=_GENERATE, epilog=_EXAMPLE)
    generate.set_defaults(command=generate_command)
    generate.add_argument("preset", metavar="PRESET", help="a name that `refmodels presets` lists, a directory or a handle")
    generate.add_argument("prompt", metavar="PROMPT", nargs="?", default="-", help="the text; standard input if left out or -")
    group = generate.add_argument_group("length")
    group.add_argument("--max-length", type=_positive, metavar="N", help="most tokens in all, the prompt's included")
    group.add_argument(
        "--max-new-tokens", type=_positive, metavar="N", help=f"most new tokens (default: {DEFAULT_NEW_TOKENS} without either)"
    )
    group.add_argument(
        "--stop-token-ids", type=_stop_ids, default="auto", metavar="IDS", help="auto (the end token), none, or ids: 2,50118"
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the new text before TEXT (may be given several times)"
    )
    group = generate.add_argument_group("choice of the next token")
    group.add_argument("--sampler", choices=SAMPLERS, help="default: what the other options imply, else greedy")
    group.add_argument("--temperature", type=float, metavar="X", help="divides the scores; below 1 is bolder")
    group.add_argument("--top-k", type=_positive, metavar="K", help="draw from the K most likely tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="draw from the most likely tokens of probability P in all")
    group.add_argument("--min-p", type=float, metavar="P", help="draw from tokens at least P times as likely as the likeliest")
    group.add_argument("--num-beams", type=_positive, metavar="N", help="hypotheses that a beam search keeps")
    group.add_argument("--length-penalty", type=float, metavar="X", help="rank finished beams by score / length**X")
    group.add_argument("--penalty-alpha", type=float, metavar="X", help="contrastive search: weight of unlikeness, 0 to 1")
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1 makes tokens that were there less likely")
    group.add_argument("--no-repeat-ngram-size", type=_positive, metavar="N", help="no run of N tokens comes twice")
    group.add_argument("--seed", type=_seed, metavar="N", help="makes random choices repeatable")
    group = generate.add_argument_group("output")
    group.add_argument("--strip-prompt", action="store_true", help="print only what is new")
    group.add_argument("--no-stream", action="store_true", help="print the text when it is complete")
    several = "print N draws or the N best beams, with a blank line between them"
    group.add_argument("--num-return-sequences", type=_positive, metavar="N", help=several)
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group.add_argument("--stats", action="store_true", help="report time and memory on standard error")
    group = generate.add_argument_group("where and how to compute")
    _add_accelerator(group)
    group.add_argument("--dtype", metavar="POLICY", help="float32, float16, bfloat16, float64, mixed_float16, mixed_bfloat16")

    score = commands.add_parser("score", help="say how likely a text is", description=_SCORE)
    score.set_defaults(command=score_command)
    score.add_argument("preset", metavar="PRESET", help="a name that `refmodels presets` lists, a directory or a handle")
    score.add_argument("prompt", metavar="TEXT", help="the text; standard input if it is -")
    score.add_argument("target", metavar="TARGET", nargs="?", help="score this alone: what follows TEXT, or answers it (T5)")
    score.add_argument("--json", action="store_true", help="print one JSON object")
    _add_accelerator(score)
    score.add_argument("--dtype", metavar="POLICY", help="as for generate")

    presets = commands.add_parser("presets", help="list the built-in presets", description="List the built-in presets.")
    presets.set_defaults(command=presets_command)
    presets.add_argument("--json", action="store_true", help="print a JSON array")

    convert = commands.add_parser(
        "convert", help="write a preset in KerasHub's or in Hugging Face's form", description=_CONVERT
    )
    convert.set_defaults(command=convert_command)
    convert.add_argument("source", metavar="SRC", help="a name that `refmodels presets` lists, a directory or a handle")
    convert.add_argument("target", metavar="DST", help="the directory to write")
    convert.add_argument("--to", choices=("keras", "hf"), required=True, help="KerasHub's form or Hugging Face's")
    convert.add_argument("--dtype", metavar="TYPE", help="float32, float16 or bfloat16 (default: the type in the weight file)")
    convert.add_argument(
        "--max-shard-size", type=float, metavar="GIB", help="largest weight file (default: 10 for keras, 5 for hf)"
    )
    convert.add_argument("--dequantize", action="store_true", help="write int8 or int4 weights as the numbers they stand for")
    convert.add_argument("--force", action="store_true", help="replace DST as a whole, when all is written")
    convert.add_argument("--json", action="store_true", help="print one JSON object")

    bench = commands.add_parser("bench", help="measure speed and memory beside the hardware's limits", description=_BENCH)
    bench.set_defaults(command=bench_command)
    bench.add_argument("preset", metavar="PRESET", nargs="?", help="as for generate (default: opt_125m_en, random weights)")
    bench.add_argument(
        "--random", action="store_true", help="random weights in the preset's shape; nothing is downloaded for a built-in"
    )
    group = bench.add_argument_group("what to measure")
    group.add_argument("--prompt-length", type=_positive, metavar="N", help="tokens of a prompt (default: 512)")
    group.add_argument("--new-tokens", type=_positive, metavar="N", help="tokens to decode (default: 64)")
    group.add_argument("--batch", type=_batches, metavar="N,...", help="rows at once (default: 1,8)")
    group.add_argument("--repeats", type=_positive, metavar="N", help="rounds (default: 3, with --peers 5)")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group = bench.add_argument_group("where and how to compute")
    group.add_argument("--accelerator", metavar="NAME", help="reference, or a plug-in (default: the fastest that can run here)")
    group.add_argument("--threads", type=_positive, metavar="N", help="threads of the accelerator (NumPy's: OMP_NUM_THREADS)")
    group.add_argument("--dtype", metavar="POLICY", help="as for generate")
    group.add_argument("--quantize", choices=("int8", "int4"), help="turn the weights into integers first")
    group.add_argument("--weight-only", action="store_true", help="int8 for the weights alone")
    group = bench.add_argument_group("beside other libraries, on a GPU")
    group.add_argument(
        "--peers",
        action="store_true",
        help="measure refmodels and Transformers in PRESET's shape (default: the shapes that have aims), random weights",
    )
    group.add_argument("--write", metavar="FILE", help="the tables as Markdown (default, without PRESET: accel/bench/gpu.md)")

    accelerators = commands.add_parser(
        "accelerators", help="list what can stand in for the reference", description=_ACCELERATORS
    )
    accelerators.set_defaults(command=accelerators_command)
    accelerators.add_argument("--json", action="store_true", help="print a JSON array")

    compiling = commands.add_parser("compile", help="make an accelerator's kernels ready", description=_COMPILE)
    compiling.set_defaults(command=compile_command)
    _add_accelerator(compiling, threads=False)

    ops = commands.add_parser("ops", help="list the ops, or what an accelerator does for each", description=_OPS)
    ops.set_defaults(command=ops_command)
    ops.add_argument("--accelerator", metavar="NAME", help="say op by op what runs on this plug-in, and why")
    ops.add_argument("--json", action="store_true", help="print JSON")

    check = commands.add_parser("check", help="hold an accelerator to the reference", description=_CHECK, epilog=_CHECKED)
    check.set_defaults(command=check_command)
    check.add_argument("--accelerator", metavar="NAME", required=True, help="a plug-in; reference checks the check")
    check.add_argument(
        "--op", action="append", default=[], metavar="NAME", help="this op or law alone; 'opt_*' are several; may come again"
    )
    check.add_argument("--dtype", action="append", default=[], metavar="TYPE", help="this type alone; may come again")
    check.add_argument("--examples", type=_positive, metavar="N", help="examples of each op in each type")
    check.add_argument("--seed", type=_seed, default=0, metavar="N", help="other examples than those of seed 0")
    check.add_argument("--example", metavar="CODE", help="one example alone: the line to paste of a failure has it")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.add_argument("--junit", metavar="FILE", help="also write FILE in JUnit's form")

    audit = commands.add_parser("audit", help="say where a low type overflows or loses precision", description=_AUDIT)
    audit.set_defaults(command=audit_command)
    audit.add_argument("preset", metavar="PRESET", help="a name that `refmodels presets` lists, a directory or a handle")
    audit.add_argument("--dtype", metavar="TYPE", default="float16", help="float16 or bfloat16 (default: float16)")
    audit.add_argument("--text", metavar="FILE", help="run on the tokens of this text (default: random tokens)")
    audit.add_argument("--tokens", type=_positive, default=64, metavar="N", help="of so many tokens at most (default: 64)")
    audit.add_argument(
        "--target", type=float, metavar="X", help="largest error of the logits, relative to them (default: 8 roundings)"
    )
    audit.add_argument("--json", action="store_true", help="print one JSON object")

    vectors = commands.add_parser("vectors", help="write golden vectors of every op and family", description=_VECTORS)
    vectors.set_defaults(command=vectors_command)
    vectors.add_argument("directory", metavar="DIR", help="where the files are, or are to be")
    vectors.add_argument("--check", action="store_true", help="hold the files of DIR to the reference; writes nothing")
    _add_verify(commands)

    info = commands.add_parser(
        "info", help="describe a preset", description="Describe a preset: arguments, parameters, memory. Reads no weights."
    )
    info.set_defaults(command=info_command)
    info.add_argument("preset", metavar="PRESET", help="a name that `refmodels presets` lists, a directory or a handle")
    info.add_argument("--dtype", metavar="POLICY", help="as if the model were built with this policy")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add_verify(commands: Any) -> None:
    verify = commands.add_parser(
        "verify", help="hold somebody's own model to the reference", description=_VERIFY, epilog=_VERIFIED
    )
    verify.set_defaults(command=verify_command)
    group = verify.add_argument_group("what is verified: one of these")
    group.add_argument(
        "target",
        metavar="TARGET",
        nargs="?",
        help="mypkg.model:build, which gives a function or an object (spec/verification.md); or transformers, keras_hub",
    )
    group.add_argument("--exec", metavar="CMD", help="a command that is given an input and an output file (spec/traces.md)")
    group.add_argument("--dumps", metavar="DIR", help="arrays of one run: safetensors, npy and npz files, or one such file")
    group = verify.add_argument_group("beside what")
    group.add_argument("--like", metavar="PRESET", required=True, help="a preset with the same weights, as for generate")
    group.add_argument("--dtype", metavar="POLICY", help="what it computes in, as for generate (default: as the preset says)")
    group.add_argument("--products", choices=("tf32", "bfloat16"), help="it rounds the inputs of its float32 products so")
    group = verify.add_argument_group("on which inputs")
    group.add_argument("--case", action="append", default=[], metavar="NAME", help="this case alone; may come again")
    group.add_argument("--seed", type=_seed, default=0, metavar="N", help="other tokens than those of seed 0")
    group.add_argument("--inputs", metavar="FILE", help='these instead: safetensors, npz, or JSON: {"token_ids": [[2, 5]]}')
    group = verify.add_argument_group("how it is run")
    group.add_argument("--mapping", metavar="FILE", help="what its arrays are called and how they are laid out (TOML)")
    group.add_argument("--propose", metavar="FILE", help="write a mapping to be read and corrected, and judge nothing")
    group.add_argument(
        "--inject", action="append", default=[], metavar="STEPS", help="CMD goes on with our values there: 'layers.*:add'"
    )
    group.add_argument("--timeout", type=_positive, metavar="SECONDS", help="for one run of CMD (default: 600)")
    group.add_argument(
        "--generate",
        type=_positive,
        metavar="N",
        help="judge N tokens of its own choice, and its best tokens and distributions over a text",
    )
    group.add_argument("--no-laws", dest="laws", action="store_false", help="leave out what needs no reference")
    group = verify.add_argument_group("output")
    group.add_argument("--all-steps", action="store_true", help="show every layer step by step, not the first wrong one alone")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group.add_argument("--junit", metavar="FILE", help="also write FILE in JUnit's form")
    group.add_argument("--html", metavar="FILE", help="also write one self-contained page")
    group.add_argument("--baseline", metavar="FILE", help="fail only for what is worse than in this output of --json")
    group.add_argument("--reproduce", metavar="DIR", help="write the smallest case that is wrong as a script and its arrays")

    one = commands.add_parser("verify-op", help="hold one function to an op", description=_VERIFY_OP, epilog=_VERIFIED_OP)
    one.set_defaults(command=verify_op_command)
    one.add_argument("op", metavar="OP", help="a name that `refmodels ops` lists")
    one.add_argument("function", metavar="FUNCTION", help="mypkg:my_attention, with the op's arguments")
    one.add_argument("--dtype", action="append", default=[], metavar="TYPE", help="default: float32; may come again")
    one.add_argument("--examples", type=_positive, metavar="N", help="examples in each type")
    one.add_argument("--seed", type=_seed, default=0, metavar="N", help="other examples than those of seed 0")
    one.add_argument("--example", metavar="CODE", help="one example alone: the line to paste of a failure has it")
    one.add_argument("--json", action="store_true", help="print one JSON object")

    trace = commands.add_parser("trace", help="write the arrays that a run makes on its way", description=_TRACE)
    trace.set_defaults(command=trace_command)
    trace.add_argument("preset", metavar="PRESET", help="a name that `refmodels presets` lists, a directory or a handle")
    trace.add_argument("-o", "--output", metavar="FILE", required=True, help="the safetensors file to write")
    trace.add_argument("--text", metavar="TEXT", help="the input")
    trace.add_argument("--target", metavar="TEXT", help="T5's answer so far")
    trace.add_argument("--inputs", metavar="FILE", help="the input as ids, as for verify")
    trace.add_argument("--only", action="append", default=[], metavar="STEPS", help="these alone: 'layers.0.*'; may come again")
    trace.add_argument("--seed", type=_seed, default=0, metavar="N", help="of the ids, without --text and --inputs")
    trace.add_argument("--dtype", metavar="POLICY", help="as for generate")


def _add_accelerator(parser: Any, *, threads: bool = True) -> None:
    parser.add_argument(
        "--accelerator", metavar="NAME", help="reference, or a plug-in (default: the fastest that can run here)"
    )
    if threads:
        parser.add_argument("--threads", type=_positive, metavar="N", help="threads that the accelerator uses, if it has any")


_GENERATE = "Continue a text (OPT, BLOOM) or answer it (T5). The text appears as it is generated, except from a beam search."
_SCORE = "Print the log-probability of each token of a text, or of a second text that follows or answers the first."
_CONVERT = "Write a preset, its tokenizer included, in KerasHub's form or in Hugging Face's. DST appears when it is complete."
_BENCH = (
    "Measure prefill and decoding, beside what this machine allows, measured in the same run, and load time, time to the first "
    "token and memory (spec/bench.md). A built-in preset that is not in the package gets random weights in its shape. With "
    "--peers: on a GPU beside Transformers, in one run."
)
_ACCELERATORS = (
    "List the accelerators that are installed, and say which can run here. Without --accelerator, generate and score take the "
    "first that can. Imports each of them."
)
_COMPILE = "Compile what an accelerator would otherwise compile when it is first used, so that no answer waits for that."
_OPS = "List the ops. x[*b n]: an array whose last axis has size n; ?: may be left out; p{}: a tree. Or say what runs each."
_CHECK = (
    "Draw examples of every op and law of models, run them on an accelerator, and hold its results to the reference by the "
    "ops' error models. What is wrong is shown in the smallest example found, with a line to paste that shows it again."
)
_AUDIT = (
    "Run a model in float64 and round, kind of step by kind of step, to a low type; say where it overflows, what rounding does "
    "to the logits, and the cheapest set of steps to keep in float32. Exit status: 0 the target is met so, 1 it is not."
)
_VECTORS = (
    "Write golden vectors, for those who do not run Python: a safetensors file for every op, and traces of a small model of "
    "each family (spec/vectors/README.md). Exit status of --check: 0 all agree, 1 some do not."
)
_CHECKED = "Exit status: 0 right, 1 wrong, 2 cannot be checked here."
_VERIFY = (
    "Run somebody's own T5, OPT or BLOOM beside the reference, and judge every step that it gives by itself: the first step "
    "that is wrong, how wrong against what its type allows, and what the fault is called."
)
_VERIFIED = "Exit status: 0 agrees, 1 diverges, 2 cannot run, 3 inconclusive (each step is right, and what adds up is not)."
_VERIFY_OP = (
    "Hold one function, such as somebody's own attention, to an op by the op's error model, on examples drawn from its shapes."
)
_VERIFIED_OP = "Exit status: 0 right, 1 wrong, 2 cannot be run."
_TRACE = "Run a preset on the reference and write every step as one safetensors file (spec/traces.md)."
_EXAMPLE = 'example: refmodels generate t5_tiny_numbers "spell: 4207"'


# -- generate -------------------------------------------------------------------------------------------------------------


class Stopwatch(Iterator[str]):
    """The pieces of a `TextStream`, timed. The first token ends with the prefill (for T5 with the encoder, too)."""

    def __init__(self, stream: "TextStream") -> None:
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


def generate_command(arguments: argparse.Namespace) -> None:
    """`refmodels generate`."""
    from refmodels.accelerator import REFERENCE
    from refmodels.generate import Request, Sampling
    from refmodels.ops.precision import POLICIES
    from refmodels.presets import locate
    from refmodels.task import Task

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
    prompt = _prompt(arguments.prompt)

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


def chosen_accelerator(arguments: argparse.Namespace) -> "Accelerator | None":
    """What --accelerator and --threads ask for. What was not asked for is named on a terminal."""
    from refmodels.accelerator import find

    settings = {} if arguments.threads is None else {"threads": arguments.threads}
    if arguments.accelerator is not None:
        return find(arguments.accelerator, **settings)
    found = fastest_accelerator(**settings)
    if found is None:
        return find(None, **settings)
    progress(f"running on {found.name}")
    return found


def fastest_accelerator(**settings: Any) -> "Accelerator | None":
    """The first installed accelerator that can run here with these settings, the fastest first; None if only the reference can.
    One that somebody meant to run, and that cannot, is named with the reason on standard error."""
    from refmodels.accelerator import REFERENCE, AcceleratorError, find, installed, plugin

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
                say(f"refmodels: note: accelerator {name!r} does not load and is left out: {_one_line(cause)}")
    for reason in left_out:
        say(f"refmodels: note: {reason}; running on {REFERENCE if chosen is None else chosen.name}")
    return chosen


def fastest_first(names: Iterable[str]) -> list[str]:
    """Names of accelerators in the order in which the command line tries them."""
    names = set(names)
    return [name for name in FASTEST_FIRST if name in names] + sorted(names.difference(FASTEST_FIRST))


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


def _prompt(argument: str) -> str:
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


def peak_memory_mb() -> float | None:
    """The most memory that this process has had, in units of 10**6 bytes; None where the system does not say."""
    from refmodels.machine import peak_memory

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


# -- score ----------------------------------------------------------------------------------------------------------------


def score_command(arguments: argparse.Namespace) -> None:
    """`refmodels score`."""
    from refmodels.presets import locate
    from refmodels.task import Task

    locate(arguments.preset)
    accelerator = chosen_accelerator(arguments)
    prompt = _prompt(arguments.prompt)
    with redirect_stdout(sys.stderr):  # downloads report their progress on either stream
        task = Task.from_preset(arguments.preset, accelerator=accelerator, dtype=arguments.dtype)
    if arguments.target is None and task.backbone.family == "t5":
        raise ValueError("T5 answers a text: TARGET, the answer to score, is missing")
    score = task.score(prompt, arguments.target)
    tokens, log_probs = score.token_ids[0].tolist(), score.log_probs[0].tolist()
    pieces = [task.tokenizer.id_to_token(token) for token in tokens]
    total, perplexity = float(score.total[0]), None if not tokens else float(score.perplexity[0])
    if arguments.json:
        inputs = {"preset": arguments.preset, "text": prompt, "target": arguments.target}
        print_json({**inputs, "tokens": tokens, "log_probs": log_probs, "total": total, "perplexity": perplexity})
        return
    rows = [(f"{log_prob:.4f}", piece) for log_prob, piece in zip(log_probs, pieces, strict=True)]
    summary = f"{len(tokens)} tokens" + ("" if perplexity is None else f", perplexity {perplexity:.4g}")
    for line in aligned([*rows, (f"{total:.4f}", summary)], right=(0,)):
        print(line)


# -- bench ----------------------------------------------------------------------------------------------------------------


def bench_command(arguments: argparse.Namespace) -> None:
    """`refmodels bench`."""
    from refmodels.accelerator import find
    from refmodels.cli.bench import print_bench
    from refmodels.cli.bench_peers import print_peers

    accelerator = fastest_accelerator() if arguments.accelerator is None else find(arguments.accelerator)
    (print_peers if arguments.peers else print_bench)(arguments, accelerator)


# -- accelerators ---------------------------------------------------------------------------------------------------------


def ops_command(arguments: argparse.Namespace) -> None:
    """`refmodels ops`."""
    from refmodels.cli.ops import print_coverage, print_ops

    if arguments.accelerator is None:
        print_ops(as_json=arguments.json)
    else:
        print_coverage(arguments.accelerator, as_json=arguments.json)


def accelerators_command(arguments: argparse.Namespace) -> None:
    """`refmodels accelerators`."""
    from refmodels.accelerator import installed
    from refmodels.cli.ops import print_accelerators

    print_accelerators(fastest_first(installed()), as_json=arguments.json)


def check_command(arguments: argparse.Namespace) -> int:
    """`refmodels check`."""
    from refmodels.cli.check import check

    options = {name: getattr(arguments, name) for name in ("examples", "example", "junit")}
    return check(
        arguments.accelerator,
        ops=arguments.op,
        dtypes=arguments.dtype,
        seed=arguments.seed,
        as_json=arguments.json,
        **options,
    )


def audit_command(arguments: argparse.Namespace) -> int:
    """`refmodels audit`."""
    from refmodels.cli.audit import print_audit

    options = {name: getattr(arguments, name) for name in ("text", "tokens", "target")}
    return print_audit(arguments.preset, arguments.dtype, as_json=arguments.json, **options)


def vectors_command(arguments: argparse.Namespace) -> int:
    """`refmodels vectors`."""
    from refmodels.cli.vectors import vectors

    return vectors(arguments.directory, check=arguments.check)


def verify_command(arguments: argparse.Namespace) -> int:
    """`refmodels verify`."""
    from refmodels.cli import verify

    return verify.verify_command(arguments)


def verify_op_command(arguments: argparse.Namespace) -> int:
    """`refmodels verify-op`."""
    from refmodels.cli import verify

    return verify.verify_op_command(arguments)


def trace_command(arguments: argparse.Namespace) -> None:
    """`refmodels trace`."""
    from refmodels.cli import verify

    verify.trace_command(arguments)


def compile_command(arguments: argparse.Namespace) -> None:
    """`refmodels compile`."""
    from refmodels.accelerator import find
    from refmodels.cli.ops import compile_kernels

    compile_kernels(fastest_accelerator() if arguments.accelerator is None else find(arguments.accelerator))


# -- presets --------------------------------------------------------------------------------------------------------------


def presets_command(arguments: argparse.Namespace) -> None:
    """`refmodels presets`."""
    from refmodels.presets import MODELS, preset_info, preset_names

    infos = [preset_info(name) for name in preset_names()]
    for info in infos:
        info["parameter_count"] = info["parameter_count"] or MODELS[info["class"]](**info["config"]).count_params()
    infos.sort(key=lambda info: (info["kaggle_handle"] is not None, info["class"], info["parameter_count"]))
    if arguments.json:
        print_json([{**info, "weights_bytes": _weights_bytes(info)} for info in infos])
        return
    rows = [("NAME", "CLASS", "PARAMETERS", "WEIGHTS", "", "WHERE")]
    for info in infos:
        size, where = _weights_bytes(info), info["kaggle_handle"] or "shipped"
        dtype = info["weights_dtype"] or "-"
        count = f"{info['parameter_count']:,}"
        rows.append((info["name"], info["class"], count, "" if size is None else byte_size(size), dtype, where))
    lines = aligned(rows, right=(2, 3))
    print(lines[0])
    for line, info in zip(lines[1:], infos, strict=True):
        print(line)
        if info["description"]:
            print(textwrap.fill(info["description"], WIDTH, initial_indent="    ", subsequent_indent="    "))


def _weights_bytes(info: Mapping[str, Any]) -> int | None:
    """Bytes of the weights in their file; None if the type there is not recorded."""
    itemsize = BYTES.get(info["weights_dtype"])
    return None if itemsize is None else int(info["parameter_count"]) * itemsize


# -- info -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerRow:
    """A layer of the parameter table, or the same one in several consecutive blocks: `layers.0..11.layer_norm`."""

    name: str
    shapes: list[tuple[int, ...]]
    times: int

    @property
    def each(self) -> int:
        """Parameters in one of them."""
        return sum(map(math.prod, self.shapes))


def info_command(arguments: argparse.Namespace) -> None:
    """`refmodels info`."""
    from refmodels.backbone import Backbone
    from refmodels.parameters import stored_bytes
    from refmodels.presets import locate, preset_info, preset_names

    located = locate(arguments.preset)
    with redirect_stdout(sys.stderr):
        backbone = Backbone.from_preset(arguments.preset, load_weights=False, dtype=arguments.dtype)
    known = preset_info(arguments.preset) if arguments.preset in preset_names() else {}
    table, count, kv = layer_rows(backbone.parameters()), backbone.count_params(), cache_values_per_token(backbone)
    stored = {name: stored_bytes(backbone.parameters(), name) for name in {*_COMPARED, backbone.variable_dtype}}
    weights, cache = stored[backbone.variable_dtype], BYTES[backbone.compute_dtype]
    memory = {name: {"weights_bytes": stored[name], "kv_cache_bytes_per_token": kv * BYTES[name]} for name in _COMPARED}
    where = located.handle or ("shipped with refmodels" if known else str(located.directory))
    if arguments.json:
        print_json(
            {
                "preset": arguments.preset,
                "class": type(backbone).__name__,
                "description": known.get("description", ""),
                "where": where,
                "config": backbone.get_config(),
                "parameters": [{"name": r.name, "shapes": r.shapes, "times": r.times, "each": r.each} for r in table],
                "parameter_count": count,
                "weights_bytes": weights,
                "kv_cache_bytes_per_token": kv * cache,
                "memory": memory,
            }
        )
        return
    print(f"{arguments.preset}: {type(backbone).__name__}, {count:,} parameters, {where}")
    if known.get("description"):
        print(textwrap.fill(known["description"], WIDTH))
    print("\nArguments")
    config, how = backbone.get_config(), backbone.quantization
    if how is not None:  # else a policy for each layer
        config["dtype"] = f"{how.keras_mode}_from_{backbone.config.dtype}"
    print_rows([(name, "None" if value is None else str(value)) for name, value in config.items()])
    print("\nParameters")
    rows = [("LAYER", "PARAMETERS", "EACH", "SHAPES")]
    rows += [(row.name, f"{row.each * row.times:,}", f"{row.each:,}", _shapes(row.shapes)) for row in table]
    print_rows([*rows, ("total", f"{count:,}", "", "")], right=(1, 2))
    print("\nMemory")
    rows = [("DTYPE", "WEIGHTS", "KEYS AND VALUES", "")]
    rows += [(name, byte_size(stored[name]), f"{kv * BYTES[name]:,} bytes a token", "") for name in _COMPARED]
    policy = backbone.config.dtype
    if policy not in _COMPARED:
        rows.append((policy, byte_size(weights), f"{kv * cache:,} bytes a token", ""))
    rows = [(*row[:3], "this preset" if row[0] == policy else "") for row in rows]
    print_rows(rows, right=(1, 2))


_COMPARED = ("float32", "float16", "bfloat16")


def layer_rows(parameters: Iterable["Parameter"]) -> list[LayerRow]:
    """The parameters layer by layer, in order; consecutive numbered blocks that are alike are one."""
    blocks: list[tuple[str, int, list[tuple[str, tuple[int, ...]]]]] = []  # stack, number (or -1), contents
    for (stack, number), group in groupby(parameters, key=lambda parameter: _block(parameter.path)):
        start = len(f"{stack}.{number}.") if number >= 0 else 0
        blocks.append((stack, number, [(parameter.path[start:], parameter.shape) for parameter in group]))
    rows = []
    # Blocks that are alike: the same stack, consecutive numbers, the same contents.
    alike = groupby(enumerate(blocks), key=lambda entry: (entry[1][0], entry[1][1] < 0 or entry[0] - entry[1][1], entry[1][2]))
    for (stack, *_), run in alike:
        members = [block for _, block in run]
        first, last = members[0][1], members[-1][1]
        numbers = str(first) if first == last else f"{first}..{last}"
        prefix = f"{stack}.{numbers}." if first >= 0 else ""
        for layer, leaves in groupby(members[0][2], key=lambda leaf: leaf[0].rpartition(".")[0]):
            rows.append(LayerRow(prefix + layer, [shape for _, shape in leaves], len(members)))
    return rows


def _block(path: str) -> tuple[str, int]:
    """The stack and the number of a parameter's block: `encoder.layers`, 3. Outside of any: "", -1."""
    match = re.match(r"(.*?)\.(\d+)\.", path)
    return ("", -1) if match is None else (match[1], int(match[2]))


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return " ".join(str(shape).replace(" ", "") for shape in shapes)


def cache_values_per_token(backbone: "Backbone") -> int:
    """Numbers that a key/value cache holds for one token: a key and a value for each head of each decoder layer."""
    config = backbone.config
    return int(2 * config.num_layers * config.num_heads * config.head_dim)


# -- convert --------------------------------------------------------------------------------------------------------------


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


def convert_command(arguments: argparse.Namespace) -> None:
    """`refmodels convert`."""
    from refmodels.convert import convert

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
