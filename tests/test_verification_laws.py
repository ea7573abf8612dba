"""Laws that need no reference: each is broken by a planted fault, and kept by right candidates in other orders of summation."""

import numpy as np
import pytest
from loopback import Loopback

from refmodels.bloom import BloomBackbone
from refmodels.ops.precision import narrow, numpy_dtype, wide
from refmodels.opt import OPTBackbone
from refmodels.parameters import build_tree
from refmodels.t5 import T5Backbone
from refmodels.verification.adaptors.own import OwnCandidate
from refmodels.verification.bounds import bounds, difference
from refmodels.verification.candidate import Candidate, CandidateError
from refmodels.verification.lanes import Arithmetic
from refmodels.verification.laws import LAWS, check_laws, law_inputs, token_steps

CLASSES = {"opt": OPTBackbone, "bloom": BloomBackbone, "t5": T5Backbone}
FAMILIES = tuple(CLASSES)


def tiny(family, dtype="float32", *, layers=1, vocabulary=40, longest=40, **config):
    """A model whose every parameter matters."""
    if family == "opt":
        config |= {"max_sequence_length": longest}
    model = CLASSES[family](
        vocabulary_size=vocabulary, num_layers=layers, num_heads=2, hidden_dim=16, intermediate_dim=24, dtype=dtype, **config
    )
    rng = np.random.default_rng(7)

    def leaf(parameter):
        values = 0.3 * rng.standard_normal(parameter.shape) + parameter.path.endswith(("gamma", "weight"))
        return values.astype(numpy_dtype(dtype))

    model.params = build_tree(model.plain_parameters(), leaf)
    return model


def laws_of(candidate, model, inputs=None):
    return {result.name: result for result in check_laws(candidate, model, inputs)}


def broken(results):
    return {name for name, result in results.items() if result.verdict is not None and not result.verdict.ok}


# -- right candidates -----------------------------------------------------------------------------------------------------


