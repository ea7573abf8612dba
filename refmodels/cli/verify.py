"""`refmodels verify`, `trace` and `verify-op`: somebody else's implementation beside the reference (`spec/verification.md`)."""

import argparse
import os
import platform
import shlex
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refmodels import __version__
from refmodels.accelerator import AcceleratorError
from refmodels.backbone import Backbone
from refmodels.numerics import Verdict
from refmodels.op import Array
from refmodels.printing import aligned, print_json, printable, progress, say
from refmodels.verification.candidate import CandidateError
from refmodels.verification.verify import (
    AGREES,
    CANNOT_RUN,
    DIVERGES,
    INCONCLUSIVE,
    Case,
    LawResult,
    Verification,
    cases,
    verify,
)

if TYPE_CHECKING:
    from refmodels.verification.forms import Form
    from refmodels.verification.judgement import Step

VERDICTS = {AGREES: "agrees", DIVERGES: "diverges", CANNOT_RUN: "cannot run", INCONCLUSIVE: "inconclusive"}
"""Exit status -> what it means."""

LONGEST_LINE = 2000
"""Characters of a line that a foreign function had a part in."""


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


def verify_command(arguments: argparse.Namespace) -> int:
    """`refmodels verify`."""
    with cannot_run(), ExitStack() as stack:
        check_files(arguments)
        with stdout_aside():  # whatever a candidate prints, and downloads
            model = loaded(arguments.like, arguments.dtype)
            form = form_of(arguments, model, stack)
            if arguments.propose is not None:
                text = proposal(form, model, arguments)
            else:
                rebuild = partial(form_of, arguments, stack=stack) if form.takes_checkpoint else None
                verification = outcome(form, model, tried_cases(arguments, model, form), arguments, rebuild)
        if arguments.propose is not None:
            _write_text(Path(arguments.propose), text)
            print(f"{arguments.propose}: read it, correct it, then give it as --mapping", flush=True)
            return AGREES
        return shown(verification, arguments)


def check_files(arguments: argparse.Namespace) -> None:
    """Say before the run what would fail only after it: a baseline that is none, a place that nothing can be written to."""
    from refmodels.verification.report import read_baseline

    if arguments.baseline is not None:
        read_baseline(arguments.baseline)
    if arguments.propose is not None and Path(arguments.propose).exists():
        raise FileExistsError(f"{arguments.propose} is there already: a proposal replaces no file")
    for path in filter(None, (arguments.propose, arguments.junit, arguments.html)):
        if not Path(path).parent.is_dir():
            raise FileNotFoundError(f"{path}: {Path(path).parent} is no directory")
        if Path(path).is_dir():
            raise ValueError(f"{path}: a directory, wanted the file to write")
    if arguments.reproduce is not None and Path(arguments.reproduce).exists() and not Path(arguments.reproduce).is_dir():
        raise NotADirectoryError(f"{arguments.reproduce}: a file, wanted the directory to write to")


def form_of(arguments: argparse.Namespace, model: Backbone, stack: ExitStack) -> "Form":
    """The candidate that the arguments say; what it holds is given up with the stack."""
    from refmodels.verification import forms
    from refmodels.verification.mapping import NameMap
    from refmodels.verification.replay import step_names

    given = [arguments.target, arguments.exec, arguments.dumps]
    if sum(value is not None for value in given) != 1:
        raise CandidateError("wanted one of TARGET, --exec and --dumps")
    names = None if arguments.mapping is None else NameMap.read(arguments.mapping)
    options: dict[str, Any] = {"names": names, "products": arguments.products or ""}
    checkpoint = checkpoint_writer(model, stack)
    form: forms.Form
    if arguments.inject and arguments.exec is None:
        raise CandidateError("--inject is for --exec: an object says by itself at which steps it can be given our values")
    if arguments.exec is not None:
        steps = step_names(model, cases(model)[0].inputs) if arguments.inject else ()
        injects = frozenset(step for step in steps if any(fnmatchcase(step, wanted) for wanted in arguments.inject))
        if arguments.inject and not injects:
            raise CandidateError(f"--inject {arguments.inject[0]}: no step has such a name; ours begin with {_some(steps)}")
        form = forms.ProcessForm(
            arguments.exec, model, checkpoint, injects=injects, timeout=arguments.timeout or forms.TIMEOUT, **options
        )
    elif arguments.dumps is not None:
        inputs = None if arguments.inputs is None else forms.read_inputs(arguments.inputs, model)
        form = forms.DumpsForm(arguments.dumps, model, inputs, **options)
    else:
        form = forms.python_form(arguments.target, model, checkpoint, **options)
    stack.callback(form.close)
    return form


