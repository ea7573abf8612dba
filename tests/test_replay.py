"""The replay: a run beside itself is right at every step, a wrong value is found where it was made and nowhere else."""

import numpy as np
import pytest
from replayed import FAMILIES, inputs_of, run_of, small

from refmodels.ops.precision import numpy_dtype
from refmodels.verification.lanes import Arithmetic
from refmodels.verification.replay import NothingToCompareError, judge_step, replay, step_names

RAGGED = [7, 4]
ALIASES = (":dense", ":attention", ":token_vectors", ":token_scores")
"""Composites that give the array of an op inside them, which is planted into instead."""


def ragged(family):
    return inputs_of(family, lengths=RAGGED)


# -- nothing is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_agrees_with_itself(family, dtype):
    model, inputs = small(family, dtype), ragged(family)
    report = replay(model, inputs, run_of(model, inputs))
    assert report.ok, report.first
    assert [step.name for step in report.steps] == list(step_names(model, inputs))
    assert (report.absent, report.unknown) == ((), ())
    assert all(step.through is None or step.through.ok for step in report.steps)
    assert all(step.judged <= step.size for step in report.steps)
    assert max(step.ratio for step in report.steps) <= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_of_few_steps_agrees(family, dtype):
    model, inputs = small(family, dtype), ragged(family)
    steps = run_of(model, inputs)
    kept = {
        name: array
        for name, array in steps.items()
        if "layer:" in name or "_layer" in name.partition(":")[2] or "_logits" in name
    }
    report = replay(model, inputs, kept)
    assert report.ok, report.first
    assert {step.name for step in report.steps} == kept.keys()
    assert len(report.absent) == len(steps) - len(kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_outputs_alone_agree(family):
    model, inputs = small(family), ragged(family)
    logits = f"{family}_logits"
    report = replay(model, inputs, {logits: run_of(model, inputs)[logits], "mystery": np.ones(3)})
    assert report.ok
    assert [step.name for step in report.steps] == [logits]
    assert report.unknown == ("mystery",)


# -- something is wrong ---------------------------------------------------------------------------------------------------


def kinds(family):
    """One step of each kind: every op at its last place in the tree."""
    model, inputs = small(family, layers=1), ragged(family)
    last = {}
    for name in step_names(model, inputs):
        op = name.rpartition(":")[2].partition(".")[0]
        place = "encoder" if name.startswith("encoder") else "cross" if "cross_attention" in name else ""
        last[op, place] = name
    return [name for name in last.values() if not name.endswith(ALIASES)]


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in FAMILIES for name in kinds(family)])
def test_a_fault_in_a_step_is_found_there_and_nowhere_else(family, name):
    """One value of the first row is wrong, and everything after it goes on with that."""
    model, inputs = small(family, layers=1), inputs_of(family)

    def wrong(step, result):
        if step != name:
            return result
        result = result.copy()
        place = tuple(-1 if axis == result.ndim - 2 else 0 for axis in range(result.ndim))  # the first query has but one key
        result[place] = not result[place] if result.dtype == bool else result[place] + 1
        return result

    ours = run_of(model, inputs)
    report = replay(model, inputs, run_of(model, inputs, wrong), through=False)
    same = {other for other, array in ours.items() if array.shape == ours[name].shape and np.array_equal(array, ours[name])}
    assert report.first is not None, "not found"
    if ours[name].dtype.kind in "iub":  # what follows is held to the right mask or bucket: it is wrong as well
        assert report.first.name == name
        return
    assert {step.name for step in report.wrong} <= same
    assert name in {step.name for step in report.wrong}
    assert report.steps[-1].ok or report.steps[-1].name == name


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_that_is_spread_over_all_values_is_found(family):
    model, inputs = small(family), ragged(family)
    name = next(name for name in step_names(model, inputs) if name.endswith("layers.1.self_attention.value:linear"))
    report = replay(
        model, inputs, run_of(model, inputs, lambda step, result: result * np.float32(1.001) if step == name else result)
    )
    assert report.first.name == name
    assert {step.name for step in report.wrong} == {name}
    assert not report.steps[-1].through.ok
    assert report.first.ratio > 10


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("family", FAMILIES)
def test_nan_and_infinities_are_wrong(family, value):
    model, inputs = small(family), ragged(family)
    steps = dict(run_of(model, inputs))
    name = next(name for name in steps if name.endswith("layers.0.self_attention.key:linear"))
    steps[name] = steps[name].copy()
    steps[name][0, 0, 0] = value
    report = replay(model, inputs, {name: steps[name]})
    assert report.first.name == name
    assert report.first.ratio == np.inf


