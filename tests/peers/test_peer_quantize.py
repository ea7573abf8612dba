"""Quantised presets, both ways, with the KerasHub that is installed; int4 with the current one only."""

import json

import pytest
from test_quantize import agree, build, inputs, run, same

from refmodels import Backbone

MODELS = ["opt", "bloom", "t5", "t5 untied"]


def peer_outputs(keras_hub, model, given):
    import keras

    outputs = model({name: keras.ops.convert_to_tensor(values, "int32") for name, values in given.items()})
    outputs = outputs if isinstance(outputs, dict) else {"sequence_output": outputs}
    return {name: keras.ops.convert_to_numpy(values) for name, values in outputs.items()}


def load(keras_hub, directory):
    """0.32 drops a saved dtype that is not a plain one, unless it is passed as an argument; 0.17 reads it."""
    if hasattr(keras_hub.models, "T5Seq2SeqLM"):
        dtype = json.loads((directory / "config.json").read_text())["config"]["dtype"]
        return keras_hub.models.Backbone.from_preset(str(directory), dtype=dtype)
    return keras_hub.models.Backbone.from_preset(str(directory))


def check(keras_hub, tmp_path, name, form):
    """Ours is read by them. (What they have read so they cannot write: Keras then takes its layers for plain ones.)"""
    ours, exact = build(name, form), build(name, form, dtype="float64")
    exact.params = ours.params
    ours.save_to_preset(tmp_path / "ours")
    theirs = load(keras_hub, tmp_path / "ours")
    given = inputs(ours)
    agree(peer_outputs(keras_hub, theirs, given), lambda: run(exact, given), lambda: run(ours, given))


@pytest.mark.parametrize("name", MODELS)
def test_our_int8_runs_there(keras_hub, tmp_path, name):
    check(keras_hub, tmp_path, name, "int8")


@pytest.mark.parametrize("name", MODELS)
def test_our_int4_runs_there(keras_hub_new, tmp_path, name):
    check(keras_hub_new, tmp_path, name, "int4")


def check_theirs(keras_hub, tmp_path, name, form, *arguments, **keywords):
    """What they quantise is read by us, and is what we make of the same weights."""
    build(name).save_to_preset(tmp_path / "plain")
    theirs, ours = keras_hub.models.Backbone.from_preset(str(tmp_path / "plain")), build(name, form)
    peer_outputs(keras_hub, theirs, inputs(ours))  # BLOOM's cannot be quantised before it has been called
    theirs.quantize(*arguments, **keywords)
    theirs.save_to_preset(str(tmp_path / "theirs"))
    again = Backbone.from_preset(tmp_path / "theirs")
    same(again.params, ours.params)
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())["config"]["dtype"]
    assert written == ours.get_config()["dtype"]
    assert theirs.count_params() == ours.count_params()
    assert again.quantization == ours.quantization


@pytest.mark.parametrize("name", MODELS)
def test_their_int8_is_ours(keras_hub, tmp_path, name):
    check_theirs(keras_hub, tmp_path, name, "int8", "int8")


@pytest.mark.parametrize("name", MODELS)
def test_their_int4_is_ours(keras_hub_new, tmp_path, name):
    import keras

    check_theirs(keras_hub_new, tmp_path, name, "int4", config=keras.quantizers.Int4QuantizationConfig(block_size=5))