def tried_cases(arguments: argparse.Namespace, model: Backbone, form: "Form") -> list[Case]:
    """The inputs to try: those that are given, those of the dumps, or our own."""
    from refmodels.verification.forms import DumpsForm, read_inputs

    if isinstance(form, DumpsForm):
        return [Case(Path(form.name).name, form.inputs)]
    if arguments.inputs is not None:
        return [Case(Path(arguments.inputs).name, read_inputs(arguments.inputs, model))]
    known = cases(model, arguments.seed)
    if not arguments.case:
        return known
    names = [case.name for case in known]
    unknown = next((name for name in arguments.case if name not in names), None)
    if unknown is not None:
        raise CandidateError(f"no case is named {unknown!r}: they are {', '.join(map(repr, names))}")
    return [case for case in known if case.name in arguments.case]


def outcome(
    form: "Form",
    model: Backbone,
    tried: Sequence[Case],
    arguments: argparse.Namespace,
    rebuild: "Callable[[Backbone], Form] | None" = None,
) -> Verification:
    """Judge the steps, then the laws; CandidateError if nothing at all was judged."""
    from refmodels.verification.forms import DumpsForm

    if arguments.generate is not None:  # said before any work
        if isinstance(form, DumpsForm):
            raise CandidateError("--generate: dumps are of one run and cannot be asked for another")
        from refmodels.verification.generations import check_room

        check_room(model, model.checked(tried[0].inputs), arguments.generate)
    at = ""
    said: set[str] = set()

    def arrived(case: str, step: "Step") -> None:
        nonlocal at
        if case != at:
            at = case
            progress(f"judging case {case!r}")
        if not step.ok and case not in said:
            said.add(case)
            progress(f"case {case!r}: {step.local.reason}")

    verification = verify(form, model, tried, progress=arrived)
    for result in verification.cases:
        form.check_names(result.report)
        if not any(step.judged for step in result.report.steps):
            raise CandidateError(f"case {result.case.name!r}: nothing was judged: everything in it is padding")
    if not isinstance(form, DumpsForm) and arguments.laws:
        from refmodels.verification.laws import check_laws

        laws = check_laws(form, model, seed=arguments.seed, progress=lambda law: progress(f"law {law.name!r}"))
        verification = replace(verification, laws=laws)
    if arguments.generate is not None:
        progress("judging a generation")
        verification = replace(verification, laws=(*verification.laws, *generated(form, model, tried, arguments.generate)))
    if arguments.reproduce is not None and verification.first is not None:
        from refmodels.verification.shrink import reproduce

        script = reproduce(form, model, verification, arguments.reproduce, spec=form.spec, rebuild=rebuild, progress=progress)
        say(f"refmodels: {script}: run this to see it again")
    return verification


def generated(form: "Form", model: Backbone, tried: Sequence[Case], count: int) -> list[LawResult]:
    """What it chooses after the first case, and what it thinks of the last: each choice is right, a tie, or a defect."""
    from refmodels.verification.generations import GenerationResult, TextResult, judge_generation, judge_text

    def law(name: str, result: GenerationResult | TextResult) -> LawResult:
        said = str(result)
        if result.status == INCONCLUSIVE:
            return LawResult(name, None, said)
        return LawResult(name, Verdict(result.status == AGREES, f"{name}: {said}"), said)

    return [
        law(f"generation of {count} tokens", judge_generation(form, model, tried[0].inputs, count)),
        law("best tokens of a text", judge_text(form, model, tried[-1].inputs)),
    ]


