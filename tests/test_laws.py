"""Laws of whole models, on random small ones: what may not matter does not matter.

Where a law says that two ways of computing agree, float32 is held to the float64 run on the same weights by `calibrated()`:
the other way may be no worse than a small multiple of the first way's own error. In float64 the same two ways may differ by
what float32 allows, scaled by the ratio of the unit roundoffs. Where the arithmetic is the same, the law is bitwise.
"""

from collections import Counter
from functools import cached_property

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refmodels import BloomBackbone, BloomCausalLM, OPTBackbone, OPTCausalLM, T5Backbone, T5Seq2SeqLM
from refmodels.bloom import bloom_backbone, bloom_logits
from refmodels.numerics import UNIT_ROUNDOFF, calibrated, compare
from refmodels.op import watching
from refmodels.ops.precision import POLICIES, compute_dtype, numpy_dtype, variable_dtype
from refmodels.opt import opt_backbone, opt_logits
from refmodels.parameters import flatten
from refmodels.t5 import ACTIVATIONS, t5_cross_keys_values, t5_decoder, t5_encoder, t5_logits

PROFILE = settings(max_examples=25, suppress_health_check=list(HealthCheck))
FAMILIES = ("opt", "bloom", "t5")
BACKBONES = {"opt": OPTBackbone, "bloom": BloomBackbone, "t5": T5Backbone}
TASKS = {"opt": OPTCausalLM, "bloom": BloomCausalLM, "t5": T5Seq2SeqLM}


def mapped(tree, leaf):
    if isinstance(tree, dict):
        return {key: mapped(child, leaf) for key, child in tree.items()}
    if isinstance(tree, list):
        return [mapped(child, leaf) for child in tree]
    return leaf(tree)


def scrambled(model, rng):
    """Parameters of sizes that make every one of them matter: no zero bias, no norm at 1."""

    def leaf(x):
        fan_in = x.shape[0] if x.ndim == 2 else 4
        values = rng.standard_normal(x.shape) / np.sqrt(fan_in) + (x.ndim == 1 and (x == 1).all())
        return values.astype(x.dtype)

    model.params = mapped(model.params, leaf)
    for path, table in flatten(model.params):
        if "embedding" in path:
            table[...] = rng.standard_normal(table.shape)
    return model


class Subject:
    """A model with its batch: token ids and mask, right-padded; for T5 an encoder input as well."""

    def __init__(self, family, config, seed, shape, dtype="float32", params=None):
        self.family, self.config, self.seed, self.shape = family, config, seed, shape
        self.model = BACKBONES[family](**config, dtype=dtype)
        rng = np.random.default_rng(seed)
        if params is None:
            scrambled(self.model, rng)
        else:
            self.model.params = params
        rng = np.random.default_rng(seed + 1)
        b, t = shape
        self.ids = rng.integers(0, config["vocabulary_size"], (b, t))
        self.lengths = rng.integers(1, t + 1, b)
        self.mask = np.arange(t) < self.lengths[:, None]
        self.source = rng.integers(0, config["vocabulary_size"], (b, 4))
        self.source_mask = np.arange(4) < rng.integers(1, 5, b)[:, None]
        self.rng = rng

    def twin(self, dtype):
        """The same weights and batch in another type."""
        cast = mapped(self.model.params, lambda x: x.astype(numpy_dtype(variable_dtype(dtype))))
        return Subject(self.family, self.config, self.seed, self.shape, dtype, cast)

    def whole(self, ids=None, mask=None, source=None, source_mask=None, rows=slice(None), **others):
        """Hidden states (b, t, n) of whole sequences, by the public call."""
        ids, mask = self.ids if ids is None else ids, self.mask if mask is None else mask
        if self.family != "t5":
            return self.model({"token_ids": ids[rows], "padding_mask": mask[rows], **others})
        source = self.source if source is None else source
        source_mask = self.source_mask if source_mask is None else source_mask
        outputs = self.model(
            {
                "encoder_token_ids": source[rows],
                "encoder_padding_mask": source_mask[rows],
                "decoder_token_ids": ids[rows],
                "decoder_padding_mask": mask[rows],
            }
        )
        return outputs["decoder_sequence_output"]

    def logits(self, hidden):
        params, config = self.model.params, self.model.config
        return {
            "opt": lambda: opt_logits(hidden, params),
            "bloom": lambda: bloom_logits(hidden, params),
            "t5": lambda: t5_logits(hidden, params, config),
        }[self.family]()

    def new_cache(self, capacity):
        if self.family == "t5":
            return self.model.new_cache(self.source, self.source_mask, capacity)
        return self.model.new_cache(len(self.ids), capacity)

    @cached_property
    def encoded(self):
        params, config = self.model.params, self.model.config
        return t5_cross_keys_values(t5_encoder(self.source, self.source_mask, params, config), params, config)

    def step(self, ids, mask, cache, start):
        """Hidden states of some more tokens, whose keys and values go into the cache."""
        params, config = self.model.params, self.model.config
        arguments = {"cache": cache, "start": start}
        if self.family == "t5":
            return t5_decoder(ids, mask, self.encoded, self.source_mask, params, config, **arguments)
        run = opt_backbone if self.family == "opt" else bloom_backbone
        return run(ids, mask, params, config, **arguments)