def test_a_wrong_shape_and_a_wrong_type_are_wrong():
    model, inputs = small("opt"), ragged("opt")
    steps = run_of(model, inputs)
    turned = replay(model, inputs, {**steps, "layers.0:relu": steps["layers.0:relu"].transpose(0, 2, 1)})
    assert [step.name for step in turned.wrong] == ["layers.0:relu"]
    assert "shape (2, 20, 7), wanted (2, 7, 20)" in turned.first.local.reason
    typed = replay(model, inputs, {"layers.0:add": steps["layers.0:add"].astype(np.int32)})
    assert "int32, wanted floating-point numbers" in typed.first.local.reason
    assert turned.first.ratio == typed.first.ratio == np.inf


def test_a_mask_that_is_wrong_is_found_and_not_gone_on_with():
    model, inputs = small("opt"), inputs_of("opt")
    steps = dict(run_of(model, inputs))
    steps["opt_backbone:causal_mask"] = np.ones_like(steps["opt_backbone:causal_mask"])
    report = replay(model, inputs, steps)
    assert [step.name for step in report.wrong] == ["opt_backbone:causal_mask"]


def test_nothing_to_compare_is_an_error():
    model, inputs = small("opt"), inputs_of("opt")
    for theirs in ({}, {"mystery": np.ones(2)}):
        with pytest.raises(NothingToCompareError, match="no step to compare"):
            replay(model, inputs, theirs)


