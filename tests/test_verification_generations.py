"""Generations and texts: ties are told from defects, in every type."""

import numpy as np
import pytest
from test_verification_laws import FAMILIES, positions_off, reordered, slots_off, tiny

from refmodels.verification.adaptors.own import OwnCandidate
from refmodels.verification.candidate import Candidate
from refmodels.verification.generations import DEFECT, SAME, TIE, judge_generation, judge_text, judge_tokens
from refmodels.verification.laws import law_inputs
from refmodels.verification.verify import AGREES, DIVERGES, INCONCLUSIVE


class Recorded(Candidate):
    """Tokens of its own choice, and nothing else."""

    name, dtype = "recorded", "float32"

    def __init__(self, tokens):
        self.tokens = tokens

    def run(self, inputs, inject=None):
        return {}

    def generate(self, inputs, count):
        return self.tokens


def twin(model, one, other, by=0.0):
    """Make token `other` score what `one` does, and `by` more relatively: a tie up to rounding."""
    tree = model.params
    tree["token_embedding"]["embeddings"][other] = tree["token_embedding"]["embeddings"][one] * (1 + by)
    model.params = tree


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_generation(family, dtype):
    model = tiny(family, dtype)
    found = judge_generation(OwnCandidate(model, observer=reordered), model, law_inputs(model), 6)
    assert found.defects == 0
    assert len(found.tokens) == 18
    assert found.status == (AGREES if found.decided else INCONCLUSIVE)
    if dtype == "float32":
        assert found.decided == 18
        assert found.ties == 0
        assert found.first is None


@pytest.mark.parametrize(("family", "fault"), [("opt", positions_off), ("bloom", slots_off)])
def test_a_wrong_place_in_the_cache(family, fault):
    model = tiny(family, tie_embedding_weights=False)
    inputs = {name: array[:1] for name, array in law_inputs(model).items()}
    found = judge_generation(OwnCandidate(model, observer=fault()), model, inputs, 8)
    assert found.status == DIVERGES
    assert found.first.verdict == DEFECT
    assert found.first.margin > found.first.allowed
    assert "defect: theirs" in str(found)


def test_it_goes_on_after_their_token():
    """One wrong token, then what a right model says after it: one defect."""
    model = tiny("opt")
    inputs = law_inputs(model)
    own = OwnCandidate(model)
    tokens = own.generate(inputs, 6).copy()
    tokens[1, 2] = (tokens[1, 2] + 1) % 40
    length = int(inputs["padding_mask"][1].sum())
    row = np.concatenate([inputs["token_ids"][1, :length], tokens[1, :3]])[None]
    tokens[1, 3:] = own.generate({"token_ids": row}, 3)[0]
    found = judge_generation(Recorded(tokens), model, inputs, 6)
    assert (found.defects, found.ties) == (1, 0)
    assert (found.first.row, found.first.index, found.first.theirs) == (1, 2, tokens[1, 2])
    assert [token.index for token in found.tokens if token.verdict != SAME] == [2]


def test_a_tie_is_none_of_their_faults():
    model = tiny("bloom")
    inputs = law_inputs(model)
    first = int(OwnCandidate(model).generate(inputs, 1)[0, 0])
    other = (first + 1) % 40
    twin(model, first, other, 1e-7)
    tokens = OwnCandidate(model).generate(inputs, 1)
    for choice in (first, other):
        tokens[0, 0] = choice
        found = judge_generation(Recorded(tokens), model, inputs, 1)
        assert found.defects == 0
        assert found.status == AGREES  # the other rows are decided
        token = found.tokens[0]
        assert not token.decided
        assert token.verdict == (SAME if choice == token.ours else TIE)
    twin(model, first, other, 0.1)  # no tie any more
    tokens = OwnCandidate(model).generate(inputs, 1)
    tokens[0, 0] = first if tokens[0, 0] == other else other
    assert judge_generation(Recorded(tokens), model, inputs, 1).status == DIVERGES


def test_nothing_but_ties_is_inconclusive():
    model = tiny("opt")
    tree = model.params
    tree["token_embedding"]["embeddings"][:] = tree["token_embedding"]["embeddings"][5]
    model.params = tree
    found = judge_generation(OwnCandidate(model), model, law_inputs(model), 2)
    assert found.decided == found.defects == 0
    assert found.status == INCONCLUSIVE


