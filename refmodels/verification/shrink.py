"""The smallest case in which a step is wrong, and a script that shows it to somebody who has nothing else.

`shrink` takes away rows, tokens, padding, layers and values as long as the same step stays wrong. `reproduce` writes the rest
as one script beside one file of arrays; the script exits with 1 as long as the step is wrong and with 0 when it is right.
"""

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refmodels.backbone import Backbone
from refmodels.files import replacing, write_bytes
from refmodels.op import OPS, Array, Params
from refmodels.verification.bounds import BEYOND, largest_error
from refmodels.verification.candidate import OUTPUTS, Candidate, CandidateError
from refmodels.verification.judgement import Step, counted
from refmodels.verification.lanes import OWN, TRUTH, Arithmetic, Value
from refmodels.verification.laws import FIRST_PLAIN_ID, sides
from refmodels.verification.mapping import Renamed
from refmodels.verification.replay import NothingToCompareError, replay, sight_of
from refmodels.verification.run import LOCAL, MOVED
from refmodels.verification.script import of_call, of_step, storable
from refmodels.verification.verify import Case, CaseResult, Verification

RUNS = 150
"""How often a candidate is run to shrink a case, unless the caller says otherwise."""

Rebuild = Callable[[Backbone], Candidate]
"""`rebuild(model)`: the candidate made anew for another model of the family, with that model's weights."""


def place_of(step: str) -> str:
    """A step whatever its layer: `layers.*.self_attention.query:linear`."""
    return re.sub(r"\blayers\.\d+\b", "layers.*", step)


@dataclass(frozen=True)
class Shrunk(Case):
    """A case that cannot be made smaller: the `step` that is wrong in it, the `model` and the `candidate` that it is wrong in
    (others than at first if layers could be left out), and how many `runs` it took."""

    step: Step
    model: Backbone
    candidate: Candidate
    runs: int


def shrink(
    candidate: Candidate,
    model: Backbone,
    case: Case,
    *,
    step: str | None = None,
    rebuild: Rebuild | None = None,
    runs: int = RUNS,
    progress: Callable[[str], None] = lambda message: None,
) -> Shrunk:
    """The smallest case in which the same step (default: the first that is wrong) is wrong: the same op at the same place, in
    whatever layer. `progress` is called with what was achieved; after `runs` runs of the candidate it stops with what it has.

    Layers are left out only with `rebuild`. ValueError if the step is not wrong in this case.
    """
    search = _Search(candidate, model, dict(model.checked(case.inputs)), runs, progress)
    search.begin(step)
    search.rows()
    search.tokens()
    search.padding()
    if rebuild is not None:
        search.layers(rebuild)
    search.values()
    used = runs - search.left
    name = f"{case.name}, shrunk"
    return Shrunk(name, search.inputs, search.step, search.model, search.candidate, used)