def shown(verification: Verification, arguments: argparse.Namespace) -> int:
    """Print and write what is asked for; the exit status."""
    from refmodels.verification.report import as_json, excused_by, read_baseline, table, worse_than, write_junit

    status, worse, excused = verification.status, [], {}
    if arguments.baseline is not None:
        baseline = read_baseline(arguments.baseline)
        worse = worse_than(verification, baseline)
        excused = excused_by(baseline, worse)
        status = DIVERGES if worse else AGREES
    if arguments.junit is not None:
        write_junit(verification, arguments.junit, excused=excused)
    if arguments.html is not None:
        from refmodels.verification.html import write_html

        write_html(verification, arguments.html, command=shlex.join(["refmodels", *sys.argv[1:]]))
    if arguments.json:
        found = as_json(verification)
        print_json(found if arguments.baseline is None else {**found, "worse": [str(entry) for entry in worse]})
        return status
    print(table(verification, all_steps=arguments.all_steps), flush=True)
    for law in verification.laws if arguments.generate is not None else ():
        if law.verdict is not None and law.reason:
            print(f"\n{law.name}: {law.reason}", flush=True)
    if arguments.baseline is not None:
        print(
            "\n".join([f"\nworse than {arguments.baseline}:", *map(str, worse)] if worse else ["\nno worse than the baseline"])
        )
    return status


def proposal(form: "Form", model: Backbone, arguments: argparse.Namespace) -> str:
    """The text of a mapping file for what the candidate gives: on inputs that tell most, unless others are asked for."""
    from refmodels.verification.forms import DumpsForm
    from refmodels.verification.propose import proposed, telling_inputs

    chosen = arguments.case or arguments.inputs is not None or isinstance(form, DumpsForm)
    inputs = tried_cases(arguments, model, form)[0].inputs if chosen else telling_inputs(model, arguments.seed)
    inputs = model.checked(inputs)
    return proposed(form.raw(inputs), model, inputs, form.name)


def checkpoint_writer(model: Backbone, stack: ExitStack) -> Callable[[], Path]:
    """Gives a directory with the weights as Hugging Face's files, written when it is first asked for."""

    @cache
    def write() -> Path:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="refmodels-"))) / "checkpoint"
        progress("writing the weights for the candidate")
        model.save_to_hf(place)
        return place

    return write


# -- trace ------------------------------------------------------------------------------------------------------------------


def trace_command(arguments: argparse.Namespace) -> None:
    """`refmodels trace`."""
    from refmodels.trace import traced

    with stdout_aside():
        model = loaded(arguments.preset, arguments.dtype)
        inputs = trace_inputs(arguments, model)
        t = traced(model, inputs, lambda name: not arguments.only or any(fnmatchcase(name, only) for only in arguments.only))
    if not t.steps:
        raise ValueError(f"--only {arguments.only[0]}: no step has such a name: without it, every step is written")
    t.inputs = inputs
    t.facts = {
        "source": "refmodels",
        "refmodels": __version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "preset": str(arguments.preset),
        "family": model.family,
        "dtype": str(model.config.dtype),
    }
    t.save(arguments.output)
    print(f"{arguments.output}: {len(t)} steps", flush=True)


def trace_inputs(arguments: argparse.Namespace, model: Backbone) -> dict[str, Array]:
    """The inputs of a trace: of a text, of a file, or of one of our own cases."""
    from refmodels.verification.forms import read_inputs

    if arguments.text is not None and arguments.inputs is not None:
        raise ValueError("--text and --inputs are two ways to say one thing: give one of them")
    if arguments.target is not None and (arguments.text is None or model.family != "t5"):
        raise ValueError("--target is what T5 is to answer to --text")
    if arguments.inputs is not None:
        return read_inputs(arguments.inputs, model)
    if arguments.text is None:
        return dict(cases(model, arguments.seed)[0].inputs)
    return text_inputs(arguments.preset, model, arguments.text, arguments.target)


