"""What `verify` says of each planted fault and of each right variant, and the page of it.

python tests/peers/foreign_outcomes.py    writes spec/verification-faults.md
"""

import functools
import sys
from pathlib import Path

from foreign_faults import FAULTS, RIGHT_ONES
from foreign_models import copied, foreign_model

from refmodels.verification.adaptors.transformers import TransformersCandidate, backbone_of
from refmodels.verification.candidate import Candidate
from refmodels.verification.verify import AGREES, cases, verify

PAGE = Path(__file__).parents[2] / "spec" / "verification-faults.md"

INTRODUCTION = """\
# Faults that were planted, and found

Transformers' own OPT, BLOOM and T5 (2 layers, 4 or 12 heads, random weights), with one fault put into them at run time, were
given to `verify`, which knows nothing of it. For each fault: the first step that was reported as wrong, and the first name that
was given for what is wrong with it. Below stand variants that are right, none of which may be reported.

This page is written by `python tests/peers/foreign_outcomes.py`, and `tests/peers/test_peer_verification.py` holds it to what
is found. The faults are in `tests/peers/foreign_faults.py`.
"""


class OfCache(Candidate):
    """Another candidate by what it says with its cache: the logits alone."""

    def __init__(self, inner):
        self.inner, self.name, self.dtype, self.products = inner, inner.name, inner.dtype, inner.products

    def run(self, inputs, inject=None):
        length = inputs["decoder_token_ids" if self.inner.family == "t5" else "token_ids"].shape[1]
        return {f"{self.inner.family}_logits": self.inner.chunked(inputs, [length - 4, 2, 1, 1])}


@functools.cache
def pair(variant, dtype="float32", attention="eager", prepare=None):
    """A model of theirs and ours of it, neither to be changed."""
    theirs = foreign_model(variant, dtype, attention)
    if prepare is not None:
        prepare(theirs)
    return theirs, backbone_of(theirs)


def chosen(ours, names):
    return [case for case in cases(ours) if case.name in names]


def verified(fault, only=lambda name: True):
    """The verification of a model with this fault."""
    import torch

    theirs, ours = pair(fault.variant, fault.dtype, fault.attention, fault.prepare)
    model = copied(theirs)
    torch.manual_seed(0)  # for dropout
    with fault.patch(model):
        candidate = TransformersCandidate(model, only=only)
        return verify(OfCache(candidate) if fault.cached else candidate, ours, chosen(ours, fault.cases))


@functools.cache
def outcome(fault):
    """(the step that is reported, the names that are given for the fault)."""
    first = verified(fault).first
    return ("", ()) if first is None else (first[1].name, tuple(finding.name for finding in first[0].findings))


@functools.cache
def verified_right(right):
    """The verification of a right variant."""
    theirs, ours = pair(right.variant, right.dtype, right.attention)
    model = copied(theirs)
    with right.patch(model):
        candidate = TransformersCandidate(model, products=right.products, cache=right.cached or "dynamic")
        return verify(OfCache(candidate) if right.cached else candidate, ours, chosen(ours, right.cases))


def named(fault):
    """Whether the first name that is given is the right one."""
    return outcome(fault)[1][:1] == (fault.signature,)


def page():
    """The page, from the outcome of a run."""
    located = sum(outcome(fault)[0] == fault.step for fault in FAULTS)
    lines = [
        INTRODUCTION,
        f"{len(FAULTS)} faults: {located} located at the right step, {sum(map(named, FAULTS))} named rightly.\n",
        "| model | fault | located at | named |",
        "|---|---|---|---|",
    ]
    for fault in FAULTS:
        step, names = outcome(fault)
        where = f"`{step}`" if step else "not found"
        wrong = "" if step == fault.step else f" (wanted `{fault.step}`)"
        name = f"`{names[0]}`" if names else "-"
        lines.append(f"| {fault.variant} | {fault.name} | {where}{wrong} | {name}{'' if named(fault) else ' (missed)'} |")
    agreed = sum(verified_right(right).status == AGREES for right in RIGHT_ONES)
    lines += [
        f"\n{len(RIGHT_ONES)} right variants: {agreed} agree.\n",
        "| model | variant | type | verdict |",
        "|---|---|---|---|",
    ]
    for right in RIGHT_ONES:
        verdict = "agrees" if verified_right(right).status == AGREES else "REPORTED"
        declared = f", products in {right.products}" if right.products else ""
        lines.append(f"| {right.variant} | {right.name} | {right.dtype}{declared} | {verdict} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.stdout.write(f"{PAGE}\n")
