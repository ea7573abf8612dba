"""What each command takes: its arguments, their help, and what is wrong with them in one line.

A command is a function here and a module beside this one, which is imported only when the command is asked for.
"""

import argparse
import re
from typing import Any, NoReturn

from refmodels import __version__
from refmodels.cli.errors import USAGE
from refmodels.generate import SAMPLERS
from refmodels.printing import say

DEFAULT_NEW_TOKENS = 128
PRESET = "a name that `refmodels presets` lists, a directory or a handle"


def command_line() -> argparse.ArgumentParser:
    """What parses all of it; the name of the command is the `command` of the result."""
    parser = Parser(prog="refmodels", description="T5, OPT and BLOOM: the NumPy reference, and accelerators that keep to it.")
    parser.add_argument("--version", action="version", version=f"refmodels {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True, parser_class=Parser)
    for add in (  # as --help lists them
        _generate,
        _score,
        _presets,
        _convert,
        _bench,
        _accelerators,
        _compile,
        _ops,
        _check,
        _audit,
        _vectors,
        _verify,
        _verify_op,
        _trace,
        _info,
    ):
        add(commands)
    return parser


class Parser(argparse.ArgumentParser):
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

    def _print_message(self, message: str, file: Any = None) -> None:
        # That of argparse passes over a text that it could not write, in some versions of Python; in others it does not.
        if file is not None:  # which standard output is if it was closed before we began
            file.write(message)

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


def _accelerator_options(parser: Any, *, threads: bool = True) -> None:
    parser.add_argument(
        "--accelerator", metavar="NAME", help="reference, or a plug-in (default: the fastest that can run here)"
    )
    if threads:
        parser.add_argument("--threads", type=_positive, metavar="N", help="threads that the accelerator uses, if it has any")


def _generate(commands: Any) -> None:
    command = commands.add_parser(
        "generate",
        help="continue or answer a text",
        description=(
            "Continue a text (OPT, BLOOM) or answer it (T5). The text appears as it is generated, except from a beam search."
        ),
        epilog='example: refmodels generate t5_tiny_numbers "spell: 4207"',
    )
    command.add_argument("preset", metavar="PRESET", help=PRESET)
    command.add_argument("prompt", metavar="PROMPT", nargs="?", default="-", help="the text; standard input if left out or -")
    group = command.add_argument_group("length")
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
    group = command.add_argument_group("choice of the next token")
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
    group = command.add_argument_group("output")
    group.add_argument("--strip-prompt", action="store_true", help="print only what is new")
    group.add_argument("--no-stream", action="store_true", help="print the text when it is complete")
    several = "print N draws or the N best beams, with a blank line between them"
    group.add_argument("--num-return-sequences", type=_positive, metavar="N", help=several)
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group.add_argument("--stats", action="store_true", help="report time and memory on standard error")
    group = command.add_argument_group("where and how to compute")
    _accelerator_options(group)
    group.add_argument("--dtype", metavar="POLICY", help="float32, float16, bfloat16, float64, mixed_float16, mixed_bfloat16")


def _score(commands: Any) -> None:
    command = commands.add_parser(
        "score",
        help="say how likely a text is",
        description="Print the log-probability of each token of a text, or of a second text that follows or answers the first.",
    )
    command.add_argument("preset", metavar="PRESET", help=PRESET)
    command.add_argument("prompt", metavar="TEXT", help="the text; standard input if it is -")
    command.add_argument("target", metavar="TARGET", nargs="?", help="score this alone: what follows TEXT, or answers it (T5)")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    _accelerator_options(command)
    command.add_argument("--dtype", metavar="POLICY", help="as for generate")


def _presets(commands: Any) -> None:
    command = commands.add_parser("presets", help="list the built-in presets", description="List the built-in presets.")
    command.add_argument("--json", action="store_true", help="print a JSON array")


def _convert(commands: Any) -> None:
    command = commands.add_parser(
        "convert",
        help="write a preset in KerasHub's or in Hugging Face's form",
        description=(
            "Write a preset, its tokenizer included, in KerasHub's form or in Hugging Face's. DST appears when it is complete."
        ),
    )
    command.add_argument("source", metavar="SRC", help=PRESET)
    command.add_argument("target", metavar="DST", help="the directory to write")
    command.add_argument("--to", choices=("keras", "hf"), required=True, help="KerasHub's form or Hugging Face's")
    command.add_argument("--dtype", metavar="TYPE", help="float32, float16 or bfloat16 (default: the type in the weight file)")
    command.add_argument(
        "--max-shard-size", type=float, metavar="GIB", help="largest weight file (default: 10 for keras, 5 for hf)"
    )
    command.add_argument("--dequantize", action="store_true", help="write int8 or int4 weights as the numbers they stand for")
    command.add_argument("--force", action="store_true", help="replace DST as a whole, when all is written")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _bench(commands: Any) -> None:
    command = commands.add_parser(
        "bench",
        help="measure speed and memory beside the hardware's limits",
        description=(
            "Measure prefill and decoding, beside what this machine allows, measured in the same run, and load time, time to "
            "the first token and memory (spec/bench.md). A built-in preset that is not in the package gets random weights in "
            "its shape. With --peers: on a GPU beside Transformers, in one run."
        ),
    )
    command.add_argument("preset", metavar="PRESET", nargs="?", help="as for generate (default: opt_125m_en, random weights)")
    command.add_argument(
        "--random", action="store_true", help="random weights in the preset's shape; nothing is downloaded for a built-in"
    )
    group = command.add_argument_group("what to measure")
    group.add_argument("--prompt-length", type=_positive, metavar="N", help="tokens of a prompt (default: 512)")
    group.add_argument("--new-tokens", type=_positive, metavar="N", help="tokens to decode (default: 64)")
    group.add_argument("--batch", type=_batches, metavar="N,...", help="rows at once (default: 1,8)")
    group.add_argument("--repeats", type=_positive, metavar="N", help="rounds (default: 3, with --peers 5)")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group = command.add_argument_group("where and how to compute")
    group.add_argument("--accelerator", metavar="NAME", help="reference, or a plug-in (default: the fastest that can run here)")
    group.add_argument("--threads", type=_positive, metavar="N", help="threads of the accelerator (NumPy's: OMP_NUM_THREADS)")
    group.add_argument("--dtype", metavar="POLICY", help="as for generate")
    group.add_argument("--quantize", choices=("int8", "int4"), help="turn the weights into integers first")
    group.add_argument("--weight-only", action="store_true", help="int8 for the weights alone")
    group = command.add_argument_group("beside other libraries, on a GPU")
    group.add_argument(
        "--peers",
        action="store_true",
        help="measure refmodels and Transformers in PRESET's shape (default: the shapes that have aims), random weights",
    )
    group.add_argument("--write", metavar="FILE", help="the tables as Markdown (default, without PRESET: accel/bench/gpu.md)")


def _accelerators(commands: Any) -> None:
    command = commands.add_parser(
        "accelerators",
        help="list what can stand in for the reference",
        description=(
            "List the accelerators that are installed, and say which can run here. Without --accelerator, generate and score "
            "take the first that can. Imports each of them."
        ),
    )
    command.add_argument("--json", action="store_true", help="print a JSON array")


def _compile(commands: Any) -> None:
    command = commands.add_parser(
        "compile",
        help="make an accelerator's kernels ready",
        description=(
            "Compile what an accelerator would otherwise compile when it is first used, so that no answer waits for that."
        ),
    )
    _accelerator_options(command, threads=False)


def _ops(commands: Any) -> None:
    command = commands.add_parser(
        "ops",
        help="list the ops, or what an accelerator does for each",
        description=(
            "List the ops. x[*b n]: an array whose last axis has size n; ?: may be left out; p{}: a tree. Or say what runs "
            "each."
        ),
    )
    command.add_argument("--accelerator", metavar="NAME", help="say op by op what runs on this plug-in, and why")
    command.add_argument("--json", action="store_true", help="print JSON")


def _check(commands: Any) -> None:
    command = commands.add_parser(
        "check",
        help="hold an accelerator to the reference",
        description=(
            "Draw examples of every op and law of models, run them on an accelerator, and hold its results to the reference "
            "by the ops' error models. What is wrong is shown in the smallest example found, with a line to paste that shows "
            "it again."
        ),
        epilog="Exit status: 0 right, 1 wrong, 2 cannot be checked here.",
    )
    command.add_argument("--accelerator", metavar="NAME", required=True, help="a plug-in; reference checks the check")
    command.add_argument(
        "--op", action="append", default=[], metavar="NAME", help="this op or law alone; 'opt_*' are several; may come again"
    )
    command.add_argument("--dtype", action="append", default=[], metavar="TYPE", help="this type alone; may come again")
    command.add_argument("--examples", type=_positive, metavar="N", help="examples of each op in each type")
    command.add_argument("--seed", type=_seed, default=0, metavar="N", help="other examples than those of seed 0")
    command.add_argument("--example", metavar="CODE", help="one example alone: the line to paste of a failure has it")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("--junit", metavar="FILE", help="also write FILE in JUnit's form")


def _audit(commands: Any) -> None:
    command = commands.add_parser(
        "audit",
        help="say where a low type overflows or loses precision",
        description=(
            "Run a model in float64 and round, kind of step by kind of step, to a low type; say where it overflows, what "
            "rounding does to the logits, and the cheapest set of steps to keep in float32. Exit status: 0 the target is met "
            "so, 1 it is not."
        ),
    )
    command.add_argument("preset", metavar="PRESET", help=PRESET)
    command.add_argument("--dtype", metavar="TYPE", default="float16", help="float16 or bfloat16 (default: float16)")
    command.add_argument("--text", metavar="FILE", help="run on the tokens of this text (default: random tokens)")
    command.add_argument("--tokens", type=_positive, default=64, metavar="N", help="of so many tokens at most (default: 64)")
    command.add_argument(
        "--target", type=float, metavar="X", help="largest error of the logits, relative to them (default: 8 roundings)"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _vectors(commands: Any) -> None:
    command = commands.add_parser(
        "vectors",
        help="write golden vectors of every op and family",
        description=(
            "Write golden vectors, for those who do not run Python: a safetensors file for every op, and traces of a small "
            "model of each family (spec/vectors/README.md). Exit status of --check: 0 all agree, 1 some do not."
        ),
    )
    command.add_argument("directory", metavar="DIR", help="where the files are, or are to be")
    command.add_argument("--check", action="store_true", help="hold the files of DIR to the reference; writes nothing")


def _verify(commands: Any) -> None:
    command = commands.add_parser(
        "verify",
        help="hold somebody's own model to the reference",
        description=(
            "Run somebody's own T5, OPT or BLOOM beside the reference, and judge every step that it gives by itself: the "
            "first step that is wrong, how wrong against what its type allows, and what the fault is called."
        ),
        epilog="Exit status: 0 agrees, 1 diverges, 2 cannot run, 3 inconclusive (each step is right, and what adds up is not).",
    )
    group = command.add_argument_group("what is verified: one of these")
    group.add_argument(
        "target",
        metavar="TARGET",
        nargs="?",
        help="mypkg.model:build, which gives a function or an object (spec/verification.md); or transformers, keras_hub",
    )
    group.add_argument("--exec", metavar="CMD", help="a command that is given an input and an output file (spec/traces.md)")
    group.add_argument("--dumps", metavar="DIR", help="arrays of one run: safetensors, npy and npz files, or one such file")
    group = command.add_argument_group("beside what")
    group.add_argument("--like", metavar="PRESET", required=True, help="a preset with the same weights, as for generate")
    group.add_argument("--dtype", metavar="POLICY", help="what it computes in, as for generate (default: as the preset says)")
    group.add_argument("--products", choices=("tf32", "bfloat16"), help="it rounds the inputs of its float32 products so")
    group = command.add_argument_group("on which inputs")
    group.add_argument("--case", action="append", default=[], metavar="NAME", help="this case alone; may come again")
    group.add_argument("--seed", type=_seed, default=0, metavar="N", help="other tokens than those of seed 0")
    group.add_argument("--inputs", metavar="FILE", help='these instead: safetensors, npz, or JSON: {"token_ids": [[2, 5]]}')
    group = command.add_argument_group("how it is run")
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
    group = command.add_argument_group("output")
    group.add_argument("--all-steps", action="store_true", help="show every layer step by step, not the first wrong one alone")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group.add_argument("--junit", metavar="FILE", help="also write FILE in JUnit's form")
    group.add_argument("--html", metavar="FILE", help="also write one self-contained page")
    group.add_argument("--baseline", metavar="FILE", help="fail only for what is worse than in this output of --json")
    group.add_argument("--reproduce", metavar="DIR", help="write the smallest case that is wrong as a script and its arrays")


def _verify_op(commands: Any) -> None:
    command = commands.add_parser(
        "verify-op",
        help="hold one function to an op",
        description=(
            "Hold one function, such as somebody's own attention, to an op by the op's error model, on examples drawn from "
            "its shapes."
        ),
        epilog="Exit status: 0 right, 1 wrong, 2 cannot be run.",
    )
    command.add_argument("op", metavar="OP", help="a name that `refmodels ops` lists")
    command.add_argument("function", metavar="FUNCTION", help="mypkg:my_attention, with the op's arguments")
    command.add_argument("--dtype", action="append", default=[], metavar="TYPE", help="default: float32; may come again")
    command.add_argument("--examples", type=_positive, metavar="N", help="examples in each type")
    command.add_argument("--seed", type=_seed, default=0, metavar="N", help="other examples than those of seed 0")
    command.add_argument("--example", metavar="CODE", help="one example alone: the line to paste of a failure has it")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _trace(commands: Any) -> None:
    command = commands.add_parser(
        "trace",
        help="write the arrays that a run makes on its way",
        description="Run a preset on the reference and write every step as one safetensors file (spec/traces.md).",
    )
    command.add_argument("preset", metavar="PRESET", help=PRESET)
    command.add_argument("-o", "--output", metavar="FILE", required=True, help="the safetensors file to write")
    command.add_argument("--text", metavar="TEXT", help="the input")
    command.add_argument("--target", metavar="TEXT", help="T5's answer so far")
    command.add_argument("--inputs", metavar="FILE", help="the input as ids, as for verify")
    command.add_argument(
        "--only", action="append", default=[], metavar="STEPS", help="these alone: 'layers.0.*'; may come again"
    )
    command.add_argument("--seed", type=_seed, default=0, metavar="N", help="of the ids, without --text and --inputs")
    command.add_argument("--dtype", metavar="POLICY", help="as for generate")


def _info(commands: Any) -> None:
    command = commands.add_parser(
        "info", help="describe a preset", description="Describe a preset: arguments, parameters, memory. Reads no weights."
    )
    command.add_argument("preset", metavar="PRESET", help=PRESET)
    command.add_argument("--dtype", metavar="POLICY", help="as if the model were built with this policy")
    command.add_argument("--json", action="store_true", help="print one JSON object")