def text_inputs(preset: str, model: Backbone, text: str, target: str | None) -> dict[str, Array]:
    """One row of tokens: of a text, and for T5 of its answer so far."""
    from refmodels.preprocessors import CausalLMPreprocessor, T5Seq2SeqLMPreprocessor

    longest = getattr(model.config, "max_sequence_length", None) or 4096
    if model.family == "t5":
        preprocessor = T5Seq2SeqLMPreprocessor.from_preset(preset)
        both = {"encoder_text": [text], "decoder_text": [target or ""]}
        found = preprocessor.generate_preprocess(both, sequence_length=longest)
    else:
        found = CausalLMPreprocessor.from_preset(preset).generate_preprocess([text], sequence_length=longest)
    inputs = {}
    for token, (mask, *_) in model.inputs.items():
        real = np.asarray(found[mask], bool)
        length = max(1, int(real.sum()))
        inputs[token], inputs[mask] = np.asarray(found[token])[:, :length], real[:, :length]
    return inputs


# -- verify-op --------------------------------------------------------------------------------------------------------------


def verify_op_command(arguments: argparse.Namespace) -> int:
    """`refmodels verify-op`."""
    from refmodels.conformance import EXAMPLES
    from refmodels.numerics import UNIT_ROUNDOFF
    from refmodels.verification.forms import load_object
    from refmodels.verification.single_op import check_function, op_named

    checked = []
    with cannot_run():
        op = op_named(arguments.op)
        dtypes = arguments.dtype or ["float32"]
        for dtype in dtypes:
            if dtype not in UNIT_ROUNDOFF:
                raise ValueError(f"dtype must be one of {', '.join(UNIT_ROUNDOFF)}, got {dtype!r}")
        with stdout_aside():
            function = load_object(arguments.function)
            if not callable(function):
                raise CandidateError(f"{arguments.function} is {type(function).__name__}, wanted a function")
            for dtype in dtypes:
                progress(f"checking {op.name} in {dtype}")
                checked.append(
                    check_function(
                        op,
                        function,
                        arguments.function,
                        dtype,
                        examples=arguments.examples or EXAMPLES,
                        seed=arguments.seed,
                        example=arguments.example,
                    )
                )
    wrong = any(entry.failures for entry in checked)
    if arguments.json:
        print_json(
            {
                "op": op.name,
                "function": arguments.function,
                "right": not wrong,
                "checked": [
                    {
                        "dtype": entry.dtypes[0],
                        "verdict": entry.verdict,
                        "examples": entry.examples,
                        "by_function": entry.taken,
                        "declined": dict(sorted(entry.refused.items())),
                        "failures": [asdict(failure) for failure in entry.failures],
                    }
                    for entry in checked
                ],
            }
        )
        return DIVERGES if wrong else AGREES
    rows = [("OP", "TYPE", "EXAMPLES", "BY FUNCTION", "VERDICT")]
    rows += [(op.name, entry.dtypes[0], str(entry.examples), str(entry.taken), entry.verdict) for entry in checked]
    print("\n".join(aligned(rows, right=(2, 3))))
    for reason in sorted({reason for entry in checked for reason in entry.refused}):
        print(f"not tried where {reason}")
    for entry in checked:
        for failure in entry.failures:
            print("", *(printable(line, LONGEST_LINE) for line in str(failure).splitlines()), sep="\n")
    sys.stdout.flush()
    return DIVERGES if wrong else AGREES


# -- what all of them need --------------------------------------------------------------------------------------------------


def loaded(preset: str, dtype: str | None) -> Backbone:
    """The backbone of a preset, on the reference: a kernel that does a whole layer would hide its steps."""
    progress(f"loading {preset}")
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    return Backbone.from_preset(preset, **options)


@contextmanager
def cannot_run() -> Iterator[None]:
    """Whatever goes wrong inside has the exit status 2: that of 1 is kept for an implementation that diverges."""
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


def _some(names: Any) -> str:
    return ", ".join(list(names)[:3])


def _write_text(path: Path, text: str) -> None:
    from refmodels.files import write_bytes

    write_bytes(path, text.encode())
