"""Adapters: the real KerasHub and PEFT read ours and compute what we compute with them; and the other way round."""

import numpy as np
import pytest
from test_peer_saving import SIZES, VARIANTS, compare_outputs, inputs, model, outputs

from refmodels import Backbone, lora
from refmodels.parameters import flatten
from refmodels.weights import keras_lora

NAMES = ["query_dense", "value_dense", "query", "value", "query_projector", "value_projector"]
KERAS = ["opt", "bloom", "t5", "t5_flan"]
TARGETS = {
    "opt": [["q_proj", "v_proj"], ["k_proj", "out_proj", "fc1", "fc2"], "all-linear"],
    "bloom": [["query_key_value"], ["dense", "dense_h_to_4h", "dense_4h_to_h"], "all-linear"],
    "t5": [["q", "v"], ["k", "o", "wi", "wo"], "all-linear"],
    "t5_flan": [["q", "v"], ["wi_0", "wi_1", "wo"], "all-linear"],
}
CASES = [(variant, targets) for variant in TARGETS for targets in TARGETS[variant]]


def with_random_adapters(variant, names=None, rank=3):
    made = model(variant, "float32")
    made.enable_lora(rank, names)
    rng = np.random.default_rng(4)
    for path, values in flatten(made.params):
        if path.endswith("lora_kernel_b"):
            values[...] = rng.standard_normal(values.shape) / 2
    return made


def run(place, load, given):
    """Our float64 run and our float32 run with the adapters that `load(model)` puts in."""
    found = []
    for dtype in ("float64", "float32"):
        ours = Backbone.from_preset(place, dtype=dtype)
        plain = outputs(ours(given))
        load(ours)
        found.append(outputs(ours(given)))
        assert all(np.abs(found[-1][name] - plain[name]).max() > 0.01 for name in plain), "the adapters count"
    return found


def agree_on_all(peer, truth, own, agree):
    assert peer.keys() == truth.keys()
    for name, values in peer.items():
        agree(values, truth[name], own[name], name)


def unpadded(family):
    return {name: np.ones_like(values) if "mask" in name else values for name, values in inputs(family).items()}


# -- KerasHub ----------------------------------------------------------------------------------------------------------------


def layers_with_weights(peer):
    return [layer for layer in peer._flatten_layers(include_self=False) if layer.weights]


def enable(peer, rank):
    """`enable_lora` with names for T5 too, which KerasHub 0.17 cannot be given and 0.32 has not as its default."""
    peer.enable_lora(rank)
    for index, layer in enumerate(layers_with_weights(peer)):
        if layer.name in NAMES and index not in peer._lora_enabled_layers:
            layer.trainable = True
            layer.enable_lora(rank)
            peer._lora_enabled_layers.append(index)


@pytest.mark.parametrize("variant", KERAS)
def test_keras_hub_loads_our_adapters(keras_hub, agree, tmp_path, variant):
    made = with_random_adapters(variant)
    path = tmp_path / "x.lora.h5"
    made.save_lora_weights(path)
    model(variant, "float32").save_to_preset(tmp_path / "base")
    peer = keras_hub.models.Backbone.from_preset(str(tmp_path / "base"))
    enable(peer, 3)
    peer.load_lora_weights(str(path))
    given = unpadded(made.family)
    truth, own = run(tmp_path / "base", lambda ours: ours.load_lora_weights(path), given)
    agree_on_all(outputs(peer(given)), truth, own, agree)


@pytest.mark.parametrize("variant", KERAS)
def test_we_load_keras_hubs_adapters(keras_hub, agree, tmp_path, variant):
    model(variant, "float32").save_to_preset(tmp_path / "base")
    peer = keras_hub.models.Backbone.from_preset(str(tmp_path / "base"))
    enable(peer, 2)
    rng = np.random.default_rng(5)
    for index in peer._lora_enabled_layers:
        b = layers_with_weights(peer)[index].lora_kernel_b
        # Small, or T5's unscaled scores grow, and so does what float32 costs: by chance more for one of us than for the other.
        b.assign(rng.standard_normal(tuple(b.shape)).astype("float32") / 4)
    path = tmp_path / "x.lora.h5"
    peer.save_lora_weights(str(path))
    given = unpadded(variant.partition("_")[0])
    truth, own = run(tmp_path / "base", lambda ours: ours.load_lora_weights(path), given)
    agree_on_all(outputs(peer(given)), truth, own, agree)
    peer.save_to_preset(str(tmp_path / "merged"))
    merged = Backbone.from_preset(tmp_path / "merged", dtype="float32")
    agree_on_all(outputs(merged(given)), truth, own, agree)


@pytest.mark.parametrize("variant", KERAS)
def test_a_preset_saved_with_adapters_has_them_in_its_kernels(keras_hub, agree, tmp_path, variant):
    made = with_random_adapters(variant)
    made.save_to_preset(tmp_path)
    assert made.has_lora
    peer = keras_hub.models.Backbone.from_preset(str(tmp_path))
    given = inputs(made.family)
    compare_outputs(peer(given), tmp_path, "float32", given, agree)
    own, merged = outputs(made(given)), outputs(Backbone.from_preset(tmp_path)(given))
    made.merge_lora()
    assert all(np.array_equal(merged[name], values) for name, values in outputs(made(given)).items())
    assert all(np.abs(merged[name] - own[name]).max() < 1e-4 for name in own), "and not the plain kernels"


