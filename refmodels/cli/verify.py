"""`refmodels verify`: somebody else's model beside the reference (`spec/verification.md`)."""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import Any

from refmodels.backbone import Backbone
from refmodels.cli.errors import cannot_run
from refmodels.cli.streams import stdout_aside
from refmodels.files import write_bytes
from refmodels.numerics import Verdict
from refmodels.printing import print_json, progress, say
from refmodels.verification.candidate import CandidateError
from refmodels.verification.forms import TIMEOUT, DumpsForm, Form, ProcessForm, python_form, read_inputs
from refmodels.verification.judgement import Step
from refmodels.verification.laws import check_laws
from refmodels.verification.mapping import NameMap
from refmodels.verification.replay import step_names
from refmodels.verification.report import as_json, excused_by, read_baseline, table, worse_than, write_junit
from refmodels.verification.verify import AGREES, DIVERGES, INCONCLUSIVE, Case, LawResult, Verification, cases, verify


def run(arguments: argparse.Namespace) -> int:
    """`refmodels verify`."""
    with cannot_run(), ExitStack() as stack:
        check_files(arguments)
        with stdout_aside():  # whatever a candidate prints, and downloads
            progress(f"loading {arguments.like}")
            model = Backbone.from_preset(arguments.like, dtype=arguments.dtype)  # on the reference: a kernel would hide steps
            form = form_of(arguments, model, stack)
            if arguments.propose is not None:
                text = proposal(form, model, arguments)
            else:
                rebuild = partial(form_of, arguments, stack=stack) if form.takes_checkpoint else None
                verification = outcome(form, model, tried_cases(arguments, model, form), arguments, rebuild)
        if arguments.propose is not None:
            write_bytes(Path(arguments.propose), text.encode())
            print(f"{arguments.propose}: read it, correct it, then give it as --mapping", flush=True)
            return AGREES
        return shown(verification, arguments)


def check_files(arguments: argparse.Namespace) -> None:
    """Say before the run what would fail only after it: a baseline that is none, a place that nothing can be written to."""
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


def form_of(arguments: argparse.Namespace, model: Backbone, stack: ExitStack) -> Form:
    """The candidate that the arguments say; what it holds is given up with the stack."""
    given = [arguments.target, arguments.exec, arguments.dumps]
    if sum(value is not None for value in given) != 1:
        raise CandidateError("wanted one of TARGET, --exec and --dumps")
    names = None if arguments.mapping is None else NameMap.read(arguments.mapping)
    options: dict[str, Any] = {"names": names, "products": arguments.products or ""}
    checkpoint = checkpoint_writer(model, stack)
    form: Form
    if arguments.inject and arguments.exec is None:
        raise CandidateError("--inject is for --exec: an object says by itself at which steps it can be given our values")
    if arguments.exec is not None:
        steps = step_names(model, cases(model)[0].inputs) if arguments.inject else ()
        injects = frozenset(step for step in steps if any(fnmatchcase(step, wanted) for wanted in arguments.inject))
        if arguments.inject and not injects:
            raise CandidateError(f"--inject {arguments.inject[0]}: no step has such a name; ours begin with {_some(steps)}")
        form = ProcessForm(arguments.exec, model, checkpoint, injects=injects, timeout=arguments.timeout or TIMEOUT, **options)
    elif arguments.dumps is not None:
        inputs = None if arguments.inputs is None else read_inputs(arguments.inputs, model)
        form = DumpsForm(arguments.dumps, model, inputs, **options)
    else:
        form = python_form(arguments.target, model, checkpoint, **options)
    stack.callback(form.close)
    return form


def tried_cases(arguments: argparse.Namespace, model: Backbone, form: Form) -> list[Case]:
    """The inputs to try: those that are given, those of the dumps, or our own."""
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
    form: Form,
    model: Backbone,
    tried: Sequence[Case],
    arguments: argparse.Namespace,
    rebuild: Callable[[Backbone], Form] | None = None,
) -> Verification:
    """Judge the steps, then the laws; CandidateError if nothing at all was judged."""
    if arguments.generate is not None:  # said before any work
        if isinstance(form, DumpsForm):
            raise CandidateError("--generate: dumps are of one run and cannot be asked for another")
        from refmodels.verification.generations import check_room

        check_room(model, model.checked(tried[0].inputs), arguments.generate)
    at = ""
    said: set[str] = set()

    def arrived(case: str, step: Step) -> None:
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


def generated(form: Form, model: Backbone, tried: Sequence[Case], count: int) -> list[LawResult]:
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


def proposal(form: Form, model: Backbone, arguments: argparse.Namespace) -> str:
    """The text of a mapping file for what the candidate gives: on inputs that tell most, unless others are asked for."""
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


def _some(names: Any) -> str:
    return ", ".join(list(names)[:3])
