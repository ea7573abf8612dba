"""Generations and scores of a text: which differences are ties, and which are defects.

Two right implementations may choose different tokens where the two best logits lie closer together than the logits' error
bound, and from there on they tell different stories. So every token of theirs is judged after *their* tokens before it: our
model takes their text in one pass (teacher forcing), and each choice is held to the truth there. A difference that the bound
explains is a tie; any other is a defect.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmodels.backbone import Backbone
from refmodels.op import Array
from refmodels.verification.bounds import Known, bounds
from refmodels.verification.candidate import Candidate
from refmodels.verification.lanes import Arithmetic
from refmodels.verification.laws import longest, sides
from refmodels.verification.verify import AGREES, DIVERGES, INCONCLUSIVE

SAME, TIE, DEFECT = "same", "tie", "defect"


@dataclass(frozen=True)
class TokenReport:
    """One token of theirs, number `index` of the new ones of `row` (of a text: of its tokens).

    ours      the token that the float64 run chooses here, or of two generations the other's
    margin    how much higher the truth's logit of `ours` is than that of theirs
    allowed   how large the margin may be between right implementations: twice the logits' error bound
    decided   whether the best logit leads all others by more than that: then every right implementation chooses it
    kl        of a text: the Kullback-Leibler divergence of their distribution from the truth's, in nats; `kl_bound` its bound
              and `kl_own` what our own run in their type has
    """

    row: int
    index: int
    theirs: int
    ours: int
    margin: float
    allowed: float
    decided: bool
    verdict: str
    kl: float = 0.0
    kl_bound: float = 0.0
    kl_own: float = 0.0

    def __str__(self) -> str:
        place = f"row {self.row}, token {self.index}"
        if self.verdict == SAME:
            return f"{place}: {self.theirs}"
        return (
            f"{place}: {self.verdict}: theirs {self.theirs}, ours {self.ours}, which leads by {self.margin:.3g}; "
            f"allowed {self.allowed:.3g}"
        )


@dataclass(frozen=True)
class GenerationResult:
    """Every token of a generation, row by row. `differences` are the first places where two given generations part, one for
    each row that does. `reason` says why there are no tokens, if there are none."""

    tokens: tuple[TokenReport, ...]
    bound: float = 0.0
    differences: tuple[TokenReport, ...] = ()
    reason: str = ""

    @property
    def first(self) -> TokenReport | None:
        """The first token of theirs that is not ours: the lowest index, then the first row."""
        other = [token for token in (*self.differences, *self.tokens) if token.verdict != SAME]
        return min(other, key=lambda token: (token.index, token.row), default=None)

    @property
    def ties(self) -> int:
        """How many tokens of theirs are not the truth's and yet right."""
        return sum(token.verdict == TIE for token in self.tokens)

    @property
    def defects(self) -> int:
        """How many are wrong."""
        return sum(token.verdict == DEFECT for token in self.tokens)

    @property
    def decided(self) -> int:
        """How many places leave a right implementation no choice."""
        return sum(token.decided for token in self.tokens)

    @property
    def status(self) -> int:
        """DIVERGES with a defect (of two generations, also where they part by more than a tie); INCONCLUSIVE where no place
        leaves less than two choices, so that nothing can be told; else AGREES."""
        if self.defects or any(token.verdict == DEFECT for token in self.differences):
            return DIVERGES
        return AGREES if self.decided else INCONCLUSIVE

    def __str__(self) -> str:
        if not self.tokens:
            return self.reason
        counts = f"{len(self.tokens)} tokens: {self.ties} ties, {self.defects} defects, {self.decided} decided"
        return counts if self.first is None else f"{counts}; the first that differs: {self.first}"


@dataclass(frozen=True)
class TextResult:
    """How their distributions over a given text compare: every place is judged, given the text's own tokens before it."""

    tokens: tuple[TokenReport, ...]
    bound: float = 0.0
    reason: str = ""

    @property
    def agreement(self) -> float:
        """The share of places where their best token is the truth's."""
        return sum(token.verdict == SAME for token in self.tokens) / max(len(self.tokens), 1)

    @property
    def kl(self) -> float:
        """Their mean divergence, in nats for each token."""
        return float(np.mean([token.kl for token in self.tokens])) if self.tokens else 0.0

    @property
    def kl_own(self) -> float:
        """The mean divergence of our own run in their type: what to expect."""
        return float(np.mean([token.kl_own for token in self.tokens])) if self.tokens else 0.0

    @property
    def kl_bound(self) -> float:
        """What the mean may be: half the square of the logits' error bound."""
        return float(np.mean([token.kl_bound for token in self.tokens])) if self.tokens else 0.0

    @property
    def wrong(self) -> tuple[TokenReport, ...]:
        """The places where their best token is a defect or the divergence is above its bound."""
        return tuple(token for token in self.tokens if token.verdict == DEFECT or not token.kl <= token.kl_bound)

    @property
    def status(self) -> int:
        """DIVERGES if a place is wrong; INCONCLUSIVE without any place; else AGREES."""
        return DIVERGES if self.wrong else AGREES if self.tokens else INCONCLUSIVE

    def __str__(self) -> str:
        if not self.tokens:
            return self.reason
        return (
            f"{len(self.tokens)} tokens: top-1 agreement {self.agreement:.2%}, mean KL {self.kl:.3g} nats (bound "
            f"{self.kl_bound:.3g}, ours {self.kl_own:.3g}), {len(self.wrong)} wrong"
        )