@st.composite
def subjects(draw, family, *, longest=8, rows=3):
    heads = draw(st.sampled_from([1, 2, 3, 5, 6, 12]), "heads")
    config = {
        "vocabulary_size": draw(st.integers(5, 20), "vocabulary"),
        "num_layers": draw(st.integers(1, 2), "layers"),
        "num_heads": heads,
        "hidden_dim": heads * draw(st.integers(2, 4), "head size") + 2 * (heads == 1),
        "intermediate_dim": draw(st.integers(1, 9), "intermediate"),
    }
    if family == "opt":
        config |= {
            "max_sequence_length": 30,
            "word_embed_proj_dim": draw(st.sampled_from([None, None, 1, 5]), "word_embed_proj_dim"),
            "do_layer_norm_before": draw(st.booleans(), "norms first"),
            "remove_final_layer_norm": draw(st.booleans(), "no final norm"),
        }
    if family != "t5":
        config["tie_embedding_weights"] = draw(st.booleans(), "tied")
    if family == "t5":
        config |= {
            "key_value_dim": draw(st.sampled_from([None, 2, 3]), "key_value_dim"),
            "use_gated_activation": draw(st.booleans(), "gated"),
            "tie_embedding_weights": draw(st.booleans(), "tied"),
            "scale_logits": draw(st.sampled_from([None, True, False]), "scaled"),
            "activation": draw(st.sampled_from(sorted(ACTIVATIONS)), "activation"),
        }
    shape = (draw(st.integers(1, rows), "rows"), draw(st.integers(1, longest), "length"))
    return Subject(family, config, draw(st.integers(0, 2**31), "seed"), shape)


def drawn(data, family, **bounds):
    return data.draw(subjects(family, **bounds))


def holds(law, subject):
    """`law(subject)` gives (this way, that way), two arrays that are to agree: in float32, and in float64."""
    got32, wanted32 = law(subject)
    got64, wanted64 = law(subject.twin("float64"))
    assert got32.dtype == np.float32
    assert got64.dtype == np.float64
    assert np.isfinite(wanted64).all()
    verdict = compare(got32, wanted64, calibrated(), wanted=wanted32)
    assert verdict, verdict
    if got64.size:
        own = np.abs(wanted32 - wanted64).max()
        bound = 2 * (4 * own + 8 * UNIT_ROUNDOFF["float32"] * np.abs(wanted64).max())
        assert np.abs(got64 - wanted64).max() <= bound * UNIT_ROUNDOFF["float64"] / UNIT_ROUNDOFF["float32"]


def with_families(test):
    return pytest.mark.parametrize("family", FAMILIES)(settings(PROFILE)(given(data=st.data())(test)))


# -- the cache --------------------------------------------------------------------------------------------------------


@with_families
def test_any_chunking_with_the_cache_equals_the_whole_sequence(family, data):
    subject = drawn(data, family)
    b, t = subject.shape
    cuts = sorted(data.draw(st.sets(st.integers(1, t - 1)) if t > 1 else st.just(set()), "cuts"))
    room = data.draw(st.integers(0, 3), "room")

    def law(subject):
        cache, parts = subject.new_cache(t + room), []
        for begin, end in zip([0, *cuts], [*cuts, t], strict=True):
            columns = slice(begin, end)
            start = np.full(b, begin)
            parts.append(subject.step(subject.ids[:, columns], subject.mask[:, columns], cache, start))
        return np.concatenate(parts, 1)[subject.mask], subject.whole()[subject.mask]

    holds(law, subject)


