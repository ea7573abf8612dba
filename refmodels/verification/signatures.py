"""Faults by name: what people get wrong in these models, each as an edit of our own steps.

A step of theirs that disagrees is judged once more under every hypothesis that could touch it. Where our step with the fault in
it gives what theirs gives, within the same bound, that is the name of what is wrong.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from refmodels.backbone import Backbone
from refmodels.op import Array
from refmodels.verification.lanes import Arithmetic
from refmodels.verification.replay import Edit, judge_step


@dataclass(frozen=True)
class Fault:
    """A hypothesis: `name` (`logits-not-scaled`), what it `says` of an implementation, in one sentence with what to change,
    the `families` it can happen in, and the `edit` that puts it into our steps."""

    name: str
    says: str
    families: tuple[str, ...]
    edit: Edit


@dataclass(frozen=True)
class Finding:
    """A fault that explains a `step`: `ratio` is what is left of the error over its bound."""

    name: str
    says: str
    step: str
    ratio: float


FAULTS: list[Fault] = []


def diagnose(
    model: Backbone,
    inputs: Mapping[str, Any],
    theirs: Mapping[str, Array],
    step: str,
    *,
    arithmetic: Arithmetic | None = None,
    substitutes: Mapping[str, Array] | None = None,
) -> list[Finding]:
    """The faults under which the step of theirs is right, those that leave the least error first."""
    found = []
    for fault in FAULTS:
        if model.family not in fault.families:
            continue
        judged = judge_step(model, inputs, theirs, step, edit=fault.edit, arithmetic=arithmetic, substitutes=substitutes)
        if judged is not None and judged.ok:
            found.append(Finding(fault.name, fault.says, step, judged.ratio))
    return sorted(found, key=lambda finding: finding.ratio)
