"""Replay: their values through our steps, each step judged by itself.

A step is a call of an op in our model; what they give for it is judged against what ours makes of *their* values of the steps
before, wherever those are known. So an error is reported where it is made and nowhere after, whatever the number of steps
between two known values: a single product, a layer, the whole model. Beside that local verdict stands the accumulated one,
against our own run from the model's inputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from refmodels.backbone import Backbone
from refmodels.op import Array
from refmodels.printing import printable
from refmodels.verification.judgement import Step, judge
from refmodels.verification.lanes import OWN, Arithmetic
from refmodels.verification.run import LOCAL, MOVED, THROUGH, Edit, Enough, Run, Sight


@dataclass(frozen=True)
class Report:
    """What a comparison found. `steps` in the order of the model; `absent` are our steps that they do not give, `unknown`
    their names that no step of ours has."""

    steps: tuple[Step, ...]
    absent: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    arithmetic: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every step agrees."""
        return all(step.ok for step in self.steps)

    @property
    def first(self) -> Step | None:
        """The first step that is wrong."""
        return next((step for step in self.steps if not step.ok), None)

    @property
    def wrong(self) -> tuple[Step, ...]:
        """Every step that is wrong by itself."""
        return tuple(step for step in self.steps if not step.ok)


class NothingToCompareError(ValueError):
    """No step of theirs has the name of one of ours."""


def replay(
    model: Backbone,
    inputs: Mapping[str, Any],
    theirs: Mapping[str, Array],
    *,
    arithmetic: Arithmetic | None = None,
    substitutes: Mapping[str, Array] | None = None,
    through: bool = True,
    progress: Callable[[Step], None] = lambda step: None,
) -> Report:
    """Judge every step of theirs that has a name of ours.

    `model` has their weights, in their type; `inputs` are its inputs. Arrays in `theirs` are in our layout and are read one at
    a time, so a `StoredTrace` will do. `substitutes` are what their run was given in place of its own values at these steps.
    `progress` is called with each step. NothingToCompareError if no name is ours.
    """
    arithmetic = arithmetic or Arithmetic(model.compute_dtype)
    steps: list[Step] = []

    covered: set[str] = set()

    def arrived(sight: Sight) -> None:
        if sight.theirs is not None:
            steps.append(judge(sight, arithmetic))
            progress(steps[-1])
        elif sight.op.composite and sight.result.theirs:  # it gives what a step inside it gave, which is theirs
            covered.add(sight.name)

    lanes = (*LOCAL, *THROUGH) if through else LOCAL
    run = Run(model, arithmetic, arrived, theirs=theirs, substitutes=substitutes, lanes=lanes).through(inputs)
    if not steps:
        some = ", ".join(map(printable, list(theirs)[:3])) or "none at all"
        raise NothingToCompareError(f"no step to compare: theirs are {some}; ours are {', '.join(list(run.names)[:3])} ...")

    def second_look(names: set[str], *, adopts: bool) -> dict[str, Step]:
        """These steps, with how much the inputs determine them: of each step, or with `adopts=False` of the model."""
        found: dict[str, Step] = {}

        def look(sight: Sight) -> None:
            if sight.name in names:
                found[sight.name] = judge(sight, arithmetic)

        given = substitutes if adopts else None
        closer = Run(model, arithmetic, look, theirs=theirs, substitutes=given, lanes=(*LOCAL, *MOVED), adopts=adopts)
        closer.through(inputs)
        return found

    doubtful = {step.name for step in steps if not step.ok and step.local.bound > 0}
    if doubtful:
        again = second_look(doubtful, adopts=True)
        steps = [replace(step, local=again[step.name].local) if step.name in again else step for step in steps]
    astray = {step.name for step in steps if step.through is not None and not step.through.ok and step.through.bound > 0}
    if astray and all(step.ok for step in steps):
        again = second_look(astray, adopts=False)
        steps = [replace(step, through=again[step.name].local) if step.name in again else step for step in steps]
    absent = tuple(name for name in run.names if name not in theirs and name not in covered)
    unknown = tuple(name for name in theirs if name not in run.names)
    return Report(tuple(steps), absent, unknown, str(arithmetic))


def judge_step(
    model: Backbone,
    inputs: Mapping[str, Any],
    theirs: Mapping[str, Array],
    name: str,
    *,
    edit: Edit | None = None,
    arithmetic: Arithmetic | None = None,
    substitutes: Mapping[str, Array] | None = None,
    moved: bool = False,
) -> Step | None:
    """The one step `name`, under a hypothesis about what they do; None if it is not reached. What leads up to it is taken from
    theirs, so that little more than its own layer is run. `moved`: with how well its inputs determine it."""
    arithmetic = arithmetic or Arithmetic(model.compute_dtype)
    lanes = (*LOCAL, *MOVED) if moved else LOCAL
    sight = sight_of(model, inputs, theirs, name, lanes=lanes, edit=edit, arithmetic=arithmetic, substitutes=substitutes)
    return None if sight is None else judge(sight, arithmetic, edit)


def sight_of(
    model: Backbone,
    inputs: Mapping[str, Any],
    theirs: Mapping[str, Array],
    name: str,
    *,
    lanes: tuple[int, ...] = (OWN,),
    edit: Edit | None = None,
    arithmetic: Arithmetic | None = None,
    substitutes: Mapping[str, Array] | None = None,
) -> Sight | None:
    """As `judge_step`, without a verdict: in the type under test alone that takes a third of the time."""
    found: list[Sight] = []

    def look(sight: Sight) -> None:
        if sight.name == name and sight.theirs is not None:
            found.append(sight)
            raise Enough

    arithmetic = arithmetic or Arithmetic(model.compute_dtype)
    run = Run(model, arithmetic, look, theirs=theirs, substitutes=substitutes, lanes=lanes, toward=name, edit=edit)
    run.through(inputs)
    return found[0] if found else None


def step_names(model: Backbone, inputs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every step of a run of this model on these inputs, in order, with its shape."""
    return Run(model, Arithmetic(model.compute_dtype), lambda sight: None, lanes=(OWN,)).through(inputs).names