def test_two_files_of_tokens():
    model = tiny("t5")
    inputs = law_inputs(model)
    ours = OwnCandidate(model).generate(inputs, 5)
    theirs = [list(row) for row in ours]
    assert judge_tokens(model, inputs, theirs, ours).first is None
    theirs[2][3] = (theirs[2][3] + 1) % 40
    theirs[0] = theirs[0][:2]  # it met its end
    found = judge_tokens(model, inputs, theirs, ours)
    assert [(part.row, part.index, part.ours) for part in found.differences] == [(2, 3, ours[2, 3])]
    assert found.status == DIVERGES
    assert len(found.tokens) == 12
    # The other way round the defect is in the second file: there is a difference, and none of the first one's tokens is wrong.
    found = judge_tokens(model, inputs, ours, theirs)
    assert found.defects == 0
    assert found.differences[0].margin < 0
    assert found.status == DIVERGES


def test_what_cannot_be_judged():
    model = tiny("opt", longest=14)
    inputs = law_inputs(model)
    none = judge_generation(Recorded(None), model, inputs, 2)
    assert none.status == INCONCLUSIVE
    assert "cannot generate" in str(none)
    with pytest.raises(ValueError, match=r"wanted integers \(3, 2\)"):
        judge_generation(Recorded(np.zeros((3, 3), int)), model, inputs, 2)
    with pytest.raises(ValueError, match="max_sequence_length 14"):
        judge_generation(OwnCandidate(model), model, inputs, 9)
    with pytest.raises(ValueError, match="count must be at least 1"):
        judge_generation(OwnCandidate(model), model, inputs, 0)
    with pytest.raises(ValueError, match="has 1 rows, wanted 3"):
        judge_tokens(model, inputs, [[1]])
    with pytest.raises(ValueError, match="token_ids"):
        judge_tokens(model, inputs, [[40, 1], [1], [1]])
    assert judge_tokens(model, inputs, [[], [], []]).status == INCONCLUSIVE


# -- a text -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_text(family, dtype):
    model = tiny(family, dtype)
    found = judge_text(OwnCandidate(model, observer=reordered), model, law_inputs(model))
    assert found.status == AGREES
    assert len(found.tokens) == law_inputs(model)["decoder_padding_mask" if family == "t5" else "padding_mask"].sum()
    assert found.kl < 20 * max(found.kl_own, 1e-15)
    assert found.kl <= found.kl_bound
    assert found.agreement > 0.9


def test_a_wrong_text():
    def hotter(op, args, kwargs, proceed):
        return proceed() * np.float32(1.01) if op.name == "opt_logits" else proceed()

    def shifted(op, args, kwargs, proceed):
        return proceed() + np.float32(100.0) if op.name == "opt_logits" else proceed()

    def nan(op, args, kwargs, proceed):
        return proceed() * np.float32("nan") if op.name == "opt_logits" else proceed()

    model = tiny("opt")
    inputs = law_inputs(model)
    found = judge_text(OwnCandidate(model, observer=hotter), model, inputs)
    assert found.agreement == 1.0  # top-1 does not see it
    assert found.status == DIVERGES
    assert found.kl > found.kl_bound
    assert found.kl_bound == pytest.approx(found.bound**2 / 2, rel=1e-3)
    assert judge_text(OwnCandidate(model, observer=shifted), model, inputs).kl < 1e-9  # the softmax does not see that
    assert judge_text(OwnCandidate(model, observer=nan), model, inputs).status == DIVERGES
    assert judge_text(Recorded(None), model, inputs).status == INCONCLUSIVE


def test_the_divergence_by_the_definition():
    from refmodels.verification.generations import _kl

    rng = np.random.default_rng(1)
    truth, other = rng.standard_normal(50) * 3, rng.standard_normal(50)
    p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (truth, truth + other))
    assert _kl(truth, truth + other) == pytest.approx((p * np.log(p / q)).sum(), rel=1e-12)
    tiny_one = _kl(truth, truth + 1e-9 * other)
    assert tiny_one == pytest.approx(0.5e-18 * ((p * other**2).sum() - (p * other).sum() ** 2), rel=1e-3)


def test_the_bound_of_the_divergence_is_reached_by_the_worst_case_and_never_passed():
    from refmodels.verification.generations import _kl

    rng = np.random.default_rng(2)
    by = 1e-3
    even = np.zeros(2)
    assert _kl(even, np.array([by, -by])) == pytest.approx(by**2 / 2, rel=1e-3)
    for _ in range(200):
        truth = rng.standard_normal(20) * 4
        assert _kl(truth, truth + rng.uniform(-by, by, 20)) <= by**2 / 2