@with_families
def test_prompts_of_any_length_and_one_token_a_step(family, data):
    """What generation does: ragged prompts together, then each row goes on at its own position."""
    subject = drawn(data, family)
    b, t = subject.shape
    steps = data.draw(st.integers(0, 4), "steps")
    more = np.random.default_rng(subject.seed).integers(0, subject.config["vocabulary_size"], (b, steps))

    def law(subject):
        model, cache = subject.model, subject.new_cache(t + steps)
        scores = [model.prefill(subject.ids, subject.mask, subject.lengths, cache, np.zeros(b, int))]
        one = np.ones((b, 1), bool)
        scores += [model.decode_step(more[:, i : i + 1], one, subject.lengths + i, cache) for i in range(steps)]
        wanted = []
        for row, length in enumerate(subject.lengths):
            ids = np.concatenate([subject.ids[row, :length], more[row]])[None]
            one = slice(row, row + 1)
            hidden = subject.whole(ids, np.ones(ids.shape, bool), subject.source[one], subject.source_mask[one])
            wanted.append(subject.logits(hidden)[0, length - 1 :])
        return np.stack(scores, 1), np.stack(wanted)

    holds(law, subject)


@with_families
def test_greedy_search_takes_the_best_token_of_the_whole_sequence(family, data):
    subject = drawn(data, family).twin("float64")
    inputs = {"token_ids": subject.ids, "padding_mask": subject.mask}
    if family == "t5":
        inputs = {f"decoder_{key}": value for key, value in inputs.items()}
        inputs |= {"encoder_token_ids": subject.source, "encoder_padding_mask": subject.source_mask}
    outputs = TASKS[family](subject.model).generate(inputs, stop_token_ids=None, max_new_tokens=4, strip_prompt=True)
    answers, real = (outputs[key] for key in outputs)
    assert real.all()
    for row, length in enumerate(subject.lengths):
        ids, one = subject.ids[row, :length].tolist(), slice(row, row + 1)
        for token in answers[row]:
            hidden = subject.whole(np.array([ids]), np.ones((1, len(ids)), bool), subject.source[one], subject.source_mask[one])
            scores = subject.logits(hidden)[0, -1]
            assert scores[token] >= scores.max() - 1e-9 * np.abs(scores).max()
            ids.append(int(token))


# -- padding ----------------------------------------------------------------------------------------------------------


@with_families
def test_padding_appended_changes_nothing(family, data):
    subject = drawn(data, family)
    b, t = subject.shape
    more, more_source = data.draw(st.integers(1, 4), "padding"), data.draw(st.integers(0, 3), "padding of the source")
    filler = np.random.default_rng(subject.seed).integers(0, subject.config["vocabulary_size"], (b, 9))

    def law(subject):
        ids, mask = np.concatenate([subject.ids, filler[:, :more]], 1), np.pad(subject.mask, ((0, 0), (0, more)))
        source = np.concatenate([subject.source, filler[:, 4 : 4 + more_source]], 1)
        source_mask = np.pad(subject.source_mask, ((0, 0), (0, more_source)))
        return subject.whole(ids, mask, source, source_mask)[:, :t][subject.mask], subject.whole()[subject.mask]

    holds(law, subject)


@with_families
def test_what_stands_in_the_padding_is_not_seen(family, data):
    """Bitwise: a masked key has weight 0."""
    subject = drawn(data, family)
    other = np.random.default_rng(subject.seed).integers(0, subject.config["vocabulary_size"], (subject.shape[0], 20))
    ids = np.where(subject.mask, subject.ids, other[:, : subject.shape[1]])
    source = np.where(subject.source_mask, subject.source, other[:, 10:14])
    np.testing.assert_array_equal(subject.whole(ids, source=source)[subject.mask], subject.whole()[subject.mask])


@with_families
def test_padding_in_front_changes_nothing(family, data):
    """For OPT with position_ids that count the real tokens; BLOOM's and T5's positions are relative in any case."""
    subject = drawn(data, family)
    t = subject.shape[1]
    front = data.draw(st.integers(1, 4), "padding")
    left = front + t - subject.lengths[:, None]

    def law(subject):
        columns = np.arange(front + t)
        real = columns >= left
        ids = np.take_along_axis(subject.ids, np.maximum(columns - left, 0), 1)
        others = {"position_ids": np.maximum(columns - left, 0)} if family == "opt" else {}
        return subject.whole(ids, real, **others)[real], subject.whole()[subject.mask]

    holds(law, subject)