@pytest.mark.parametrize("variant", KERAS)
def test_indices(keras_hub, tmp_path, variant):
    """Every dense layer's index leads to the layer of KerasHub that has its kernel."""
    kind, options = VARIANTS[variant]
    made = kind(**(SIZES | {"num_layers": 3}), **options, seed=1)
    made.save_to_preset(tmp_path)
    theirs = layers_with_weights(keras_hub.models.Backbone.from_preset(str(tmp_path)))
    values, dense = dict(flatten(made.params)), lora.dense_layers(made)
    indices = keras_lora.indices(made.family, 3, values)
    assert dense.keys() <= indices.keys()
    assert len(theirs) == 1 + max(indices.values())
    for path, kernel in dense.items():
        found = outputs(theirs[indices[path]].kernel)["sequence_output"]
        assert np.array_equal(found.reshape(kernel.shape), values[kernel.path]), path


# -- PEFT --------------------------------------------------------------------------------------------------------------------


def hugging_face(transformers, place):
    kind = {"opt": "OPTForCausalLM", "bloom": "BloomForCausalLM", "t5": "T5ForConditionalGeneration"}
    family = transformers.AutoConfig.from_pretrained(place).model_type
    return getattr(transformers, kind[family]).from_pretrained(place).eval()


def hidden(wrapped, given):
    """Of the model inside PEFT's: the outputs under our names."""
    import torch

    inner = wrapped.base_model.model
    tensors = {name: torch.from_numpy(values) for name, values in given.items()}
    with torch.no_grad():
        if "token_ids" in given:
            body = inner.model if hasattr(inner, "model") else inner.transformer
            result = body(input_ids=tensors["token_ids"], attention_mask=tensors["padding_mask"])
            return {"sequence_output": result.last_hidden_state.numpy()}
        encoder_mask, decoder_mask = tensors["encoder_padding_mask"], tensors["decoder_padding_mask"]
        encoded = inner.encoder(input_ids=tensors["encoder_token_ids"], attention_mask=encoder_mask).last_hidden_state
        decoded = inner.decoder(
            input_ids=tensors["decoder_token_ids"],
            attention_mask=decoder_mask,
            encoder_hidden_states=encoded,
            encoder_attention_mask=encoder_mask,
        ).last_hidden_state
    return {"encoder_sequence_output": encoded.numpy(), "decoder_sequence_output": decoded.numpy()}


@pytest.mark.parametrize(("variant", "targets"), CASES, ids=str)
@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "lora_alpha": 5}], ids=["plain", "rslora"])
def test_we_load_pefts_adapters(transformers, peft, agree, tmp_path, variant, targets, more):
    import torch

    base = model(variant, "float32")
    base.save_to_hf(tmp_path / "base")
    torch.manual_seed(6)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 8, "target_modules": targets, "init_lora_weights": False} | more)
    wrapped = peft.get_peft_model(hugging_face(transformers, tmp_path / "base"), config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    given = unpadded(base.family)
    truth, own = run(tmp_path / "base", lambda ours: ours.load_peft_adapter(tmp_path / "adapter"), given)
    agree_on_all(hidden(wrapped, given), truth, own, agree)


def test_patterns_and_layers_as_in_peft(transformers, peft, agree, tmp_path):
    import torch

    model("opt", "float32").save_to_hf(tmp_path / "base")
    torch.manual_seed(6)
    config = peft.LoraConfig(
        r=3,
        target_modules=["q_proj", "fc1", "fc2"],
        layers_to_transform=[1],
        rank_pattern={"fc1": 5, "^model.decoder.layers.1.self_attn.q_proj": 2, "layers.0.fc2": 4},
        alpha_pattern={"layers.1.fc1": 20, "q_proj": 3, "c2": 100},
        init_lora_weights=False,
    )
    wrapped = peft.get_peft_model(hugging_face(transformers, tmp_path / "base"), config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    given = unpadded("opt")
    truth, own = run(tmp_path / "base", lambda ours: ours.load_peft_adapter(tmp_path / "adapter"), given)
    agree_on_all(hidden(wrapped, given), truth, own, agree)


@pytest.mark.parametrize("variant", TARGETS)
@pytest.mark.parametrize(
    "names", [None, ["key", "output", "fc1", "mlp_output_dense", "output_projector"]], ids=["query", "key"]
)
def test_peft_loads_our_adapters(transformers, peft, agree, tmp_path, variant, names):
    made = with_random_adapters(variant, names)
    model(variant, "float32").save_to_hf(tmp_path / "base")
    made.save_peft_adapter(tmp_path / "adapter")
    wrapped = peft.PeftModel.from_pretrained(hugging_face(transformers, tmp_path / "base"), tmp_path / "adapter").eval()
    given = unpadded(made.family)
    truth, own = run(tmp_path / "base", lambda ours: ours.load_peft_adapter(tmp_path / "adapter"), given)
    agree_on_all(hidden(wrapped, given), truth, own, agree)
    agree_on_all(outputs(made(given)), truth, own, agree)
