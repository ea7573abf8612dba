"""Quantised models: KerasHub's own int8 and int4 presets, quantising bit for bit as Keras does, saving, LoRA on top, refusals.

The primitives are held to the oracle in `test_ops.py`. A quantised product of activations is a step function: a value halfway
between two integers may go either way after one rounding more. So no two precisions need agree on such a model, and a wide
tolerance would hide real faults. `agree` therefore compares under fixed choices: our float32 run, made to take the integers of
our float64 run, says what rounding costs, and the peer must be within `calibrated(4)` of that; or the same with the integers
of our float32 run.
"""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from loopback import Loopback
from safetensors.numpy import load_file

from refmodels import Backbone, BloomBackbone, OPTBackbone, OPTCausalLM, T5Backbone, backbone, cli, watching
from refmodels.files import CheckpointError
from refmodels.numerics import calibrated, compare, multilinear
from refmodels.op import OPS
from refmodels.ops.dense import dense, token_scores
from refmodels.ops.linear import linear
from refmodels.ops.quantize import (
    dequantized_groups,
    linear_int8,
    pack_int4,
    quantize_rows,
    quantized_groups,
    row_scale,
    unpack_int4,
)
from refmodels.parameters import flatten, stored_bytes
from refmodels.quantization import Quantization, read_policy

KERAS = Path(__file__).parent / "data" / "goldens" / "keras_hub_0.32"
GOLDENS = sorted(path.name for path in KERAS.iterdir() if path.name.endswith(("_int8", "_int4")))
WITH_PLAIN = [name for name in GOLDENS if (KERAS / name / "plain").exists()]