def reordered(op, args, kwargs, proceed):
    """Every sum in an order that depends on the shape, so on batch, padding and chunks; dense layers in two halves that are
    rounded, and the bias after that."""
    if op.name not in ("linear", "logits_from_embeddings", "attention_context", "attention_scores"):
        return proceed()
    bound = op.signature.bind(*args, **kwargs).arguments
    if op.name == "linear":
        x, kernel, bias = bound["x"], bound["kernel"], bound.get("bias")
        dtype = numpy_dtype(bound["dtype"]) if bound.get("dtype") else x.dtype
        order = np.random.default_rng(x.shape).permutation(len(kernel))
        half = len(order) // 2
        parts = [wide(x)[..., part] @ wide(kernel)[part] for part in (order[:half], order[half:])]
        y = narrow(wide(narrow(parts[0], dtype)) + wide(narrow(parts[1], dtype)), dtype)
        return y if bias is None else narrow(wide(y) + wide(bias), dtype)
    if op.name == "logits_from_embeddings":
        order = np.random.default_rng(bound["x"].shape).permutation(bound["x"].shape[-1])
        return op.reference(bound["x"][..., order], bound["embeddings"][:, order], scale=bound["scale"])
    if op.name == "attention_context":
        weights, value = bound["weights"], bound["value"]
        order = np.random.default_rng(weights.shape).permutation(weights.shape[-1])
        return op.reference(weights[..., order], value[:, order])
    order = np.random.default_rng(bound["key"].shape).permutation(bound["key"].shape[-1])
    return op.reference(bound["query"][..., order], bound["key"][..., order], bound.get("bias"), scale=bound["scale"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_candidate_keeps_every_law(family, dtype):
    model = tiny(family, dtype)
    results = laws_of(OwnCandidate(model, observer=reordered), model)
    assert broken(results) == set()
    assert {name for name, result in results.items() if result.verdict is None} == (
        {"padding on the left"} if family == "opt" else set()
    )
    assert results["two runs"].bitwise
    assert results["batch = singles"].bitwise is False  # the order did change something, and that is a fact
    assert len(results) == len(LAWS) + 3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_keeps_every_law(family):
    model = tiny(family, layers=2)
    results = laws_of(OwnCandidate(model), model)
    assert broken(results) == set()
    assert all(not result.fault for result in results.values())
    assert results["rows reordered"].verdict.bound < 1e-3  # and the bounds are worth something


# -- wrong ones -------------------------------------------------------------------------------------------------------------


def mixed_rows(op, args, kwargs, proceed):
    y = proceed()
    return y + y.mean(0) / 4 if op.name == "linear" else y


def numbered_rows(op, args, kwargs, proceed):
    y = proceed()
    return y * (1 + np.arange(len(y), dtype=y.dtype)[:, None, None] / 8) if op.name == "linear" else y


def pooled_length(op, args, kwargs, proceed):
    y = proceed()
    return y + y.mean(1, keepdims=True) / 4 if op.name in ("layer_norm", "rms_norm") else y


def unmasked(op, args, kwargs, proceed):
    """Padding is not masked, neither in the causal mask nor as keys of the encoder."""
    if op.name == "causal_mask":
        return op.reference(args[0], np.ones_like(args[1]))
    return op.reference(np.ones_like(args[0])) if op.name == "key_mask" else proceed()


def looks_ahead(op, args, kwargs, proceed):
    return op.reference(args[0] + 1, args[1]) if op.name == "causal_mask" else proceed()


def absolute_distances(op, args, kwargs, proceed):
    """Positions of the encoder that count padding in an absolute way."""
    if op.name == "relative_position_buckets" and kwargs["bidirectional"]:
        return op.reference(args[0] * 2, *args[1:], **kwargs)
    return proceed()


def dropout_left_on():
    rng = np.random.default_rng(3)

    def observer(op, args, kwargs, proceed):
        return op.reference(args[0], 0.2, rng) if op.name == "dropout" else proceed()

    return observer


RUN_FAULTS = [
    ("opt", mixed_rows, {"batch = singles"}, "rows-not-independent"),
    ("bloom", numbered_rows, {"batch = singles", "rows reordered"}, "rows-not-independent"),
    ("opt", pooled_length, {"padding on the right", "padding unseen"}, "padding-leaks"),
    ("bloom", unmasked, {"padding on the left"}, "padding-leaks"),
    ("t5", unmasked, {"padding on the right", "padding on the left", "padding unseen"}, "padding-leaks"),
    ("t5", absolute_distances, {"padding on the left"}, "padding-leaks"),
    ("opt", looks_ahead, {"future unseen"}, "future-leaks"),
    ("bloom", looks_ahead, {"future unseen"}, "future-leaks"),
    ("t5", looks_ahead, {"future unseen"}, "future-leaks"),
]


IN_HALF = [
    ("t5", mixed_rows, {"batch = singles"}, "rows-not-independent", "bfloat16"),
    ("bloom", numbered_rows, {"batch = singles", "rows reordered"}, "rows-not-independent", "float16"),
    ("bloom", unmasked, {"padding on the left"}, "padding-leaks", "float16"),
    ("t5", unmasked, {"padding on the right", "padding unseen"}, "padding-leaks", "bfloat16"),
]


@pytest.mark.parametrize(("family", "fault", "laws", "name", "dtype"), [(*f, "float32") for f in RUN_FAULTS] + IN_HALF)
def test_a_fault_breaks_its_law(family, fault, laws, name, dtype):
    model = tiny(family, dtype)
    results = laws_of(OwnCandidate(model, observer=fault), model)
    assert laws <= broken(results), {law: str(result.verdict) for law, result in results.items()}
    assert {results[law].fault for law in laws} == {name}
    assert all(results[law].bitwise is False and results[law].says for law in laws)
    assert results["two runs"].verdict.ok
    if fault in (mixed_rows, unmasked):
        assert results["rows reordered"].verdict.ok


def test_dropout_left_on_is_not_called_a_leak():
    model = tiny("opt")
    results = laws_of(OwnCandidate(model, observer=dropout_left_on()), model)
    assert {"two runs", "batch = singles", "padding unseen"} <= broken(results)
    assert {results[law].fault for law in broken(results)} == {"not-deterministic"}


def test_the_first_step_that_breaks_a_law_is_named():
    def fault(op, args, kwargs, proceed):
        y = proceed()
        return y + y.mean(0) if op.name == "linear" and args[1] is second else y

    model = tiny("opt", layers=2)
    second = model.device_params["layers"][1]["self_attention"]["value"]["kernel"]
    results = laws_of(OwnCandidate(model, observer=fault), model)
    assert results["batch = singles"].verdict.reason.startswith("layers.1.self_attention.value:linear: difference")


# -- caches ---------------------------------------------------------------------------------------------------------------


def appended(keep):
    """A cache that keeps its old keys or values: `keep(number of the call)` for the chunks after the first."""

    def make():
        calls = 0

        def observer(op, args, kwargs, proceed):
            nonlocal calls
            if op.name != "cache_append" or args[0].ndim != 4:
                return proceed()
            calls += 1
            if args[2] is None or args[2].max() == 0 or not keep(calls):
                return proceed()
            before = args[0].copy()
            view = proceed()
            args[0][...] = before
            return view

        return observer

    return make


def positions_off():
    """The position of what comes with the cache is one too high, where OPT and T5 look it up."""

    def observer(op, args, kwargs, proceed):
        if op.name == "relative_position_buckets" and args[0].min() > 0:
            return op.reference(args[0] + 1, *args[1:], **kwargs)
        if op.name == "embedding" and "embeddings" in kwargs and args[0].min() > 0:
            return op.reference(args[0] + 1, **kwargs)
        return proceed()

    return observer


def slots_off():
    def observer(op, args, kwargs, proceed):
        if op.name == "cache_append" and args[0].ndim == 4 and args[2] is not None and args[2].min() > 0:
            end = int(args[2].max()) + args[1].shape[1]
            op.reference(args[0], args[1], args[2] - 1)  # on the last of those before
            return args[0][:, :end]
        return proceed()

    return observer


def chunk_sees_itself():
    """Inside a chunk behind the first every query sees all keys: one token at a time hides it."""

    def observer(op, args, kwargs, proceed):
        if op.name == "causal_mask" and args[0].min() > 0:
            return op.reference(np.full_like(args[0], args[0].max()), args[1])
        return proceed()

    return observer


@pytest.mark.parametrize(
    ("family", "make", "laws", "name"),
    [
        ("opt", appended(lambda call: True), {"cache = no cache", "chunks = whole"}, "stale-cache"),
        ("bloom", appended(lambda call: call % 2), {"cache = no cache", "chunks = whole"}, "stale-cache"),
        ("t5", appended(lambda call: not call % 2), {"cache = no cache", "chunks = whole"}, "stale-cache"),
        ("opt", positions_off, {"cache = no cache", "chunks = whole"}, "cache-off-by-one"),
        ("t5", positions_off, {"cache = no cache", "chunks = whole"}, "cache-off-by-one"),
        ("bloom", slots_off, {"cache = no cache", "chunks = whole"}, "cache-off-by-one"),
        ("opt", chunk_sees_itself, {"chunks = whole"}, "cache-wrong"),
    ],
)
def test_a_fault_of_the_cache(family, make, laws, name):
    model = tiny(family, longest=48)

    class Chunked(OwnCandidate):
        def run(self, inputs, inject=None):
            return OwnCandidate(model).run(inputs, inject)

        def chunked(self, inputs, sizes):
            return OwnCandidate(model, observer=make()).chunked(inputs, sizes)

    results = laws_of(Chunked(model), model)
    assert broken(results) == laws
    assert {results[law].fault for law in laws} == {name}


def test_an_encoded_text_that_stays_in_the_cache():
    model = tiny("t5")

    class Stale(OwnCandidate):
        first = None

        def chunked(self, inputs, sizes):
            encoder = {key: array for key, array in inputs.items() if key.startswith("encoder")}
            self.first = self.first or encoder
            return super().chunked({**inputs, **self.first}, sizes)

    results = laws_of(Stale(model), model)
    assert broken(results) == {"cache starts empty"}
    assert results["cache starts empty"].fault == "stale-cache"


def test_a_cache_that_keeps_the_text_before():
    model = tiny("bloom")

    class Stale(OwnCandidate):
        before = None

        def chunked(self, inputs, sizes):
            found = super().chunked(inputs, sizes)
            found, self.before = (found if self.before is None else found + self.before / 8), found
            return found

    assert "cache starts empty" in broken(laws_of(Stale(model), model))


# -- what cannot be asked -----------------------------------------------------------------------------------------------------


class Outputs(Candidate):
    """Logits alone, and no cache."""

    name, dtype = "outputs", "float32"

    def __init__(self, model, fault=None):
        self.own = OwnCandidate(model, observer=fault)
        self.logits = f"{model.family}_logits"

    def run(self, inputs, inject=None):
        return {self.logits: self.own.run(inputs)[self.logits]}


def test_outputs_alone_are_enough():
    model = tiny("t5")
    assert broken(laws_of(Outputs(model), model)) == set()
    results = laws_of(Outputs(model, unmasked), model)
    assert "padding unseen" in broken(results)
    for name in ("cache = no cache", "chunks = whole", "cache starts empty"):
        assert results[name].verdict is None
        assert "no cache" in results[name].reason


def test_a_candidate_that_takes_one_row_alone():
    model = tiny("opt")

    class One(OwnCandidate):
        def run(self, inputs, inject=None):
            if len(inputs["token_ids"]) == 1:
                raise CandidateError("the batch must be 3")
            return super().run(inputs, inject)

    results = laws_of(One(model), model)
    assert results["batch = singles"].verdict is None
    assert "the batch must be 3" in results["batch = singles"].reason
    assert broken(results) == set()


def test_a_candidate_that_fails_has_no_verdict():
    class Broken(Candidate):
        name, dtype = "broken", "float32"

        def run(self, inputs, inject=None):
            raise CandidateError("no such file")

    model = tiny("opt")
    results = laws_of(Broken(), model)
    assert all(result.verdict is None for result in results.values())
    assert "no such file" in results["two runs"].reason


def test_inputs_of_ones_own_and_laws_that_they_cannot_show():
    model = tiny("opt", longest=5)
    results = laws_of(OwnCandidate(model), model, {"token_ids": np.array([[5, 6, 7, 8, 9]])})
    reasons = {name: result.reason for name, result in results.items() if result.verdict is None}
    assert reasons["batch = singles"] == "these inputs have one row"
    assert reasons["padding on the right"] == "these inputs have the greatest length, 5"
    assert reasons["padding unseen"] == "these inputs have no padding"
    assert "OPT-C1" in reasons["padding on the left"]
    assert broken(results) == set()


def test_nan_is_a_difference():
    first, second = np.zeros((1, 2, 3)), np.zeros((1, 2, 3))
    second[0, 1, 2] = np.nan
    verdict, same = difference(first, second, 1.0, None, "float32", "x")
    assert not verdict.ok
    assert not same
    assert difference(second, second, 0.0, None, "float32", "x")[0].ok
    counted = np.array([[True, False]])
    assert difference(first, second, 1.0, counted, "float32", "x")[0].ok


def test_overflow_is_no_difference_where_the_bound_reaches_it():
    first, second = np.array([[[65500.0, np.inf]]]), np.array([[[np.inf, np.inf]]])
    assert difference(first, second, 64.0, None, "float16", "x")[0].ok
    assert not difference(first, second, 1.0, None, "float16", "x")[0].ok
    assert not difference(first, -second, 64.0, None, "float16", "x")[0].ok


# -- bounds and own candidate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_bounds_grow_with_the_second_look_and_with_declared_products(family):
    model = tiny(family)
    inputs, name = law_inputs(model), f"{family}_logits"
    plain = bounds(model, inputs, Arithmetic("float32"), {name}.__contains__)[name].bound
    looked = bounds(model, inputs, Arithmetic("float32"), {name}.__contains__, second_look=True)[name].bound
    tf32 = bounds(model, inputs, Arithmetic("float32", "tf32"), {name}.__contains__)[name].bound
    assert 0 < plain <= looked < tf32


@pytest.mark.parametrize("family", FAMILIES)
def test_most_steps_are_compared(family):
    model = tiny(family)
    steps = token_steps(model, model.checked(law_inputs(model)))
    assert f"{family}_logits" in steps
    assert len(steps) > 20
    if family == "t5":
        assert steps["decoder.layers.0.cross_attention.key:linear"] == "encoder_"
        assert steps["decoder.layers.0.cross_attention.query:linear"] == "decoder_"


@pytest.mark.parametrize("family", FAMILIES)
def test_our_own_candidate(family):
    model = tiny(family)
    inputs = law_inputs(model)
    own = OwnCandidate(model)
    steps = own.run(inputs)
    name = f"{family}_logits"
    middle = next(step for step in steps if step.endswith(("opt_decoder_layer", "bloom_decoder_layer", "t5_feedforward")))
    injected = own.run(inputs, {middle: np.zeros_like(steps[middle])})
    np.testing.assert_array_equal(injected[middle], steps[middle])  # its own value all the same
    assert not np.allclose(injected[name], steps[name])
    np.testing.assert_array_equal(own.run(inputs, {middle: steps[middle]})[name], steps[name])
    with pytest.raises(ValueError, match="add up"):
        own.chunked(inputs, [1, 2])


@pytest.mark.parametrize("family", FAMILIES)
def test_our_own_candidate_on_an_accelerator(family):
    """Its arrays are opaque: what is recorded has come to the host."""
    model = tiny(family)
    inputs, name = law_inputs(model), f"{family}_logits"
    plain, accelerated = OwnCandidate(model), OwnCandidate(model, Loopback())
    assert accelerated.name == f"{model.name} on loopback"
    steps = accelerated.run(inputs)
    np.testing.assert_array_equal(steps[name], plain.run(inputs)[name])
    assert sum(step.endswith(":linear") for step in steps) >= 6
    np.testing.assert_array_equal(accelerated.chunked(inputs, [1] * 3 + [steps[name].shape[1] - 3]).shape, steps[name].shape)
    np.testing.assert_array_equal(accelerated.generate(inputs, 3), plain.generate(inputs, 3))
    assert broken(laws_of(accelerated, model)) == set()
