"""The error models: right arithmetic in any order passes, planted errors fail, and nothing right is ever refused."""

import math

import ml_dtypes
import numpy as np
import pytest

from refmodels.numerics import (
    UNIT_ROUNDOFF,
    Verdict,
    calibrated,
    compare,
    exact,
    judge,
    judge_run,
    multilinear,
    spacing,
    ulps,
    unit_roundoff,
    widened,
)
from refmodels.op import OPS, Array, Float, Int, op
from refmodels.ops.attention import attention_context, attention_scores, masked_softmax
from refmodels.ops.cache import cache_append
from refmodels.ops.elementwise import add, dropout, relu, silu
from refmodels.ops.linear import embedding, linear, logits_from_embeddings
from refmodels.ops.norm import layer_norm, rms_norm
from refmodels.ops.precision import numpy_dtype
from refmodels.ops.sampling import beam_candidates, greedy_token, log_softmax
from refmodels.opt import OPTConfig
from refmodels.t5 import T5Backbone, t5_cross_keys_values

FLOATS = ("float32", "float64", "float16", "bfloat16")
HALVES = ("float16", "bfloat16")


def normal(seed, *shape, dtype="float32", scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(numpy_dtype(dtype))


# -- other orders of the same arithmetic ------------------------------------------------------------------------------


def sum_forward(products):
    if not products.shape[-1]:
        return products.sum(-1)
    total = np.zeros_like(products[..., 0])
    for i in range(products.shape[-1]):
        total = total + products[..., i]
    return total


def sum_pairwise(products):
    n = products.shape[-1]
    if n <= 1:
        return products.sum(-1)
    return sum_pairwise(products[..., : n // 2]) + sum_pairwise(products[..., n // 2 :])


ORDERS = {
    "forward": sum_forward,
    "reversed": lambda products: sum_forward(products[..., ::-1]),
    "shuffled": lambda products: sum_forward(products[..., np.random.default_rng(0).permutation(products.shape[-1])]),
    "pairwise": sum_pairwise,
    "in blocks": lambda products: sum_forward(np.stack([sum_forward(products[..., i::8]) for i in range(8)], -1)),
}


def linear_in_order(x, kernel, bias, order, accumulate=None):
    """linear with its sums in this order and type; by default float32 or wider."""
    accumulate = accumulate or np.promote_types(np.float32, np.float64 if x.dtype == np.float64 else np.float32)
    products = x.astype(accumulate)[..., :, None].swapaxes(-1, -2) * kernel.astype(accumulate).T
    return (order(products) + bias.astype(accumulate)).astype(x.dtype)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sum_may_be_taken_in_any_order(dtype, order):
    for seed in range(20):
        x, kernel, bias = normal(seed, 3, 65, dtype=dtype), normal(seed + 100, 65, 7, dtype=dtype), normal(seed, 7, dtype=dtype)
        verdict = judge(linear, (x, kernel, bias), {}, linear_in_order(x, kernel, bias, ORDERS[order]))
        assert verdict, verdict


@pytest.mark.parametrize("order", ORDERS)
def test_a_sum_may_cancel(order):
    """1e8 - 1e8 + 1: the bound goes by the size of the terms, not by that of the sum."""
    for seed in range(20):
        x = normal(seed, 2, 64, scale=1e4)
        x[:, 32:] = -x[:, :32] + normal(seed + 1, 2, 32)
        kernel, bias = np.ones((64, 3), np.float32), np.zeros(3, np.float32)
        verdict = judge(linear, (x, kernel, bias), {}, linear_in_order(x, kernel, bias, ORDERS[order]))
        assert verdict, verdict


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e15])
def test_the_bound_moves_with_the_values(scale):
    """A fixed tolerance would pass anything when values are small, and nothing when they are large."""
    x, kernel, bias = normal(0, 4, 32, scale=scale), normal(1, 32, 5), np.zeros(5, np.float32)
    got = linear_in_order(x, kernel, bias, sum_pairwise)
    assert judge(linear, (x, kernel, bias), {}, got)
    wrong = got.copy()
    wrong[2, 3] += np.float32(scale) * np.float32(1e-3)
    verdict = judge(linear, (x, kernel, bias), {}, wrong)
    assert not verdict
    assert verdict.index == (2, 3)


def softmax_otherwise(scores, mask):
    """Without the peak taken away, sums in reverse: right where nothing overflows."""
    weights = np.where(mask, np.exp(scores), np.float32(0))
    return weights / sum_forward(weights[..., ::-1])[..., None]


def layer_norm_otherwise(x, gamma, beta, epsilon=1e-5):
    """Sums in reverse, a reciprocal square root, scale and shift folded into one product and one sum."""
    wide = x.astype(np.float32)
    n = np.float32(x.shape[-1])
    mean = (sum_forward(wide[..., ::-1]) / n)[..., None]
    variance = (sum_pairwise((wide - mean) ** 2) / n)[..., None]
    scale = gamma.astype(np.float32) * (np.float32(1) / np.sqrt(variance + np.float32(epsilon)))
    return (wide * scale + (beta.astype(np.float32) - mean * scale)).astype(x.dtype)


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
def test_calibrated_takes_other_right_ways(dtype):
    for seed in range(50):
        x = normal(seed, 6, 40, dtype=dtype, scale=3)
        gamma, beta = normal(seed + 1, 40, dtype=dtype), normal(seed, 40, dtype=dtype)
        verdict = judge(layer_norm, (x, gamma, beta), {}, layer_norm_otherwise(x, gamma, beta))
        assert verdict, verdict
        scores, mask = normal(seed, 2, 3, 4, 20, scale=4), np.random.default_rng(seed).random((2, 1, 4, 20)) < 0.8
        verdict = judge(masked_softmax, (scores, mask), {}, softmax_otherwise(scores, mask))
        assert verdict, verdict


# -- planted errors ---------------------------------------------------------------------------------------------------

WIDE_CALLS = {
    "linear": (linear, lambda d: (normal(0, 4, 33, dtype=d), normal(1, 33, 6, dtype=d), normal(2, 6, dtype=d))),
    "logits": (logits_from_embeddings, lambda d: (normal(0, 4, 33, dtype=d), normal(1, 6, 33, dtype=d))),
    "add": (add, lambda d: (normal(0, 4, 6, dtype=d), normal(1, 4, 6, dtype=d))),
    "relu": (relu, lambda d: (normal(0, 4, 6, dtype=d),)),
    "silu": (silu, lambda d: (normal(0, 4, 6, dtype=d),)),
    "layer_norm": (layer_norm, lambda d: (normal(0, 4, 6, dtype=d), normal(1, 6, dtype=d), normal(2, 6, dtype=d))),
    "rms_norm": (rms_norm, lambda d: (normal(0, 4, 6, dtype=d), normal(1, 6, dtype=d))),
    "log_softmax": (log_softmax, lambda d: (normal(0, 4, 6, dtype=d),)),
    "context": (attention_context, lambda d: (np.abs(normal(0, 1, 1, 4, 6)), normal(1, 1, 6, 1, 6, dtype=d))),
    "scores": (attention_scores, lambda d: (normal(0, 1, 4, 1, 6, dtype=d), normal(1, 1, 6, 1, 6, dtype=d))),
}


@pytest.fixture(params=[(name, dtype) for name in WIDE_CALLS for dtype in FLOATS], ids="-".join)
def right(request):
    """An op, its arguments, and a right result of four rows and six columns (whatever axes lie between)."""
    name, dtype = request.param
    entry, arguments = WIDE_CALLS[name]
    args = arguments(dtype)
    got = entry(*args)
    assert judge(entry, args, {}, got)
    return entry, args, got


def planted(got, change, place=7):
    wrong = got.copy()
    flat = wrong.reshape(-1)
    flat[place] = change(float(flat[place]))
    return wrong


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_value_fails(right, value):
    entry, args, got = right
    assert not judge(entry, args, {}, planted(got, lambda _: value))
    assert not judge(entry, args, {}, np.full_like(got, value))


def test_one_wrong_element_fails_and_is_named(right):
    entry, args, got = right
    largest = float(np.abs(got.astype(np.float64)).max())
    verdict = judge(entry, args, {}, planted(got, lambda y: y + 0.25 * largest + 0.25))
    assert not verdict
    assert np.ravel_multi_index(verdict.index, got.shape) == 7
    assert not judge(entry, args, {}, planted(got, lambda y: -y - 0.25 * largest))


def test_a_wrong_sign_row_or_order_fails(right):
    entry, args, got = right
    assert not judge(entry, args, {}, -got)
    assert not judge(entry, args, {}, got[..., ::-1])
    assert not judge(entry, args, {}, np.zeros_like(got))


def test_a_wrong_shape_or_type_fails(right):
    entry, args, got = right
    for wrong in (got[..., :-1], got[None], got.reshape(-1), got.sum()):
        verdict = judge(entry, args, {}, wrong)
        assert not verdict
        assert "shape" in verdict.reason
    other = "float64" if got.dtype != np.float64 else "float32"
    verdict = judge(entry, args, {}, got.astype(other))
    assert not verdict
    assert "dtype" in verdict.reason


@pytest.mark.parametrize("dtype", HALVES)
def test_accumulation_in_half_precision_fails(dtype):
    """Storage and accumulation are kept apart: halves are summed in float32, and a sum in halves is refused."""
    caught = 0
    for seed in range(20):
        x, kernel, bias = (
            np.abs(normal(seed, 3, 256, dtype=dtype)),
            np.abs(normal(seed + 1, 256, 5, dtype=dtype)),
            normal(2, 5, dtype=dtype),
        )
        assert judge(linear, (x, kernel, bias), {}, linear_in_order(x, kernel, bias, sum_forward, np.float32))
        caught += not judge(linear, (x, kernel, bias), {}, linear_in_order(x, kernel, bias, sum_forward, numpy_dtype(dtype)))
    assert caught == 20


def test_float32_accumulation_of_float64_fails():
    x, kernel, bias = (normal(i, *shape, dtype="float64") for i, shape in enumerate([(3, 64), (64, 5), (5,)]))
    assert not judge(linear, (x, kernel, bias), {}, linear_in_order(x, kernel, bias, sum_forward, np.float32))


def test_a_missing_bias_or_scale_fails():
    x, kernel, bias = normal(0, 3, 8), normal(1, 8, 5), normal(2, 5) * np.float32(0.01)
    assert not judge(linear, (x, kernel, bias), {}, linear(x, kernel))
    assert not judge(logits_from_embeddings, (x, normal(1, 5, 8)), {"scale": 0.5}, logits_from_embeddings(x, normal(1, 5, 8)))


def test_one_pass_variance_fails():
    """E x**2 - (E x)**2 cancels when the mean is far from 0."""
    x = normal(0, 4, 64) + np.float32(300)
    gamma, beta = np.ones(64, np.float32), np.zeros(64, np.float32)
    variance = (x * x).mean(-1, keepdims=True) - np.square(x.mean(-1, keepdims=True))
    wrong = (x - x.mean(-1, keepdims=True)) / np.sqrt(np.maximum(variance, 0) + np.float32(1e-5))
    assert not judge(layer_norm, (x, gamma, beta), {}, wrong)


def test_an_epsilon_outside_the_root_fails():
    x, weight = normal(0, 4, 16, scale=1e-3), np.ones(16, np.float32)
    wrong = x / (np.sqrt((x * x).mean(-1, keepdims=True)) + np.float32(1e-6))
    assert not judge(rms_norm, (x, weight), {}, wrong)


def test_a_forgotten_mask_fails():
    scores, mask = normal(0, 1, 2, 3, 5), np.random.default_rng(0).random((1, 1, 3, 5)) < 0.6
    assert not judge(masked_softmax, (scores, mask), {}, masked_softmax(scores, np.ones_like(mask)))


# -- infinities -------------------------------------------------------------------------------------------------------


def test_an_overflow_belongs_where_the_type_overflows():
    x = np.array([[60000.0, 60000.0, 1.0, -60000.0]], np.float16)
    y = np.array([[60000.0, 1.0, 1.0, -60000.0]], np.float16)
    right = np.array([[np.inf, 60000.0, 2.0, -np.inf]], np.float16)
    assert judge(add, (x, y), {}, right)
    for place, value in [(0, 65504), (0, np.nan), (1, np.inf), (3, np.inf), (3, -65504)]:
        assert not judge(add, (x, y), {}, planted(right, lambda _, value=value: value, place))


def test_compare_wants_non_finite_values_in_place():
    truth = np.array([1.0, np.inf, np.nan, -np.inf])
    for model in (ulps(4), multilinear(), calibrated()):
        assert compare(truth.astype(np.float32), truth, model)
        for place, value in [(3, np.inf), (2, 0), (1, 3e38), (0, np.nan), (0, np.inf)]:
            assert not compare(planted(truth.astype(np.float32), lambda _, value=value: value, place), truth, model)


@pytest.mark.parametrize("model", [exact(), ulps(4), multilinear(), calibrated()], ids=str)
def test_nan_never_passes_for_a_number(model):
    truth = np.zeros(3)
    assert compare(np.zeros(3, np.float32), truth, model)
    assert not compare(np.array([0, np.nan, 0], np.float32), truth, model)


@pytest.mark.parametrize("model", [exact(), ulps(4), multilinear(), calibrated()], ids=str)
def test_empty_is_right(model):
    assert compare(np.zeros((0, 3), np.float32), np.zeros((0, 3)), model)


# -- single models ----------------------------------------------------------------------------------------------------


def test_exact_counts_what_differs():
    logits = normal(0, 5, 4)
    verdict = judge(greedy_token, (logits,), {}, (greedy_token(logits) + np.arange(5) // 3) % 4)
    assert not verdict
    assert "2 of 5" in verdict.reason
    assert verdict.index == (3,)
    x = np.array([[np.nan, 1.0, 0.0]])
    assert judge(relu, (x,), {}, np.array([[np.nan, 1.0, -0.0]]))
    assert not judge(relu, (x,), {}, np.array([[0.0, 1.0, 0.0]]))
    assert not compare(np.nextafter(np.float32(1), np.float32(2)) * np.ones(1, np.float32), np.ones(1), exact())


@pytest.mark.parametrize("dtype", FLOATS)
def test_ulps_counts_spacings(dtype):
    truth = np.array([1.0, 1.5, 3.0, 1000.0, 1e-3, -1.0]).astype(numpy_dtype(dtype))
    step = truth
    for count in range(1, 4):
        step = np.nextafter(step, np.array(np.inf, truth.dtype)) if dtype != "bfloat16" else next_bfloat16(step)
        assert compare(step, truth.astype(np.float64), ulps(count))
        if dtype in ("float32", "float64"):
            assert not compare(step, truth.astype(np.float64), ulps(count - 0.5))


def next_bfloat16(x):
    bits = x.view(np.int16)
    return np.where(x > 0, bits + 1, bits - 1).astype(np.int16).view(ml_dtypes.bfloat16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_spacing_is_the_distance_to_the_next_number(dtype):
    values = np.array([1.0, 1.99, 2.0, 3e4, 1e-2, 0.75]).astype(numpy_dtype(dtype))
    x = values.astype(np.float64)
    if dtype == "bfloat16":
        following = next_bfloat16(values)
    else:
        following = np.nextafter(values, np.array(np.inf, values.dtype))
    np.testing.assert_array_equal(spacing(x, dtype), following.astype(np.float64) - x)
    smallest = {"float32": 2.0**-149, "float64": 2.0**-1074, "float16": 2.0**-24, "bfloat16": 2.0**-133}[dtype]
    assert spacing(np.zeros(1), dtype)[0] == smallest
    assert float(np.array(smallest).astype(numpy_dtype(dtype))) == smallest
    assert float(np.array(smallest / 2).astype(numpy_dtype(dtype))) == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_unit_roundoff_is_half_the_step_after_one(dtype):
    u = unit_roundoff(dtype)
    assert u == unit_roundoff(numpy_dtype(dtype)) == UNIT_ROUNDOFF[dtype]
    one = np.array([1 + 2 * u, 1 + 0.99 * u]).astype(numpy_dtype(dtype)).astype(np.float64)
    assert one.tolist() == [1 + 2 * u, 1]


def test_multilinear_grows_with_the_length_of_the_sum():
    error = 40 * 2.0**-24
    got, truth = np.array([1 + error]).astype(np.float32), np.ones(1)
    assert not compare(got, truth, multilinear(), condition=truth, terms=4)
    assert compare(got, truth, multilinear(), condition=truth, terms=64)
    assert compare(got, truth, multilinear(), condition=truth * 20, terms=4)


def test_calibrated_is_a_multiple_of_the_references_own_error():
    truth = np.array([1.0, 2.0])
    wanted = (truth + np.array([0, 1e-3])).astype(np.float32)
    assert compare(off(truth, 3.9e-3), truth, calibrated(4), wanted=wanted)
    assert not compare(off(truth, 4.1e-3), truth, calibrated(4), wanted=wanted)
    floor = 8 * 2.0**-24 * 2  # and never less than 8u max|y|
    assert compare(off(truth, 0.9 * floor), truth, calibrated(4), wanted=truth.astype(np.float32))
    assert not compare(off(truth, 1.2 * floor), truth, calibrated(4), wanted=truth.astype(np.float32))


def off(truth, by):
    return (truth + np.array([by, 0])).astype(np.float32)


def test_calibrated_grows_with_the_length_of_the_sum():
    """What is added one after the other errs by up to n u, and NumPy's own pairs hardly at all."""
    truth, short, long = np.ones(4), np.float32(1 + 10 * 2.0**-24), np.float32(1 + 1000 * 2.0**-24)
    for terms, accepted in ((1, (False, False)), (9, (True, False)), (8192, (True, True))):
        for value, wanted in zip((short, long), accepted, strict=True):
            got = np.full(4, value, np.float32)
            assert bool(compare(got, truth, calibrated(), wanted=np.ones(4, np.float32), terms=terms)) is wanted


def test_the_memory_layout_does_not_decide():
    """NumPy adds along an axis that is not contiguous one after the other."""
    scores, mask = np.zeros((2, 1, 2, 8192), np.float32, order="F"), np.ones((1, 1, 1, 8192), bool)
    scores += np.random.default_rng(0).standard_normal(scores.shape).astype(np.float32) / 1000
    assert judge(masked_softmax, (scores, mask), {}, masked_softmax(scores, mask))


def test_a_second_look_forgives_what_the_inputs_leave_open_and_no_more():
    """The reference is exact here; a mean that is off by one rounding of 4096 moves the result by a thousandth."""
    x, ones = np.array([[4096, 4096.5, 4097, 4096.5]], np.float32), np.ones(4, np.float32)
    exact = layer_norm(x, ones, 0 * ones)

    def with_mean_off_by(spacings):
        deviation = x - np.float32(4096.5 + spacings * 2.0**-11)
        root = np.sqrt(np.square(deviation).mean(-1, keepdims=True) + np.float32(1e-5))
        return deviation / root

    assert judge(layer_norm, (x, ones, 0 * ones), {}, exact)
    assert not compare(with_mean_off_by(1), exact.astype(np.float64), calibrated(), wanted=exact, terms=4)
    assert judge(layer_norm, (x, ones, 0 * ones), {}, with_mean_off_by(1))
    assert not judge(layer_norm, (x, ones, 0 * ones), {}, with_mean_off_by(40))


def test_several_calls_are_judged_together_and_the_wrong_one_is_named():
    def run(inputs):
        return {"first": relu.reference(inputs["x"]), "then": [relu.reference(-inputs["x"]), relu.reference(inputs["x"])]}

    x = np.arange(-2.0, 3.0, dtype=np.float32)
    got = run({"x": x})
    assert judge_run(relu, run, {"x": x}, got)
    got["then"][1] = got["then"][1] + 1
    verdict = judge_run(relu, run, {"x": x}, got)
    assert (verdict.ok, verdict.place, verdict.index) == (False, ("then", 1), (0,))


def test_names_of_models():
    models = (exact(), ulps(2), multilinear(), calibrated())
    assert [str(model) for model in models] == ["exact", "ulps(2)", "multilinear", "calibrated(4)"]


def test_a_verdict_says_what_and_where():
    x, y = normal(0, 2, 3), normal(1, 2, 3)
    good, bad = judge(add, (x, y), {}, add(x, y)), judge(add, (x, y), {}, planted(add(x, y), lambda v: v + 1, 4))
    assert str(good).startswith("ok: add: error")
    assert str(bad).startswith("WRONG: add: error 1, bound")
    assert bad.index == (1, 1)
    assert bad.error == pytest.approx(1)
    assert bad.bound < 1e-6
    assert not Verdict(False, "")


# -- what judge passes on ---------------------------------------------------------------------------------------------


def test_judge_leaves_the_arguments_alone():
    cache, new = np.zeros((2, 5, 3), np.float32), normal(0, 2, 2, 3)
    got = np.concatenate([new], 1)
    assert judge(cache_append, (cache, new), {}, got)
    assert not cache.any()
    generator = np.random.default_rng(4)
    x = np.abs(normal(0, 30, 4)) + np.float32(1)
    assert judge(dropout, (x, 0.5, generator), {}, dropout(x, 0.5, np.random.default_rng(4)))
    assert not judge(dropout, (x, 0.5, generator), {}, dropout(x, 0.5, np.random.default_rng(5)))
    assert generator.random() == np.random.default_rng(4).random()


def test_judge_looks_into_tuples_dictionaries_and_lists():
    logits, scores = normal(0, 2, 5), np.zeros(2)
    total, beams, tokens = beam_candidates(logits, scores, 3)
    assert judge(beam_candidates, (logits, scores, 3), {}, (total, beams, tokens))
    assert not judge(beam_candidates, (logits, scores, 3), {}, (total, beams, tokens + 1))
    assert not judge(beam_candidates, (logits, scores, 3), {}, (total + 1, beams, tokens))
    assert not judge(beam_candidates, (logits, scores, 3), {}, (total, beams))
    assert not judge(beam_candidates, (logits, scores, 3), {}, [total, beams, tokens])

    model = T5Backbone(11, 2, 2, 8, 8, seed=0)
    args = (normal(0, 1, 3, 8), model.params, model.config)
    right = t5_cross_keys_values(*args)
    assert judge(t5_cross_keys_values, args, {}, right)
    wrong = [dict(part) for part in right]
    wrong[1]["value"] = wrong[1]["value"] + np.float32(1e-3)
    verdict = judge(t5_cross_keys_values, args, {}, wrong)
    assert not verdict
    assert "[1]: [value]" in verdict.reason
    assert not judge(t5_cross_keys_values, args, {}, [right[0], {"key": right[1]["key"], "values": right[1]["value"]}])


def test_widened_reaches_everything_that_has_a_type():
    config = OPTConfig(3, 1, 1, 4, 4, dtype="mixed_bfloat16")
    tree = {"a": [np.ones(2, np.float16)], "b": (np.ones(2, ml_dtypes.bfloat16), np.ones(2, np.int32), np.ones(2, bool))}
    wide = widened(tree)
    assert [x.dtype.name for x in (wide["a"][0], *wide["b"])] == ["float64", "float64", "int32", "bool"]
    assert widened("bfloat16") == widened("float32") == "float64"
    assert widened("relu") == "relu"
    assert widened(config).dtype == "float64"
    assert widened(7) == 7


def test_the_terms_of_an_op_are_the_axes_that_it_sums_over():
    @op(error=multilinear())
    def test_numerics_contract(x: Float[Array, "*b k"], y: Float[Array, "k m n"], i: Int[Array, "*b"]) -> Float[Array, "*b n"]:
        """A sum over k and m."""
        return np.einsum("...k,kmn->...n", x, y)

    try:
        x, y, i = normal(0, 2, 30), normal(1, 30, 40, 3), np.zeros(2, int)
        magnitude = np.einsum("...k,kmn->...n", abs(x).astype(float), abs(y).astype(float))
        truth = np.einsum("...k,kmn->...n", x.astype(float), y.astype(float))
        inside = (truth + 0.9 * 2 * 1202 * 2.0**-24 * magnitude).astype(np.float32)
        outside = (truth + 1.2 * 2 * 1202 * 2.0**-24 * magnitude).astype(np.float32)
        assert judge(test_numerics_contract, (x, y, i), {}, inside)
        assert not judge(test_numerics_contract, (x, y, i), {}, outside)
    finally:
        del OPS["test_numerics_contract"]


# -- no false alarm ---------------------------------------------------------------------------------------------------


def random_case(rng):
    dtype = FLOATS[rng.integers(4)]
    rows, k, n = rng.integers(1, 6), int(rng.choice([1, 2, 3, 17, 64, 200])), rng.integers(1, 6)

    def draw(*shape):
        return (rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3)).astype(numpy_dtype(dtype))

    return dtype, draw(rows, k), draw(k, n), draw(n), draw


def test_right_results_always_pass():
    """Several thousand random calls of right but different implementations: not one is refused."""
    rng = np.random.default_rng(2024)
    orders, judged = list(ORDERS.values()), 0
    for _ in range(800):
        dtype, x, kernel, bias, draw = random_case(rng)
        with np.errstate(over="ignore"):
            got = linear_in_order(x, kernel, bias, orders[rng.integers(len(orders))])
        y = draw(*x.shape)
        checks = [
            (linear, (x, kernel, bias), got),
            (add, (x, y), (x.astype(np.longdouble) + y.astype(np.longdouble)).astype(x.dtype)),
            (add, (x, y), (y.astype(np.float64) + x.astype(np.float64)).astype(x.dtype)),
            (relu, (x,), np.where(x > 0, x, np.zeros_like(x))),
            (silu, (x,), silu(x.astype(np.float64)).astype(x.dtype)),
            (embedding, (np.arange(len(x)), x), x.copy()),
        ]
        if dtype != "float64":
            gamma, beta = draw(x.shape[-1]), draw(x.shape[-1])
            wide = layer_norm(*(a.astype(np.float64) for a in (x, gamma, beta))).astype(x.dtype)
            checks.append((layer_norm, (x, gamma, beta), wide))
            checks.append((log_softmax, (x,), log_softmax(x.astype(np.float64)).astype(np.float32)))
        for entry, args, result in checks:
            with np.errstate(all="ignore"):
                verdict = judge(entry, args, {}, result)
            assert verdict, f"{verdict}, {dtype}, shapes {[a.shape for a in args]}"
            judged += 1
    assert judged > 5000


def test_planted_errors_are_always_found():
    """The same random calls with one element off by a few hundredths of the largest: not one passes."""
    rng = np.random.default_rng(2025)
    for _ in range(500):
        _, x, kernel, bias, _ = random_case(rng)
        with np.errstate(over="ignore"):
            got = linear_in_order(x, kernel, bias, sum_pairwise)
        magnitude = float((np.abs(x.astype(float)) @ np.abs(kernel.astype(float)) + np.abs(bias.astype(float))).max())
        wrong = planted(got, lambda y, by=magnitude: y + 0.04 * by, int(rng.integers(got.size)))
        with np.errstate(over="ignore"):
            assert not judge(linear, (x, kernel, bias), {}, wrong)