class _Search:
    """The smallest so far, and what to try next. Nothing is kept unless the step was seen to be wrong in it."""

    step: Step
    _place: str
    _misshapen: bool

    def __init__(
        self, candidate: Candidate, model: Backbone, inputs: dict[str, Array], runs: int, progress: Callable[[str], None]
    ) -> None:
        self.candidate, self.model, self.inputs, self.left = candidate, model, inputs, runs
        self._progress = progress

    def begin(self, step: str | None) -> None:
        """See the step be wrong."""
        self.left -= 1
        wrong = self._wrong(self.candidate, self.model, self.inputs)
        found = next((one for one, _ in wrong if step in (None, one.name)), None)
        if found is None:
            raise ValueError(f"step {step!r} is not wrong in this case" if step else "no step is wrong in this case")
        self.step, self._place = found, place_of(found.name)
        self._misshapen = {one.name: shape for one, shape in wrong}[found.name]

    def _wrong(self, candidate: Candidate, model: Backbone, inputs: Mapping[str, Array]) -> list[tuple[Step, bool]]:
        """The steps that are wrong, and whether it is their shape that is."""
        theirs = candidate.run(inputs)
        arithmetic = Arithmetic(candidate.dtype, candidate.products)
        report = replay(model, inputs, theirs, arithmetic=arithmetic, through=False)
        return [(step, np.shape(theirs[step.name]) != step.shape) for step in report.wrong]

    def _still(
        self, inputs: dict[str, Array], model: Backbone | None = None, make: Callable[[], Candidate] | None = None
    ) -> bool:
        """Try it, and keep it if the step is wrong in it as it was: by its values, or by its shape."""
        if self.left <= 0:
            return False
        self.left -= 1
        model = model or self.model
        try:
            candidate = make() if make else self.candidate
            wrong = self._wrong(candidate, model, inputs)
        except (CandidateError, NothingToCompareError):  # that is another fault
            return False
        for step, misshapen in wrong:
            if place_of(step.name) == self._place and misshapen == self._misshapen:
                self.inputs, self.model, self.candidate, self.step = inputs, model, candidate, step
                return True
        return False

    def _said(self, what: str) -> None:
        self._progress(f"{what}: {self.step.name} is still wrong ({self.left} runs left)")

    # -- inputs -----------------------------------------------------------------------------------------------------------

    def rows(self) -> None:
        """One row, or without each that can go."""
        count = self._rows()
        if count == 1:
            return
        if not any(self._still(self._taken(slice(i, i + 1))) for i in range(count)):
            for i in reversed(range(count)):
                if self._rows() > 1:
                    self._still(self._taken(np.delete(np.arange(self._rows()), i)))
        self._said(f"{self._rows()} of {count} rows")

    def tokens(self) -> None:
        """Cut from the end, then from the beginning."""
        for side in sides(self.model):
            length = self._length(side)
            self._fewest(side, from_the_end=True)
            self._fewest(side, from_the_end=False)
            if self._length(side) < length:
                self._said(f"{self._length(side)} of {length} {side.replace('_', ' ')}tokens")

    def _fewest(self, side: str, *, from_the_end: bool) -> None:
        """Cut to the smallest count that is still wrong, by bisection between 0, which is not tried, and the length."""
        right, wrong = 0, self._length(side)
        while wrong - right > 1:
            middle, length = (right + wrong) // 2, self._length(side)
            columns = slice(0, middle) if from_the_end else slice(length - middle, length)
            if self._still(self._cut(side, columns)):
                wrong = middle
            else:
                right = middle

    def padding(self) -> None:
        """Without columns that are padding in every row; then with real tokens in place of all padding."""
        for side in sides(self.model):
            mask = np.asarray(self.inputs[f"{side}padding_mask"], bool)
            if not mask.any(0).all() and mask.any():
                self._still(self._cut(side, np.flatnonzero(mask.any(0))))
            mask = np.asarray(self.inputs[f"{side}padding_mask"], bool)
            if not mask.all() and self._still({**self.inputs, f"{side}padding_mask": np.ones_like(mask)}):
                self._said("no padding")

    def values(self) -> None:
        """Every id as small as it can be: all at once, one by one, and those that matter by bisection."""
        lowest = min(FIRST_PLAIN_ID, self.model.config.vocabulary_size - 1)
        for side in sides(self.model):
            name = f"{side}token_ids"
            if (self.inputs[name] == lowest).all() or self._still(
                {**self.inputs, name: np.full_like(self.inputs[name], lowest)}
            ):
                continue
            for place in np.ndindex(*self.inputs[name].shape):
                self._smallest_id(name, place, lowest)
        self._said("smallest ids")

    def _smallest_id(self, name: str, place: tuple[int, ...], lowest: int) -> None:
        high = int(self.inputs[name][place])
        low, trial = lowest - 1, lowest
        while high - low > 1 and high > lowest:
            ids = self.inputs[name].copy()
            ids[place] = trial
            if self._still({**self.inputs, name: ids}):
                high = trial
            else:
                low = trial
            trial = (low + high) // 2

    # -- layers -----------------------------------------------------------------------------------------------------------

    def layers(self, rebuild: Rebuild) -> None:
        """The one layer alone; else without each that can go, the last first."""
        whole, count = self.model, self.model.config.num_layers
        found = re.search(r"\blayers\.(\d+)\b", self.step.name)
        own = int(found.group(1)) if found else 0
        kept = list(range(count))
        for fewer in ([own], kept[: own + 1]):
            if len(fewer) < count and self._with_layers(whole, fewer, rebuild):
                kept = fewer
                break
        for layer in reversed(kept):
            rest = [one for one in kept if one != layer]
            if rest and self._with_layers(whole, rest, rebuild):
                kept = rest
        if self.model.config.num_layers < count:
            self._said(f"{self.model.config.num_layers} of {count} layers")

    def _with_layers(self, whole: Backbone, kept: Sequence[int], rebuild: Rebuild) -> bool:
        smaller = with_layers(whole, kept)
        return smaller is not None and self._still(self.inputs, smaller, lambda: rebuild(smaller))

    # -- parts of the inputs ------------------------------------------------------------------------------------------------

    def _rows(self) -> int:
        return len(next(iter(self.inputs.values())))

    def _length(self, side: str) -> int:
        return int(self.inputs[f"{side}token_ids"].shape[1])

    def _taken(self, rows: slice | Array) -> dict[str, Array]:
        return {name: array[rows] for name, array in self.inputs.items()}

    def _cut(self, side: str, columns: slice | Array) -> dict[str, Array]:
        """These columns of all that goes with the tokens of a side."""
        shape = self.inputs[f"{side}token_ids"].shape
        return {
            name: array[:, columns] if name.startswith(side) and array.shape[:2] == shape else array
            for name, array in self.inputs.items()
        }