SIZES = {"vocabulary_size": 31, "num_layers": 2, "num_heads": 3, "hidden_dim": 12, "intermediate_dim": 22, "seed": 5}
MODELS = {
    "opt": (OPTBackbone, {**SIZES, "max_sequence_length": 16}),
    "opt 350m": (OPTBackbone, {**SIZES, "max_sequence_length": 16, "word_embed_proj_dim": 7, "do_layer_norm_before": False}),
    "bloom": (BloomBackbone, SIZES),
    "t5": (T5Backbone, {**SIZES, "key_value_dim": 5}),
    "t5 untied": (T5Backbone, {**SIZES, "tie_embedding_weights": False, "use_gated_activation": False}),
}
FORMS = {
    "int8": {"mode": "int8"},
    "int8 weights": {"mode": "int8", "weight_only": True},
    "int4": {"mode": "int4", "block_size": 5},
    "int4 one group": {"mode": "int4"},
}
IDS = np.array([[1, 5, 3, 7, 2, 30], [4, 4, 12, 0, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


def inputs(model):
    if model.family != "t5":
        return {"token_ids": IDS, "padding_mask": MASK}
    encoder = {"encoder_token_ids": IDS, "encoder_padding_mask": MASK}
    return encoder | {"decoder_token_ids": IDS[:, :4], "decoder_padding_mask": MASK[:, :4]}


def build(name, form=None, **changes):
    cls, arguments = MODELS[name]
    model = cls(**{**arguments, **changes})
    if form is not None:
        model.quantize(**FORMS[form])
    return model


def run(model, given):
    outputs = model(given)
    return outputs if isinstance(outputs, dict) else {"sequence_output": outputs}


def same(first, second):
    """Two trees with the same paths in one order, the same types and bits."""
    first, second = dict(flatten(first)), dict(flatten(second))
    assert list(first) == list(second)
    for path, values in first.items():
        assert values.dtype == second[path].dtype, path
        np.testing.assert_array_equal(values, second[path], err_msg=path)


# -- choices at ties --------------------------------------------------------------------------------------------------


def choices(call):
    """The integers that the activations of this call became, in order."""
    found = []

    def record(op, args, kwargs, proceed):
        result = proceed()
        if op is quantize_rows:
            found.append(result)
        return result

    with watching(record):
        return call(), found


def under(integers, call):
    """The result of the call where the activations become these integers."""
    left = iter(integers)
    with watching(lambda op, args, kwargs, proceed: next(left) if op is quantize_rows else proceed()):
        result = call()
    assert next(left, None) is None
    return result


def agree(peer, exact, single, real=slice(None)):
    """Hold the peer's arrays to `exact()`, our run in float64, with `single()`, in float32, as the measure: see the top."""
    (truth, high), (rough, low) = choices(exact), choices(single)
    verdicts = []
    for wanted, own in ((truth, under(high, single)), (under(low, exact), rough)):
        pairs = [(peer[key][real], wanted[key][real], own[key][real], key) for key in peer]
        verdicts.append([compare(got, y, calibrated(4), wanted=mine, name=key) for got, y, mine, key in pairs])
    assert any(map(all, verdicts)), verdicts
    return len(peer)


def judge_accelerator(name, accelerator):
    """On a quantised checkpoint of the peer's an accelerator is held to our float64 run as the peer is."""
    tensors = load_file(KERAS / name / "golden.safetensors")
    given = {key.removeprefix("in."): value for key, value in tensors.items() if key.startswith("in.")}
    exact, single = (Backbone.from_preset(KERAS / name, dtype=dtype) for dtype in ("float64", "float32"))
    found = run(Backbone.from_preset(KERAS / name, dtype="float32", accelerator=accelerator), given)
    assert agree(found, lambda: run(exact, given), lambda: run(single, given)) >= 1


@pytest.mark.parametrize("name", GOLDENS)
def test_keras_hub(name):
    tensors = load_file(KERAS / name / "golden.safetensors")
    given = {key.removeprefix("in."): value for key, value in tensors.items() if key.startswith("in.")}
    peer = {key.removeprefix("out."): value for key, value in tensors.items() if key.startswith("out.") and "float" not in key}
    exact, single = (Backbone.from_preset(KERAS / name, dtype=dtype) for dtype in ("float64", "float32"))
    real = given["padding_mask"] == 1 if "padding_mask" in given else slice(None)
    assert agree(peer, lambda: run(exact, given), lambda: run(single, given), real) >= 1
    if "head.hidden" in tensors:
        hidden = tensors["head.hidden"]
        agree(
            {"logits": tensors["head.logits"]},
            lambda: {"logits": exact.token_embedding(hidden, reverse=True)},
            lambda: {"logits": single.token_embedding(hidden, reverse=True)},
        )


def test_there_are_goldens():
    assert len(GOLDENS) == 7
    assert len(WITH_PLAIN) == 4


@pytest.mark.parametrize("fault", ["scale", "zero", "a step"])
def test_agree_sees_a_fault(fault):
    """A step of one integer in a hundred thousandth of the weights is more than any choice at a tie explains."""
    name = "opt_int4" if fault == "zero" else "opt_int8"
    tensors = load_file(KERAS / name / "golden.safetensors")
    given = {key.removeprefix("in."): value for key, value in tensors.items() if key.startswith("in.")}
    models = [Backbone.from_preset(KERAS / name, dtype=dtype) for dtype in ("float64", "float32")]
    for model in models:
        layer = model.params["layers"][1]["self_attention"]["query"]
        if fault == "scale":
            layer["kernel_scale"] = layer["kernel_scale"] * np.float32(1.001)
        elif fault == "zero":
            layer["kernel_zero"] = layer["kernel_zero"] + np.int8(1)
        else:
            layer["kernel"][3, 4] ^= 1
    peer = {"sequence_output": tensors["out.sequence_output"]}
    with pytest.raises(AssertionError, match=r"ok=False"):
        agree(peer, lambda: run(models[0], given), lambda: run(models[1], given), given["padding_mask"] == 1)


@pytest.mark.parametrize("name", WITH_PLAIN)
def test_quantising_gives_keras_integers_and_scales_bit_for_bit(name):
    model, theirs = Backbone.from_preset(KERAS / name / "plain"), Backbone.from_preset(KERAS / name)
    model.quantize("int8") if name.endswith("int8") else model.quantize("int4", block_size=12)
    same(model.params, theirs.params)
    config = json.loads((KERAS / name / "config.json").read_text())["config"]
    assert model.get_config()["dtype"] == config["dtype"]
    assert model.count_params() == json.loads((KERAS / name / "metadata.json").read_text())["parameter_count"]


# -- every model in every form ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_the_table_is_the_tree(name, form):
    model = build(name, form)
    table, leaves = model.parameters(), dict(flatten(model.params))
    assert [parameter.path for parameter in table] == list(leaves)
    for parameter in table:
        values = leaves[parameter.path]
        assert values.shape == parameter.shape, parameter.path
        assert values.dtype == (parameter.dtype or "float32"), parameter.path
        assert np.prod(parameter.keras_shape) == parameter.size, parameter.path
    names = [parameter.keras for parameter in table]
    assert len(set(names)) == len(names)
    assert all(f"{n.rpartition('/')[0]}/{i}" in names for n in names for i in range(int(n.rpartition("/")[2])))
    assert model.count_params() == sum(values.size for values in leaves.values())
    assert stored_bytes(table, "float32") == sum(values.nbytes for values in leaves.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_near_the_plain_model_and_equal_the_dequantised_one(name, form):
    plain, model = build(name, dtype="float64"), build(name, form, dtype="float64")
    given, wanted = inputs(plain), run(plain, inputs(plain))
    single = build(name, form)
    got, rough = run(model, given), run(single, inputs(single))
    step = {"int8": 1 / 127, "int8 weights": 1 / 127}.get(form, 1 / 7)
    for key, value in wanted.items():
        error = np.abs(got[key] - value).max() / np.abs(value).max()
        assert 0 < error < 8 * step, "quantised weights are other weights, and near the old"
    model.dequantize()
    assert model.quantization is None
    assert {path: (v.shape, v.dtype) for path, v in flatten(model.params)} == {
        path: (v.shape, v.dtype) for path, v in flatten(plain.params)
    }
    if form != "int8":  # which quantises activations too
        for key, value in run(model, given).items():
            # The dequantised weights went through float32: off by what a float32 run is.
            verdict = compare(value, got[key], calibrated(4), wanted=rough[key].astype(np.float64), name=key)
            assert verdict, verdict


@pytest.mark.parametrize("form", ["int8", "int8 weights"])
def test_dequantised_weights_are_within_half_a_step(form):
    plain, model = build("t5 untied"), build("t5 untied", form)
    quantised = {parameter.path for parameter in model.parameters() if parameter.dtype == "int8"}
    model.dequantize()
    found = dict(flatten(model.params))
    for path, values in flatten(plain.params):
        step = np.abs(values).max(-1 if path.endswith(".embeddings") else 0, keepdims=True) / 127 * (path in quantised)
        assert (np.abs(found[path] - values) <= step / 2 * (1 + 1e-5)).all(), path
    assert len(quantised) > 10


def test_int4_weights_are_within_a_step_if_their_group_has_both_signs():
    """Half a step from rounding the value, half from rounding the zero, where that moves an end out of range."""
    kernel = np.random.default_rng(0).standard_normal((40, 300)).astype(np.float32)
    values, scale, zero = quantized_groups(kernel, 8)
    both = ((kernel.reshape(5, 8, 300) > 0).any(1) & (kernel.reshape(5, 8, 300) < 0).any(1))[np.arange(40) // 8]
    found = dequantized_groups(pack_int4(values), scale, zero, np.arange(40) // 8, scale.dtype)
    assert (np.abs(found - kernel) <= scale[np.arange(40) // 8] * (1 + 1e-5))[both].all()
    assert 0.9 < both.mean() < 1


def test_an_int4_group_of_one_sign_is_cut_off_as_in_keras():
    values, scale, zero = quantized_groups(np.array([[2.0], [3.5]], np.float32), 2)
    found = dequantized_groups(pack_int4(values), scale, zero, np.zeros(2), scale.dtype)
    np.testing.assert_allclose(found[:, 0], [1.5, 1.5], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "mixed_bfloat16"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_on_an_accelerator_the_same_bits(name, form, dtype):
    model, loopback = build(name, form, dtype=dtype), build(name, form, dtype=dtype, accelerator=Loopback())
    wanted, got = run(model, inputs(model)), run(loopback, inputs(model))
    for key, value in wanted.items():
        assert value.dtype.name == model.compute_dtype
        assert got[key].tobytes() == value.tobytes()
        assert np.isfinite(value.astype(np.float64)).all()
    assert not loopback.accelerator.crossings


def test_quantising_inside_use_is_done_by_the_reference():
    from refmodels import use

    wanted, model = build("opt", "int8"), build("opt")
    with use(Loopback()):
        model.quantize("int8")
    same(model.params, wanted.params)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["opt", "bloom", "t5 untied"])
def test_decoding_with_a_cache_equals_one_pass(name, form):
    """Rows are quantised one by one, so that neither chunks nor batches change an integer."""
    model = build(name, form, dtype="float64")
    if model.family == "t5":
        cache = model.new_cache(IDS, MASK == 1, 4)
        hidden = run(model, inputs(model))["decoder_sequence_output"]
    else:
        cache = model.new_cache(2, 6)
        hidden = run(model, inputs(model))["sequence_output"]
    single = build(name, form)
    rough = next(reversed(run(single, inputs(single)).values()))
    wanted, rough = model.logits(hidden), single.logits(rough).astype(np.float64)
    own = wanted + 2 * 2.0**-29 * (rough - wanted)  # what float32 errs by, in float64: on either side of the comparison
    ones = np.ones((2, 2), bool)
    first = model.prefill(IDS[:, :2], ones, np.array([2, 2]), cache, np.array([0, 0]))
    step = model.decode_step(IDS[:, 2:3], ones[:, :1], np.array([2, 2]), cache)
    for found, place in ((first, 1), (step, 2)):
        verdict = compare(found, wanted[:, place], calibrated(4), wanted=own[:, place])
        assert verdict, verdict


def test_generation_runs_on_integers():
    model = OPTCausalLM(build("opt", "int8"), None)
    plain = OPTCausalLM(build("opt"), None)
    prompt = {"token_ids": IDS[:1, :3], "padding_mask": MASK[:1, :3]}
    plain.quantize("int8")
    outputs = [task.generate(prompt, max_length=9, stop_token_ids=None)["token_ids"] for task in (model, plain)]
    assert outputs[0].shape == (1, 9)
    np.testing.assert_array_equal(*outputs)


# -- facts about single ops -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1024, 1025, 5000])
def test_the_sum_of_products_is_exact(k):
    rng = np.random.default_rng(k)
    values, kernel = rng.integers(100, 128, (2, k)).astype(np.int8), rng.integers(-128, -100, (k, 3)).astype(np.int8)
    got = linear_int8(values, np.ones(2, np.float32), kernel, np.ones(3, np.float32), dtype="float64")
    np.testing.assert_array_equal(got, values.astype(np.int64) @ kernel.astype(np.int64))


def test_ties_go_to_even():
    x = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 127.0]], np.float32)
    assert quantize_rows(x, np.ones(1, np.float32)).tolist() == [[0, 2, 2, 0, -2, 127]]


def test_a_row_that_is_not_finite_gives_nan_and_spoils_no_other():
    x = np.array([[1.0, np.inf], [np.nan, 1.0], [1.0, -2.0]], np.float32)
    y = dense(x, np.array([[127, 1], [0, 127]], np.int8), kernel_scale=np.array([127, 127], np.float32))
    assert np.isnan(y[:2]).all()
    assert np.isfinite(y[2]).all()


def test_a_row_of_zeros_gives_the_bias():
    kernel, bias = np.array([[3], [4]], np.int8), np.array([0.25], np.float32)
    y = dense(np.zeros((1, 2), np.float32), kernel, bias, kernel_scale=np.array([9], np.float32))
    assert y.tolist() == [[0.25]]


def test_int4_by_hand():
    """Two groups of two inputs. 0 to 1.5 is a step of 0.1 and a zero of -8; -0.5 to 1 the same step and a zero of 5 - 8."""
    kernel = np.array([[0.0], [1.5], [-0.5], [1.0]], np.float32)
    values, scale, zero = quantized_groups(kernel, 2)
    np.testing.assert_array_max_ulp(scale[:, 0], np.float32([(1.5 + 1e-7) / 15] * 2), maxulp=2)  # a sum and a division
    assert zero[:, 0].tolist() == [-8, -3]
    assert values[:, 0].tolist() == [-8, 7, -8, 7]


@pytest.mark.parametrize("block_size", [4, 5, 10**12])
def test_a_block_longer_than_the_matrix_takes_no_memory(block_size):
    """Its end is zeros, which count for min and max: 0.5 to 1.5 becomes 0 to 1.5."""
    kernel = np.array([[0.5], [1.5], [0.5], [1.0]], np.float32)
    values, scale, zero = quantized_groups(kernel, block_size)
    low, wanted = (0.5, [-1, 7, -1, 7]) if block_size == 4 else (0.0, [-3, 7, -3, 2])
    np.testing.assert_array_max_ulp(scale, np.float32([[(1.5 - low + 1e-7) / 15]]), maxulp=2)
    assert values[:, 0].tolist() == wanted
    assert scale.shape == zero.shape == (1, 1)


def test_the_even_number_is_in_the_low_bits():
    packed = pack_int4(np.array([[1, -1, 7]], np.int8))
    assert packed.view(np.uint8).tolist() == [[0xF1, 0x07]]
    assert unpack_int4(packed, 3).tolist() == [[1, -1, 7]]


def test_an_adapter_on_a_quantised_kernel_adds_its_product():
    rng = np.random.default_rng(3)
    x, kernel = rng.standard_normal((4, 6)), rng.integers(-127, 128, (6, 5)).astype(np.int8)
    adapter = {"lora_kernel_a": rng.standard_normal((6, 1, 2)), "lora_kernel_b": rng.standard_normal((2, 5))}
    scale = {"kernel_scale": np.full(5, 90, np.float32)}
    base = dense(x, kernel, **scale)
    got = dense(x, kernel, **scale, **adapter, lora_scale=np.array(0.5))
    product = 0.5 * x @ adapter["lora_kernel_a"][:, 0] @ adapter["lora_kernel_b"]
    size = 0.5 * np.abs(x) @ np.abs(adapter["lora_kernel_a"][:, 0]) @ np.abs(adapter["lora_kernel_b"])
    verdict = compare(got, base + product, multilinear(), condition=np.abs(base) + size, terms=6 + 2 + 2)
    assert verdict, verdict


def test_the_plain_forms_are_still_the_plain_products():
    rng = np.random.default_rng(4)
    x, kernel = rng.standard_normal((3, 4)).astype(np.float32), rng.standard_normal((4, 5)).astype(np.float32)
    np.testing.assert_array_equal(dense(x, kernel), linear(x, kernel))
    np.testing.assert_array_equal(token_scores(x, {"embeddings": 0, "reverse_embeddings": kernel}), linear(x, kernel))


# -- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_lora_on_a_quantised_model_and_quantising_a_model_with_lora(form):
    first, second = build("opt", form), build("opt")
    first.enable_lora(2)
    second.enable_lora(2)
    second.quantize(**FORMS[form])  # as Keras: the base alone, the adapter stays
    leaves = dict(flatten(second.params))
    assert {path: leaf.dtype for path, leaf in flatten(first.params)} == {path: leaf.dtype for path, leaf in leaves.items()}
    before = run(second, inputs(second))["sequence_output"]
    path = next(path for path in leaves if path.endswith("lora_kernel_b"))
    leaves[path][...] = 0.5
    assert np.abs(run(second, inputs(second))["sequence_output"] - before).max() > 1e-3


# -- saving and loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_a_preset_comes_back_the_same(tmp_path, name, form):
    model = build(name, form)
    model.save_to_preset(tmp_path / "preset")
    again = Backbone.from_preset(tmp_path / "preset")
    same(again.params, model.params)
    assert again.quantization == model.quantization
    assert again.get_config() == model.get_config()
    for key, value in run(model, inputs(model)).items():
        np.testing.assert_array_equal(run(again, inputs(model))[key], value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "mixed_bfloat16", "float64"])
def test_the_type_is_saved_and_can_be_replaced(tmp_path, dtype):
    model = build("opt", "int8", dtype=dtype)
    model.save_to_preset(tmp_path / "preset")
    again = Backbone.from_preset(tmp_path / "preset")
    assert (again.config.dtype, again.quantization) == (dtype, model.quantization)
    same(again.params, model.params)
    layer = json.loads((tmp_path / "preset/config.json").read_text())["config"]["dtype"]["config"]["policy_map"]
    assert {entry["config"]["source_name"] for entry in layer.values()} == {dtype}
    other = Backbone.from_preset(tmp_path / "preset", dtype="float32")
    assert (other.config.dtype, other.quantization) == ("float32", model.quantization)
    assert other.params["layers"][0]["self_attention"]["query"]["kernel"].dtype == np.int8
    assert other.params["layer_norm"]["gamma"].dtype == np.float32


def test_the_weights_alone_can_be_asked_for_of_an_int8_preset():
    model = Backbone.from_preset(KERAS / "t5_untied_int8", weight_only=True)
    assert model.quantization == Quantization("int8", weight_only=True)
    tensors = load_file(KERAS / "t5_untied_int8" / "golden.safetensors")
    given = {key.removeprefix("in."): value for key, value in tensors.items() if key.startswith("in.")}
    called = set()

    def record(op, args, kwargs, proceed):
        called.add(op.name)
        return proceed()

    with watching(record):
        model(given)
    assert "linear_weight_int8" in called
    assert not called & {"quantize_rows", "linear", "linear_int8"}


def test_a_config_alone_builds_a_quantised_model():
    model = build("bloom", "int4")
    again = BloomBackbone.from_config({**model.get_config(), "name": "other"})
    assert again.quantization == Quantization("int4", 5, weight_only=True)
    assert [parameter.path for parameter in again.parameters()] == [path for path, _ in flatten(again.params)]
    named = BloomBackbone(**SIZES, dtype="int4/5_from_float32")
    same(named.params, model.params)  # drawn from the same seed


def test_summary_counts_bytes():
    lines = []
    model = build("opt", "int4")
    model.summary(lines.append)
    nbytes = sum(leaf.nbytes for _, leaf in flatten(model.params))
    assert lines[-1].endswith(f"{nbytes / 1e6:,.1f} MB in int4/5")


def test_info_of_a_quantised_preset(capsys):
    directory = KERAS / "opt_int4"
    assert cli.main(["info", str(directory), "--json"]) in (0, None)
    found = json.loads(capsys.readouterr().out)
    assert found["weights_bytes"] == sum(leaf.nbytes for _, leaf in flatten(Backbone.from_preset(directory).params))
    assert cli.main(["info", str(directory)]) in (0, None)
    assert "int4/12_from_float32" in capsys.readouterr().out


def damaged(tmp_path, name, change):
    shutil.copytree(KERAS / name, tmp_path / "preset")
    with h5py.File(tmp_path / "preset" / "model.weights.h5", "r+") as file:
        change(file)
    with pytest.raises(CheckpointError) as caught:
        Backbone.from_preset(tmp_path / "preset")
    return str(caught.value)


EMBEDDING, QUERY = (
    "layers/token_and_position_embedding/token_embedding/vars",
    "layers/transformer_decoder/_self_attention_layer",
)


def put(file, name, values):
    del file[name]
    file[name] = values


def test_files_that_are_wrong(tmp_path):
    def wrong(label, name, change, *words):
        message = damaged(tmp_path / label, name, change)
        assert all(word in message for word in ("model.weights.h5", *words)), message

    kernel = f"{QUERY}/query_dense/vars"
    wrong("a", "opt_int8", lambda f: put(f, f"{EMBEDDING}/1", np.zeros(97, np.float32)), f"{EMBEDDING}/1", "positive finite")
    wrong("b", "opt_int8", lambda f: put(f, f"{EMBEDDING}/0", np.zeros((97, 32), np.float32)), "float32, wanted int8")
    wrong("c", "opt_int8", lambda f: put(f, f"{kernel}/2", np.ones((32,), np.float32)), "(32,), wanted (1, 1, 4, 8)")
    wrong("d", "opt_int4", lambda f: put(f, f"{EMBEDDING}/3", np.full(32, 9, np.float32)), f"{EMBEDDING}/3", "groups of 12")
    wrong("e", "opt_int4", lambda f: put(f, f"{EMBEDDING}/3", np.full(32, -1, np.float32)), "groups of 12")
    wrong("f", "opt_int4", lambda f: f.__delitem__(f"{kernel}/3"), f"{kernel}/3", "missing")


def test_a_plain_preset_is_not_quantised_by_a_dtype():
    with pytest.raises(CheckpointError, match=r"plain weights.*quantize\('int8'\)"):
        Backbone.from_preset(KERAS / "opt", dtype="int8_from_float32")


def test_configs_that_are_wrong(tmp_path):
    original = json.loads((KERAS / "opt_int8" / "config.json").read_text())

    def refused(change):
        config = json.loads(json.dumps(original))
        change(config["config"]["dtype"]["config"]["policy_map"], config["config"]["dtype"]["config"])
        directory = tmp_path / "preset"
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError) as caught:
            Backbone.from_preset(directory, load_weights=False)
        return str(caught.value)

    query = "transformer_layer_1/self_attention/query"
    assert query in refused(lambda layers, _: layers.pop(query))
    assert "'other'" in refused(lambda layers, _: layers.update(other=layers[query]))
    assert "differ" in refused(lambda layers, _: layers[query]["config"].update(mode="int4/16"))
    assert "float8" in refused(lambda layers, _: layers[query]["config"].update(mode="float8"))
    assert "source_name" in refused(lambda layers, _: layers[query]["config"].update(source_name=7))
    assert "missing or empty" in refused(lambda layers, _: layers.clear())
    assert "must be one of" in refused(
        lambda layers, _: [layer["config"].update(source_name="float7") for layer in layers.values()]
    )
    assert "block_size" in refused(lambda layers, _: [layer["config"].update(mode="int4/0") for layer in layers.values()])


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        ("int8_from_bfloat16", ("bfloat16", "int8")),
        ("int4/128_from_mixed_bfloat16", ("mixed_bfloat16", "int4/128")),
        ({"class_name": "QuantizedDTypePolicy", "config": {"mode": "int8", "source_name": "float16"}}, ("float16", "int8")),
        ({"class_name": "Int4DTypePolicy", "config": {"mode": "int4/64", "source_name": None}}, ("float32", "int4/64")),
        ("float16", ("plain", None)),
        (None, ("plain", None)),
    ],
)
def test_every_form_of_a_policy(dtype, wanted):
    assert read_policy(dtype, lambda _: "plain")[:2] == wanted


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "int3"}, "mode must be one of int8, int4, got 'int3'"),
        ({"mode": None}, "mode must be one of"),
        ({"mode": "int8", "block_size": 8}, "int8 has no block_size"),
        ({"mode": "int4", "block_size": 0}, "block_size of int4 must be a positive integer, got 0"),
        ({"mode": "int4", "block_size": True}, "block_size of int4"),
        ({"mode": "int4", "weight_only": False}, "int4 is for weights alone"),
    ],
)
def test_arguments_that_are_wrong(arguments, message):
    model = build("opt")
    with pytest.raises(ValueError, match=message):
        model.quantize(**arguments)
    assert model.quantization is None