# -- generations ----------------------------------------------------------------------------------------------------------


def judge_generation(candidate: Candidate, model: Backbone, inputs: Mapping[str, Any], count: int) -> GenerationResult:
    """The `count` tokens that a candidate chooses greedily after these inputs, each judged after its own tokens before it."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    arrays = model.checked(inputs)
    check_room(model, arrays, count)
    theirs = candidate.generate(arrays, count)
    if theirs is None:
        return GenerationResult((), reason=f"{candidate.name} cannot generate")
    wanted = (len(next(iter(arrays.values()))), count)
    theirs = np.asarray(theirs)
    if theirs.shape != wanted or theirs.dtype.kind not in "iu":
        raise ValueError(f"{candidate.name} generated {theirs.dtype} of shape {theirs.shape}, wanted integers {wanted}")
    return judge_tokens(model, arrays, theirs, arithmetic=Arithmetic(candidate.dtype, candidate.products))


def judge_tokens(
    model: Backbone,
    inputs: Mapping[str, Any],
    theirs: Array | Sequence[Sequence[int]],
    ours: Array | Sequence[Sequence[int]] | None = None,
    *,
    arithmetic: Arithmetic | None = None,
) -> GenerationResult:
    """A greedy generation (b, count) after these inputs, and beside it another one, if it is given: where do they part?

    `model` has the weights of both, and runs on the inputs with `theirs` behind each row's tokens. A row may be shorter than
    others: one that has met its end.
    """
    arithmetic = arithmetic or Arithmetic(model.compute_dtype)
    arrays = model.checked(inputs)
    new = [np.asarray(row, np.int64).reshape(-1) for row in theirs]
    side = sides(model)[-1]
    ids, real = arrays[f"{side}token_ids"], arrays[f"{side}padding_mask"]
    if len(new) != len(ids):
        raise ValueError(f"the generation has {len(new)} rows, wanted {len(ids)}, one for each input")
    if ours is not None and len(ours) != len(new):
        raise ValueError(f"the other generation has {len(ours)} rows, wanted {len(new)}")
    if not any(map(len, new)):
        return GenerationResult((), reason="the generation has no tokens")
    check_room(model, arrays, max(map(len, new)))
    prompts = [row[mask] for row, mask in zip(ids, real, strict=True)]
    if not all(map(len, prompts)):
        raise ValueError(f"row {[len(prompt) for prompt in prompts].index(0)} has no token to go on from")
    whole = _extended(arrays, side, [np.concatenate(pair) for pair in zip(prompts, new, strict=True)])
    places = [(row, len(prompts[row]) - 1 + i, i) for row in range(len(new)) for i in range(len(new[row]))]

    def judged(known: Known) -> GenerationResult:
        assert known.truth is not None
        tokens = [_token(known, row, at, i, int(new[row][i])) for row, at, i in places]
        parted = [] if ours is None else _parted(known, prompts, new, [np.asarray(row) for row in ours])
        return GenerationResult(tuple(tokens), known.bound, tuple(parted))

    found = judged(_logits(model, whole, arithmetic, second_look=False))
    if found.status == DIVERGES:  # is it more than the inputs leave open?
        found = judged(_logits(model, whole, arithmetic, second_look=True))
    return found


def _token(known: Known, row: int, at: int, index: int, theirs: int) -> TokenReport:
    assert known.truth is not None
    truth, allowed = known.truth[row, at], 2 * known.bound
    if not 0 <= theirs < len(truth):
        return TokenReport(row, index, theirs, int(truth.argmax()), np.inf, allowed, True, DEFECT)
    best = int(truth.argmax())
    margin = float(truth[best] - truth[theirs])
    lead = float(truth[best] - np.delete(truth, best).max(initial=-np.inf))
    verdict = SAME if theirs == best else TIE if margin <= allowed else DEFECT
    return TokenReport(row, index, theirs, best, margin, allowed, lead > allowed, verdict)


def _parted(known: Known, prompts: Sequence[Array], theirs: Sequence[Array], ours: Sequence[Array]) -> list[TokenReport]:
    """The first difference of each row: up to there both have seen the same."""
    assert known.truth is not None
    found = []
    for row, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        length = min(len(a), len(b))
        apart = np.flatnonzero(a[:length] != b[:length])
        if not len(apart):
            continue
        index = int(apart[0])
        truth = known.truth[row, len(prompts[row]) - 1 + index]
        if not all(0 <= token < len(truth) for token in (a[index], b[index])):
            raise ValueError(f"row {row}: tokens {a[index]} and {b[index]}, wanted 0 to {len(truth) - 1}")
        margin = float(truth[b[index]] - truth[a[index]])
        allowed = 2 * known.bound
        verdict = TIE if abs(margin) <= allowed else DEFECT
        found.append(TokenReport(row, index, int(a[index]), int(b[index]), margin, allowed, verdict == DEFECT, verdict))
    return found


def _extended(arrays: Mapping[str, Array], side: str, rows: Sequence[Array]) -> dict[str, Array]:
    width = max(map(len, rows))
    mask = np.arange(width) < np.array([[len(row)] for row in rows])
    ids = np.zeros(mask.shape, np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    if ids.min() < 0:
        raise ValueError(f"the generation has token {ids.min()}, wanted at least 0")
    return {**arrays, f"{side}token_ids": ids, f"{side}padding_mask": mask}


def check_room(model: Backbone, arrays: Mapping[str, Array], count: int) -> None:
    """ValueError unless the model has positions for so many tokens more."""
    most = int(arrays[f"{sides(model)[-1]}padding_mask"].sum(1).max(initial=0))
    if most + count > longest(model):
        raise ValueError(f"{most} tokens and {count} new ones are more than the model's max_sequence_length {longest(model)}")


def _logits(model: Backbone, inputs: Mapping[str, Any], arithmetic: Arithmetic, *, second_look: bool) -> Known:
    name = f"{model.family}_logits"
    return bounds(model, inputs, arithmetic, {name}.__contains__, second_look=second_look, keep=True)[name]


# -- a text ---------------------------------------------------------------------------------------------------------------


def judge_text(candidate: Candidate, model: Backbone, inputs: Mapping[str, Any]) -> TextResult:
    """Their logits over a text beside the truth's: top-1 agreement and the divergence of their distributions."""
    arithmetic = Arithmetic(candidate.dtype, candidate.products)
    arrays, name = model.checked(inputs), f"{model.family}_logits"
    theirs = candidate.run(arrays).get(name)
    if theirs is None:
        return TextResult((), reason=f"{candidate.name} gives no {name}")
    real = arrays[f"{sides(model)[-1]}padding_mask"]
    wanted = (*real.shape, model.config.vocabulary_size)
    theirs = np.asarray(theirs).astype(np.float64)
    if theirs.shape != wanted:
        raise ValueError(f"{candidate.name} gives {name} of shape {theirs.shape}, wanted {wanted}")

    def judged(known: Known) -> TextResult:
        assert known.truth is not None
        assert known.own is not None
        tokens = []
        for row, at in zip(*np.nonzero(real), strict=True):
            truth, got = known.truth[row, at], theirs[row, at]
            token = _token(known, int(row), int(at), int(at), int(np.nanargmax(got)) if not np.isnan(got).all() else -1)
            own = known.own[row, at].astype(np.float64)
            # Hoeffding's lemma: what is off by at most B everywhere diverges by at most B^2/2; and float64's own roundings.
            allowed = known.bound**2 / 2 + 2.0**-50 * max(1.0, float(np.abs(truth).max()))
            tokens.append(TokenReport(**{**vars(token), "kl": _kl(truth, got), "kl_bound": allowed, "kl_own": _kl(truth, own)}))
        return TextResult(tuple(tokens), known.bound)

    found = judged(_logits(model, arrays, arithmetic, second_look=False))
    if found.status == DIVERGES:
        found = judged(_logits(model, arrays, arithmetic, second_look=True))
    return found


def _kl(truth: Array, other: Array) -> float:
    """The divergence of softmax(other) from softmax(truth), without the cancellation of two logarithms; NaN if it has one."""
    with np.errstate(all="ignore"):
        weights = np.exp(truth - truth.max())
        weights /= weights.sum()
        off = other - truth
        mean = (weights * off).sum()
        # log of the mean of exp(off - mean), where that mean is 1 + something small
        return max(float(np.log1p((weights * np.expm1(off - mean)).sum())), 0.0) if np.isfinite(mean) else float("nan")