# -- what does not count --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_count(family):
    """Whatever stands in the rows of padding, NaN included, and wherever it came from."""
    model, inputs = small(family), ragged(family)
    real = inputs["encoder_padding_mask" if family == "t5" else "padding_mask"]

    def is_of_tokens(step, array):
        decoder = step.startswith(
            ("decoder", "t5_decoder", "t5_logits", "token_embedding:logits", "token_embedding:token_scores")
        )
        rows = not decoder or "cross_attention.key" in step or "cross_attention.value" in step
        return array.dtype.kind == "f" and array.shape[:2] == real.shape and rows

    ours = run_of(model, inputs)
    touched = {
        step: np.where(real.reshape(*real.shape, *[1] * (array.ndim - 2)), array, np.float32(np.nan))
        for step, array in ours.items()
        if is_of_tokens(step, array)
    }
    report = replay(model, inputs, {**ours, **touched})
    assert report.ok, report.first
    judged = [step for step in report.steps if step.name in touched]
    assert len(judged) > 10
    assert all(step.judged * real.size == step.size * real.sum() for step in judged)
    assert all(step.through.ok for step in report.steps if step.through is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_forbidden_keys_and_what_all_keys_share_do_not_count(family):
    model, inputs = small(family), ragged(family)
    steps = dict(run_of(model, inputs))
    name = next(name for name in steps if name.endswith("layers.0.self_attention:attention_scores"))
    shifted = steps[name] + np.float32(3)
    assert replay(model, inputs, {name: shifted}).ok
    masked = shifted.copy()
    masked[1, ..., 4:] = -1e9
    assert replay(model, inputs, {name: masked}).ok
    masked[0, 0, 3, 2] += 1
    assert not replay(model, inputs, {name: masked}).ok


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_on_a_forbidden_key_counts(family):
    model, inputs = small(family), ragged(family)
    steps = run_of(model, inputs)
    name = next(name for name in steps if name.endswith("layers.0.self_attention:masked_softmax"))
    leaking = steps[name].copy()
    assert leaking[1, 0, 2, 5] == 0
    leaking[1, 0, 2, 5] = 1e-3
    assert replay(model, inputs, {**steps, name: leaking}).first.name == name


# -- arithmetic -----------------------------------------------------------------------------------------------------------


def test_a_coarser_type_is_right_in_itself_alone():
    """A bfloat16 run with the same weights: within bfloat16's bounds, far outside of float32's."""
    half, inputs = small("bloom", "bfloat16"), ragged("bloom")
    steps = run_of(half, inputs)
    assert replay(half, inputs, steps).ok
    full = small("bloom")
    for path in ("token_embedding", "layers"):
        full.params[path] = widened(half.params[path])
    full.params |= {key: widened(value) for key, value in half.params.items()}
    assert not replay(full, inputs, steps, arithmetic=Arithmetic("float32")).ok


def widened(tree):
    if isinstance(tree, dict):
        return {key: widened(child) for key, child in tree.items()}
    return [widened(child) for child in tree] if isinstance(tree, list) else tree.astype(np.float32)


def test_rounded_products_are_right_where_they_are_declared():
    model, inputs = small("opt"), ragged("opt")
    bfloat16 = numpy_dtype("bfloat16")

    def rounded(tree):
        if isinstance(tree, dict):
            return {
                key: rounded(child) if key != "kernel" else child.astype(bfloat16).astype(np.float32)
                for key, child in tree.items()
            }
        return [rounded(child) for child in tree] if isinstance(tree, list) else tree

    other = small("opt")
    other.params = rounded(model.params)
    steps = run_of(other, inputs)
    assert not replay(model, inputs, steps).ok
    assert replay(model, inputs, steps, arithmetic=Arithmetic("float32", "bfloat16")).ok
    assert not replay(model, inputs, steps, arithmetic=Arithmetic("float32", "tf32")).ok


# -- parts of it ----------------------------------------------------------------------------------------------------------


def test_substitutes_are_gone_on_with():
    """They were given our values at a step, and gave their own for it: both are known."""
    model, inputs = small("opt"), ragged("opt")
    ours = run_of(model, inputs)
    name = "layers.0:opt_decoder_layer"
    given = {name: ours[name]}

    def wrong(step, result):
        return result + 1 if step == name else result

    steps = dict(run_of(model, inputs))
    steps[name] = wrong(name, steps[name])  # theirs is wrong; what follows went on with ours
    report = replay(model, inputs, steps, substitutes=given)
    assert [step.name for step in report.wrong] == [name]
    assert {step.name for step in replay(model, inputs, steps).wrong} > {name}


def test_one_step_is_judged_as_in_the_whole():
    model, inputs = small("t5"), ragged("t5")
    name = "decoder.layers.1.cross_attention.query:linear"
    steps = run_of(model, inputs, lambda step, result: result * 2 if step == name else result)
    whole = {step.name: step for step in replay(model, inputs, steps).steps}[name]
    alone = judge_step(model, inputs, steps, name)
    assert (alone.local.ok, alone.local.index, alone.judged) == (whole.local.ok, whole.local.index, whole.judged)
    halved = judge_step(
        model,
        inputs,
        steps,
        name,
        edit=lambda op, step, arguments, run: 2 * run(**arguments) if step == name else run(**arguments),
    )
    assert halved.ok
    assert judge_step(model, inputs, steps, "no such step") is None


def test_their_arrays_are_read_when_their_turn_comes():
    model, inputs = small("opt"), ragged("opt")
    steps, read = run_of(model, inputs), []

    class Lazy(dict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    seen = []
    replay(model, inputs, Lazy(steps), progress=lambda step: seen.append((step.name, len(set(read)))))
    assert [count for _, count in seen] == list(range(1, len(steps) + 1))
    assert [name for name, _ in seen] == list(steps)