def test_twice_is_refused_and_the_other_way_too():
    model = build("opt", "int8")
    with pytest.raises(ValueError, match="quantised to int8 already"):
        model.quantize("int4")
    model.dequantize()
    with pytest.raises(ValueError, match="is not quantised"):
        model.dequantize()
    model.quantize("int4")


def test_infinite_weights_are_refused_before_anything_changes():
    model = build("opt")
    model.params["layers"][1]["feedforward_output_dense"]["kernel"][2, 3] = np.inf
    before = model.params
    with pytest.raises(ValueError, match=r"layers\.1\.feedforward_output_dense\.kernel holds infinities"):
        model.quantize("int8")
    assert model.params is before
    assert model.quantization is None


@pytest.mark.parametrize("before", ["", "int8"])
def test_what_is_interrupted_leaves_no_random_weights(before, monkeypatch):
    model = build("opt", before) if before else build("opt")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(backbone, "dequantized_tree" if before else "quantized_tree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.dequantize() if before else model.quantize("int8")
    with pytest.raises(RuntimeError, match=r"parameters are lost: (de)?quantize did not come to its end"):
        model({"token_ids": [[1]]})
    with pytest.raises(RuntimeError, match="parameters are lost"):
        _ = model.params


def test_weight_only_must_be_a_flag():
    with pytest.raises(ValueError, match="weight_only must be true or false"):
        OPTBackbone(**MODELS["opt"][1], weight_only=1)


def test_each_matrix_goes_before_the_next_is_quantised():
    """The peak is one tree and one matrix: every plain matrix is freed when it has been read."""
    import weakref

    class Traced(np.ndarray):
        pass

    model, alive, most = build("opt"), [], []
    for path, leaf in list(flatten(model.params)):
        node = model.params
        *parents, last = path.split(".")
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node[key]
        node[last] = leaf.copy().view(Traced)
        alive.append(weakref.ref(node[last]))
    del node, leaf
    reference = row_scale.reference
    try:
        row_scale.reference = lambda x: (most.append(sum(r() is not None for r in alive)), reference(np.asarray(x)))[1]
        model.quantize("int8")
    finally:
        row_scale.reference = reference
    matrices = sum(parameter.dtype == "int8" for parameter in model.parameters())
    assert most[matrices:] == sorted(most[matrices:], reverse=True)  # the first round only looks
    assert most[-1] <= len(alive) - (matrices - 2)


def test_ops_of_quantised_products_are_in_the_table():
    assert {"row_scale", "quantize_rows", "linear_int8", "linear_weight_int8", "linear_int4"} <= OPS.keys()