def test_opt_without_position_ids_counts_from_the_first_column():
    """OPT-C1: so padding in front does matter then, and position_ids of 0, 1, ... are the default."""
    subject = Subject("opt", config_of("opt"), 1, (2, 4))
    ids, ones = np.pad(subject.ids, ((0, 0), (2, 0))), np.pad(np.ones((2, 4), bool), ((0, 0), (2, 0)))
    plain = subject.whole(ids, ones)
    np.testing.assert_array_equal(subject.whole(ids, ones, position_ids=np.tile(np.arange(6), (2, 1))), plain)
    assert np.abs(plain[:, 2:] - subject.whole(subject.ids, np.ones((2, 4), bool))).max() > 1e-2


def test_t5_does_not_see_padding_of_the_encoder():
    subject = Subject("t5", config_of("t5"), 3, (2, 4))
    subject.source_mask = np.array([[True, True, False, False], [True, True, True, False]])
    before = subject.whole()
    changed = subject.source.copy()
    changed[~subject.source_mask] = (changed[~subject.source_mask] + 1) % subject.config["vocabulary_size"]
    np.testing.assert_array_equal(subject.whole(source=changed), before)
    changed[0, 0] = (changed[0, 0] + 1) % subject.config["vocabulary_size"]
    after = subject.whole(source=changed)
    assert (after[0] != before[0]).any(-1).all()  # every position sees every real token of the source
    np.testing.assert_array_equal(after[1], before[1])


@with_families
def test_a_row_without_a_real_token_is_finite_and_harms_no_other(family, data):
    subject = drawn(data, family)
    b = subject.shape[0]
    row = data.draw(st.integers(0, b - 1), "row")
    mask, source_mask = subject.mask.copy(), subject.source_mask.copy()
    mask[row] = source_mask[row] = False
    got, others = subject.whole(mask=mask, source_mask=source_mask), np.arange(b) != row
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got[others][subject.mask[others]], subject.whole()[others][subject.mask[others]])
    for dtype in ("float16", "bfloat16"):
        assert np.isfinite(subject.twin(dtype).whole(mask=mask, source_mask=source_mask).astype(np.float32)).all()


# -- order and batch --------------------------------------------------------------------------------------------------


@with_families
def test_the_future_changes_nothing_before_it(family, data):
    """Bitwise at every position before the change; and the change is seen from there on."""
    subject = drawn(data, family)
    b, t = subject.shape
    place = data.draw(st.integers(0, t - 1), "place")
    ids, ones = subject.ids.copy(), np.ones((b, t), bool)
    ids[:, place:] = (ids[:, place:] + 1) % subject.config["vocabulary_size"]
    before, after = subject.whole(mask=ones), subject.whole(ids, ones)
    np.testing.assert_array_equal(after[:, :place], before[:, :place])
    assert (after[:, place] != before[:, place]).any(-1).all()


@with_families
def test_a_batch_is_its_rows(family, data):
    subject = drawn(data, family)

    def law(subject):
        rows = [subject.whole(rows=slice(i, i + 1)) for i in range(subject.shape[0])]
        return np.concatenate(rows), subject.whole()

    holds(law, subject)


@settings(PROFILE)
@given(data=st.data())
def test_t5_encoder_is_one_batch_of_rows_in_any_order(data):
    subject = drawn(data, "t5", rows=4)
    order = np.random.default_rng(subject.seed).permutation(subject.shape[0])
    got = subject.whole(rows=order)

    def law(subject):
        return subject.whole(rows=order), subject.whole()[order]

    assert got.shape == (*subject.shape, subject.config["hidden_dim"])
    holds(law, subject)


# -- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["opt", "t5"])
@settings(PROFILE)
@given(data=st.data())
def test_heads_have_no_order(family, data):
    """Permuting the heads of every layer in query, key, value, output (and T5's bias table) leaves the result alone."""
    subject = drawn(data, family)
    config, heads = subject.model.config, subject.config["num_heads"]
    order = np.random.default_rng(subject.seed).permutation(heads)
    columns = np.arange(heads * config.head_dim).reshape(heads, -1)[order].reshape(-1)

    def permuted(tree):
        if isinstance(tree, list):
            return [permuted(child) for child in tree]
        if not isinstance(tree, dict):
            return tree
        tree = {key: permuted(child) for key, child in tree.items()}
        if "query" in tree:
            for part in ("query", "key", "value"):
                tree[part] = {name: x[..., columns] for name, x in tree[part].items()}
            tree["output"] = {**tree["output"], "kernel": tree["output"]["kernel"][columns]}
        if "relative_attention_bias" in tree:
            tree["relative_attention_bias"] = {"embeddings": tree["relative_attention_bias"]["embeddings"][:, order]}
        return tree

    def law(subject):
        wanted, original = subject.whole(), subject.model.params
        subject.model.params = permuted(original)
        got = subject.whole()
        subject.model.params = original
        return got, wanted

    holds(law, subject)