def with_layers(model: Backbone, kept: Sequence[int]) -> Backbone | None:
    """The model with these of its layers alone (T5: in both stacks). None for one with quantised weights or adapters."""
    if model.quantization is not None or model.has_lora:
        return None
    smaller = type(model).from_config({**model.get_config(), "num_layers": len(kept)})

    def chosen(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        return {key: _layers(child, kept) if key == "layers" else chosen(child) for key, child in tree.items()}

    smaller.params = chosen(model.params)
    return smaller


def _layers(layers: list[Params], kept: Sequence[int]) -> list[Params]:
    found = [dict(layers[i]) for i in kept]
    for name, attention in layers[0].items():
        if (
            isinstance(attention, dict) and "relative_attention_bias" in attention
        ):  # layer 0 has T5's table for its stack (T5-C2)
            found[0][name] = {**found[0][name], "relative_attention_bias": attention["relative_attention_bias"]}
            for layer in found[1:]:
                layer[name] = {key: leaf for key, leaf in layer[name].items() if key != "relative_attention_bias"}
    return found


# -- a script -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proof:
    """All there is to say of a wrong step: its op and `arguments` (in the type under test, with their values of the steps
    before), what they `got`, what is `expected` in float64, the `bound` (a number or an array), what `counts` (None: all)."""

    op: str
    arguments: Mapping[str, Any]
    got: Array
    expected: Array
    bound: Array
    counts: Array | None


def proof(
    model: Backbone, inputs: Mapping[str, Array], theirs: Mapping[str, Array], step: Step, arithmetic: Arithmetic
) -> Proof:
    """The proof of one step.

    The bound is `calibrated`, with what the inputs' own roundings do, so that it holds wherever the steps before come out
    a rounding different. Where an error stays below it, being large beside its own element alone, that element alone is judged.
    """
    sight = sight_of(model, inputs, theirs, step.name, lanes=(*LOCAL, *MOVED), arithmetic=arithmetic)
    if sight is None or sight.theirs is None:
        raise ValueError(f"{step.name} is not reached")
    got, expected, selected = sight.theirs, sight.lane(TRUTH), sight.selected
    plain = {key: _own(value) for key, value in sight.arguments.items()}
    if sight.result.dtype.kind in "iub" or not sight.fits:
        return Proof(sight.op.name, plain, got, sight.lane(OWN), np.zeros(()), selected)
    own, truth, *moved = (counted(array, selected) for array in sight.result.lanes)
    largest = largest_error(truth, own, moved, sight.result.terms, arithmetic)
    bound = np.array(max(largest, step.local.bound))
    if step.local.error <= bound and step.local.index:
        bound = np.full(expected.shape, np.inf)
        bound[step.local.index] = step.local.bound
    beyond = np.abs(expected) >= BEYOND.get(arithmetic.dtype, np.inf)
    if beyond.any():
        bound = np.where(beyond, np.inf, bound)
    return Proof(sight.op.name, plain, got, expected, bound, selected)


def _own(value: Any) -> Any:
    if isinstance(value, Value):
        return value.lanes[OWN]
    if isinstance(value, dict):
        return {key: _own(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_own(child) for child in value)
    return value


def reproduce(
    candidate: Candidate,
    model: Backbone,
    verification: Verification,
    directory: str | Path,
    *,
    spec: str | None = None,
    rebuild: Rebuild | None = None,
    runs: int = RUNS,
    progress: Callable[[str], None] = lambda message: None,
) -> Path:
    """Write `reproduce.py` and `reproduce.npz` into a directory: the first wrong step of a verification, made as small as it
    can be. The path of the script.

    spec     `mypkg.model:build`: the script builds the candidate anew and runs it. Without it, or where a mapping file
             changes the layout of the step, the script shows the step alone: its inputs, what it gave, and what our op makes
             of them
    rebuild  the builder takes `checkpoint=`: layers may be left out, and a checkpoint is written beside the script

    Each file is complete or not there. ValueError if no step is wrong.
    """
    if verification.first is None:
        raise ValueError("nothing to reproduce: no step is wrong")
    result, step = verification.first
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    case, model, candidate, step = _smallest(candidate, model, result, step, rebuild, runs, progress)
    theirs = candidate.run(case.inputs)
    arithmetic = Arithmetic(candidate.dtype, candidate.products)
    found = proof(model, case.inputs, theirs, step, arithmetic)
    name = None if spec is None else _their_name(candidate, case.inputs, step.name)
    script = directory / "reproduce.py"
    says = [f"{finding.name}: {finding.says}" for finding in result.findings if place_of(finding.step) == place_of(step.name)]
    facts = {"implementation": spec or verification.candidate, "model": verification.model, "in": str(arithmetic)}
    facts |= dict(verification.facts)
    counts = found.counts is not None and not found.counts.all()
    arrays = {"expected": found.expected, "bound": found.bound}
    if found.counts is not None and counts:
        arrays["counts"] = found.counts
    if spec is not None and name is not None:
        arrays |= {f"in.{key}": array for key, array in case.inputs.items()}
        checkpoint = None
        if rebuild is not None:
            checkpoint = directory / "reproduce.checkpoint"
            shutil.rmtree(checkpoint, ignore_errors=True)
            model.save_to_hf(checkpoint)
        source = of_call(
            spec, name, step, found.op, facts, says, counts=counts, checkpoint=None if checkpoint is None else checkpoint.name
        )
    else:
        arguments = _needed(found.op, found.arguments)
        formula = (OPS[found.op].__doc__ or "").strip().partition("\n")[0]
        source, more = of_step(arguments, step, found.op, facts, says, counts=counts, formula=formula)
        arrays |= {"theirs": found.got, **more}
    with replacing(script.with_suffix(".npz")) as beside, beside.open("wb") as file:
        np.savez(file, allow_pickle=False, **{key: storable(array) for key, array in arrays.items()})
    write_bytes(script, source.encode())
    return script


def _smallest(
    candidate: Candidate,
    model: Backbone,
    result: CaseResult,
    step: Step,
    rebuild: Rebuild | None,
    runs: int,
    progress: Callable[[str], None],
) -> tuple[Case, Backbone, Candidate, Step]:
    """The smallest case, if the candidate can be run again and is wrong again."""
    try:
        case = shrink(candidate, model, result.case, step=step.name, rebuild=rebuild, runs=runs, progress=progress)
    except (CandidateError, ValueError) as error:
        progress(f"not made smaller: {error}")
        return result.case, model, candidate, step
    return case, case.model, case.candidate, case.step


def _their_name(candidate: Candidate, inputs: Mapping[str, Array], step: str) -> str | None:
    """What the script will find the step under: our name of it, that of an output, or what a mapping file calls it. None if
    the file changes its layout."""
    given = candidate.run(inputs)
    if isinstance(given, Renamed):
        return given.unmoved(step)
    names = [step, *(name for name, steps in OUTPUTS.items() if step in steps)]
    return next((name for name in names if name in given), None)


def _needed(op: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of a head's parameters its table alone."""
    found = dict(arguments)
    if op.endswith("_logits") and "params" in found:
        found["params"] = {"token_embedding": found["params"]["token_embedding"]}
    return found
