"""Beam search against one written from its description, on whole sequences: no cache, nothing of `refmodels.generate`."""

import functools
import math

import numpy as np
import pytest

from refmodels import BloomBackbone, BloomCausalLM, OPTBackbone, OPTCausalLM, T5Backbone, T5Seq2SeqLM, watching
from refmodels.parameters import flatten

VOCABULARY = 11
SIZES = {"vocabulary_size": VOCABULARY, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 8}
PROMPT = [2, 4, 6]
STOPS = [[3], [1, 7], [1, 5, 7], [2, 3, 5, 7, 8, 9, 10]]
"""With the last, most of the best candidates end: it takes many of them to go on with as many as before."""
PENALTIES = [0.0, 1.0, 2.0]
WIDTHS = [2, 3, 4]
LIMITS = [1, 3, 6]
SEEDS = {"opt": range(3), "bloom": range(3), "t5": range(3)}

families = pytest.mark.parametrize("family", ["opt", "bloom", "t5"])


@functools.cache
def task_of(family, seed):
    """A model in float64, whose search no rounding decides; large weights keep it from repeating its last token."""
    backbone, task = {
        "opt": (OPTBackbone, OPTCausalLM),
        "bloom": (BloomBackbone, BloomCausalLM),
        "t5": (T5Backbone, T5Seq2SeqLM),
    }[family]
    model = backbone(**SIZES, seed=seed, dtype="float64")
    rng = np.random.default_rng(seed)
    for _, leaf in flatten(model.params):
        if leaf.ndim == 2:
            leaf[...] = rng.standard_normal(leaf.shape)
    return task(model)


@functools.cache
def log_probabilities(family, seed, tokens):
    """Those of the token after the prompt and `tokens`, as a list."""
    backbone = task_of(family, seed).backbone
    if family == "t5":
        outputs = backbone({"encoder_token_ids": [PROMPT], "decoder_token_ids": [[0, *tokens]]})
        hidden = outputs["decoder_sequence_output"] / math.sqrt(SIZES["hidden_dim"])
    else:
        hidden = backbone({"token_ids": [[*PROMPT, *tokens]]})
    scores = backbone.token_embedding(hidden, reverse=True)[0, -1].tolist()
    top = max(scores)
    total = top + math.log(sum(math.exp(score - top) for score in scores))
    return [score - total for score in scores]


def searched(next_scores, limit, stop, width, penalty):
    """The best hypothesis: (its tokens, whether some stop token was ever passed over because of its rank).

    `next_scores(tokens)` gives the log probabilities after these tokens.
    """
    running, aside, passed_over = [(0.0, ())], [], False
    for length in range(1, limit + 1):
        candidates = [
            (score + more, (*tokens, token)) for score, tokens in running for token, more in enumerate(next_scores(tokens))
        ]
        candidates.sort(key=lambda candidate: -candidate[0])
        running = []
        for rank, (score, tokens) in enumerate(candidates[: width * max(2, 1 + len(stop))]):
            if tokens[-1] not in stop:
                running.append((score, tokens))
            elif rank < width:
                aside.append((score / length**penalty, tokens))
            else:
                passed_over = True
        running = running[:width]
        aside = sorted(aside, key=lambda hypothesis: -hypothesis[0])[:width]
        if len(aside) == width and aside[-1][0] >= running[0][0] / length**penalty:
            break
        if length == limit:
            aside += [(score / length**penalty, tokens) for score, tokens in running]
    return list(max(aside, key=lambda hypothesis: hypothesis[0])[1]), passed_over


def generated(family, seed, prompts=(PROMPT,), **settings):
    """The new tokens of every row."""
    task, prefix = task_of(family, seed), "encoder_" if family == "t5" else ""
    output = task.generate({f"{prefix}token_ids": prompts}, strip_prompt=True, **settings)
    prefix = "decoder_" if family == "t5" else ""
    ids, mask = output[f"{prefix}token_ids"], output[f"{prefix}padding_mask"]
    return [row[real == 1].tolist() for row, real in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("stop", STOPS, ids=str)
@families
def test_beam_search_finds_what_one_on_whole_sequences_finds(family, stop):
    early = full = passed = 0
    for seed in SEEDS[family]:
        scores = functools.partial(log_probabilities, family, seed)
        for penalty in PENALTIES:
            for width in WIDTHS:
                for limit in LIMITS:
                    want, passed_over = searched(scores, limit, stop, width, penalty)
                    settings = {"num_beams": width, "length_penalty": penalty, "max_new_tokens": limit}
                    got = generated(family, seed, stop_token_ids=stop, **settings)
                    assert got == [want], (seed, settings)
                    early += len(want) < limit and want[-1] in stop
                    full += want[-1] not in stop
                    passed += passed_over
    # The search had something to decide: stops were met early, others ran to the limit, and some ranked too low to count.
    assert early
    assert full
    assert passed


@pytest.mark.parametrize("step", [0, 2])
@families
def test_every_one_of_several_stop_tokens_ends_its_row(family, step):
    """The stop tokens are what each row says at this step, so no row says more, and each of them ends a row at step 0."""
    prompts = [[first, 8, second] for first in (1, 5, 9) for second in (2, 10)]
    free = generated(family, 1, prompts, stop_token_ids=None, max_new_tokens=8)
    stop = sorted({row[step] for row in free})
    assert len(stop) >= 2
    ended = generated(family, 1, prompts, stop_token_ids=stop, max_new_tokens=8)
    for row, whole in zip(ended, free, strict=True):
        end = next(i for i, token in enumerate(whole) if token in stop)
        assert row == whole[: end + 1]
    assert len({row[-1] for row in ended}) >= 2
    if step == 0:
        assert sorted({row[-1] for row in ended}) == stop


@families
def test_a_cache_whose_beams_stay_in_place_is_not_copied(family):
    """Each step takes the cache apart only when hypotheses change places: one beam never does."""
    calls = []

    def record(op, args, kwargs, proceed):
        calls.append(op.name)
        return proceed()

    with watching(record):
        one = generated(family, 1, stop_token_ids=None, max_new_tokens=5, sampler="beam", num_beams=1)
    assert one == generated(family, 1, stop_token_ids=None, max_new_tokens=5)
    assert calls.count("beam_candidates") == 5
    assert "cache_select" not in calls
    with watching(record):
        generated(family, 1, stop_token_ids=None, max_new_tokens=5, num_beams=3)
    assert "cache_select" in calls