def test_alibi_gives_heads_an_order():
    """The same permutation on BLOOM does change the result: a slope belongs to its head."""
    subject = Subject("bloom", config_of("bloom"), 2, (1, 6))
    before = subject.whole(mask=np.ones((1, 6), bool))
    columns = np.arange(6).reshape(3, 2)[[1, 0, 2]].reshape(-1)
    for layer in subject.model.params["layers"]:
        p = layer["self_attention"]
        for part in ("query", "key", "value"):
            p[part] = {name: x[..., columns] for name, x in p[part].items()}
        p["output"]["kernel"] = p["output"]["kernel"][columns]
    assert np.abs(subject.whole(mask=np.ones((1, 6), bool)) - before).max() > 1e-3


# -- cost -------------------------------------------------------------------------------------------------------------


def config_of(family):
    config = {"vocabulary_size": 11, "num_layers": 2, "num_heads": 3, "hidden_dim": 6, "intermediate_dim": 7}
    return {**config, "max_sequence_length": 40} if family == "opt" else config


def counting(counts):
    def observer(op, args, kwargs, proceed):
        counts[op.name] += 1
        return proceed()

    return watching(observer)


@pytest.mark.parametrize("sampling", [{}, {"top_k": 3, "seed": 1}], ids=str)
def test_t5_encodes_its_input_once(sampling):
    subject, counts = Subject("t5", config_of("t5"), 5, (3, 2)), Counter()
    inputs = {"encoder_token_ids": subject.source, "encoder_padding_mask": subject.source_mask}
    with counting(counts):
        T5Seq2SeqLM(subject.model).generate(inputs, stop_token_ids=None, max_new_tokens=6, **sampling)
    assert counts["t5_encoder"] == counts["t5_cross_keys_values"] == counts["t5_cache"] == counts["t5_prefill"] == 1
    assert counts["t5_decode_step"] == 5
    layers = subject.config["num_layers"]
    # Keys and values: each encoder layer once, each cross-attention once, and self-attention's new token for every step.
    assert counts["t5_keys_values"] == layers + layers + 6 * layers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decode_step_makes_the_same_calls_wherever_it_stands(family):
    subject = Subject(family, config_of(family), 5, (2, 3))
    cache, steps, shapes = subject.new_cache(30), [], []
    subject.model.prefill(subject.ids, subject.mask, subject.lengths, cache, np.zeros(2, int))
    for i in range(20):
        counts = Counter()

        def observer(op, args, kwargs, proceed, counts=counts):
            counts[op.name] += 1
            if op.name == "linear":
                assert args[0].shape[1] == 1  # one token goes through the layers, however many are in the cache
            return proceed()

        with watching(observer):
            subject.model.decode_step(np.zeros((2, 1), int), np.ones((2, 1), bool), subject.lengths + i, cache)
        steps.append(counts)
        shapes.append(sum(counts.values()))
    assert len(set(shapes)) == 1
    assert all(counts == steps[0] for counts in steps)
    assert steps[0]["linear"] > 0


# -- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_acts_in_training_alone_and_comes_from_its_generator(family):
    still, noisy = (Subject(family, {**config_of(family), "dropout": rate}, 7, (2, 5)) for rate in (0.0, 0.5))
    inputs = {"token_ids": still.ids, "padding_mask": still.mask}
    if family == "t5":
        inputs = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in inputs.items()}

    def run(subject, **arguments):
        outputs = subject.model(inputs, **arguments)
        return outputs["decoder_sequence_output"] if family == "t5" else outputs

    np.testing.assert_array_equal(run(noisy), run(still))
    np.testing.assert_array_equal(run(noisy, rng=np.random.default_rng(1)), run(still))
    np.testing.assert_array_equal(run(noisy, training=False, rng=np.random.default_rng(1)), run(still))
    np.testing.assert_array_equal(run(still, training=True), run(still))
    once, again = (run(noisy, training=True, rng=np.random.default_rng(1)) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - run(still)).max() > 1e-2
    assert np.abs(once - run(noisy, training=True, rng=np.random.default_rng(2))).max() > 1e-2
    assert np.isfinite(once).all()
    with pytest.raises(ValueError, match="needs rng"):
        run(noisy, training=True)


@pytest.mark.parametrize(("family", "sites"), [("opt", 3 * 2), ("bloom", 3 * 2), ("t5", 2 * (4 + 6) + 4)])
def test_dropout_stands_where_the_originals_have_it(family, sites):
    """OPT, BLOOM: weights, both outputs. T5: both ends of a stack, weights, outputs, and the inner layer."""
    subject, counts = Subject(family, {**config_of(family), "dropout": 0.3}, 7, (2, 5)), Counter()
    with counting(counts):
        subject.whole()
    assert counts["dropout"] == sites


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_types_follow_the_policy(family, dtype):
    subject = Subject(family, config_of(family), 9, (2, 4)).twin(dtype)
    stored, computed = numpy_dtype(variable_dtype(dtype)), numpy_dtype(compute_dtype(dtype))
    assert (stored, computed) == tuple(map(numpy_dtype, POLICIES[dtype]))
    fresh = BACKBONES[family](**config_of(family), dtype=dtype, seed=1)
    assert {leaf.dtype for _, leaf in flatten(fresh.params)} == {stored}
    hidden = subject.whole()
    assert hidden.dtype == computed
    assert subject.logits(hidden).dtype == computed
    cache = subject.new_cache(6)
    kept = {leaf.dtype for path, leaf in flatten(cache["layers"])}
    assert kept == {computed}
    scores = subject.model.prefill(subject.ids, subject.mask, subject.lengths, cache, np.zeros(2, int))
    assert scores.dtype == computed
    assert subject.model.decode_step(subject.ids[:, :1], np.ones((2, 1), bool), subject.lengths, cache).dtype == computed


@pytest.mark.parametrize("dtype", [name for name in POLICIES if "16" in name])
@with_families
def test_a_half_precision_run_is_near_the_float64_run(family, dtype, data):
    """How near: rounding every activation moves the result about as far as moving every weight by one roundoff does.

    So the error is held to `calibrated()` with, in place of the reference's own error, that of a float64 run on weights
    perturbed by a random relative u. The types differ by 2**13 and 2**16 from float32's: one missing rounding to float32 shows.
    """
    subject = drawn(data, family)
    half = subject.twin(dtype)
    exact = half.twin("float64")
    u, rng = UNIT_ROUNDOFF[compute_dtype(dtype)], np.random.default_rng(subject.seed)
    truth = exact.whole()
    moved = np.zeros(truth.shape)
    original = exact.model.params
    for _ in range(4):
        exact.model.params = mapped(original, lambda x: x * (1 + u * rng.choice([-1.0, 1.0], x.shape)))
        moved = np.maximum(moved, np.abs(exact.whole() - truth))
    got = half.whole()
    verdict = compare(got, truth, calibrated(), wanted=(truth + moved).astype(np.float64))
    assert verdict, verdict
    if truth.size > 20:
        assert np.abs(got.astype(np.float64) - truth).max() > 0  # it did compute in halves


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_stays_float32_in_half_precision(family):
    """Scores, softmax and position biases: float32 or wider under every policy."""
    subject, seen = Subject(family, config_of(family), 9, (2, 4)), {}

    def observer(op, args, kwargs, proceed):
        result = proceed()
        if op.name in ("attention_scores", "masked_softmax", "alibi_bias", "relative_position_bias"):
            seen.setdefault(op.name, set()).add(result.dtype.name)
        return result

    for dtype in ("float16", "bfloat16", "mixed_float16", "mixed_bfloat16"):
        with watching(observer):
            subject.twin(dtype).whole()
    assert set(seen) >= {"attention_scores", "masked_softmax"}
    assert all(types == {"float32"} for types in seen.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_drawn_by_its_seed(family):
    first, same, other = (BACKBONES[family](**config_of(family), seed=seed) for seed in (1, 1, 2))
    leaves = [dict(flatten(model.params)) for model in (first, same, other)]
    for path, leaf in leaves[0].items():
        np.testing.assert_array_equal(leaf, leaves[1][path])
    assert any((leaf != leaves[2][path]).any() for path, leaf in leaves[0].items())
