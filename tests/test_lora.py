"""Adapters: KerasHub's own outputs and files, PEFT's files written here by hand, files that do not fit."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loopback import Loopback
from safetensors.numpy import load_file, save_file
from test_torch_bin import archive, state, tensor

from refmodels import Accelerator, Backbone, BloomBackbone, OPTBackbone, T5Backbone, lora, lora_files, use
from refmodels.files import CheckpointError, MissingFileError
from refmodels.lora import Adapter
from refmodels.numerics import calibrated, compare
from refmodels.parameters import flatten
from refmodels.weights import keras_lora, peft

GOLDENS = Path(__file__).parent / "data" / "goldens"
KERAS_HUB = [f"keras_hub_{version}/{family}_lora" for version in ("0.17", "0.32") for family in ("opt", "bloom")]
SIZES = {"vocabulary_size": 11, "num_layers": 2, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 12}
FAMILIES = {"opt": OPTBackbone, "bloom": BloomBackbone, "t5": T5Backbone}
QUERY = {
    "opt": "layers.0.self_attention.query",
    "bloom": "layers.0.self_attention.query",
    "t5": "encoder.layers.0.self_attention.query",
}


def make(family, dtype="float32", **arguments):
    return FAMILIES[family](**{**SIZES, **arguments}, dtype=dtype, seed=3)


def inputs(backbone):
    ids, mask = np.array([[3, 1, 4, 1], [5, 9, 2, 6]]), np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    return {name: mask if "mask" in name else ids for pair in backbone.inputs.items() for name in (pair[0], pair[1][0])}


def outputs(backbone):
    found = backbone(inputs(backbone))
    return np.concatenate([part.ravel() for part in found.values()]) if isinstance(found, dict) else found.ravel()


def leaves(backbone):
    return dict(flatten(backbone.params))


def with_random_adapters(family, dtype="float32", rank=3, names=None, **arguments):
    """A model whose b are not zero, so that its adapters count."""
    model = make(family, dtype, **arguments)
    model.enable_lora(rank, names)
    rng = np.random.default_rng(7)
    for path, leaf in flatten(model.params):
        if path.endswith("lora_kernel_b"):
            leaf[...] = rng.standard_normal(leaf.shape)
    return model


def same_adapters(found, wanted):
    assert found.keys() == wanted.keys()
    for path, adapter in wanted.items():
        assert np.array_equal(found[path].a, adapter.a), path
        assert np.array_equal(found[path].b, adapter.b), path
        assert found[path].scale == adapter.scale, path


def product(adapter):
    """The change of the kernel, (k, n)."""
    k = len(adapter.a)
    return adapter.scale * np.concatenate(
        [adapter.a[:, i].astype(float) @ adapter.b for i in range(adapter.groups)], 1
    ).reshape(k, -1)


def rewritten(path, change):
    """The HDF5 file again, as `change` leaves its datasets."""
    with h5py.File(path) as file:
        found = {}
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    change(found)
    with h5py.File(path, "w") as file:
        for name, values in found.items():
            file[name] = values


# -- KerasHub ----------------------------------------------------------------------------------------------------------------


def golden(name):
    tensors = load_file(GOLDENS / name / "golden.safetensors")
    return {key.removeprefix("in."): value for key, value in tensors.items() if key.startswith("in.")}, tensors


@pytest.mark.parametrize("name", KERAS_HUB)
def test_keras_hub_with_and_without_its_adapter(name):
    given_inputs, peer = golden(name)
    truth, own = (Backbone.from_preset(GOLDENS / name, dtype=dtype) for dtype in ("float64", "float32"))
    assert np.abs(peer["out.with_adapter"] - peer["out.before"]).max() > 0.1
    for key in ("before", "with_adapter"):
        verdict = compare(peer[f"out.{key}"], truth(given_inputs), calibrated(4), wanted=own(given_inputs), name=key)
        assert verdict, verdict
        for model in (truth, own):
            model.load_lora_weights(GOLDENS / name / "adapter.lora.h5")


@pytest.mark.parametrize("name", KERAS_HUB)
def test_keras_hub_trains_the_same_parameters(name):
    wanted = json.loads((GOLDENS / name / "golden.json").read_text())["trainable_after_enable"]
    model = Backbone.from_preset(GOLDENS / name)
    model.enable_lora(3)
    ours = [path.replace("layers.", "transformer_layer_").replace(".", "/") for path in model.trainable_parameters()]
    assert sorted(ours) == sorted(path.replace("_dense/", "/") for path in wanted)


@pytest.mark.parametrize("name", KERAS_HUB)
def test_keras_hub_file_again_bit_for_bit(name, tmp_path):
    source, path = GOLDENS / name / "adapter.lora.h5", tmp_path / "again.lora.h5"
    model = Backbone.from_preset(GOLDENS / name)
    model.load_lora_weights(source)
    model.save_lora_weights(path)
    found = {}
    for file in (source, path):
        with h5py.File(file) as opened:
            content = found[file] = {}
            opened.visititems(
                lambda name, item, to=content: to.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
            )
    assert found[path].keys() == found[source].keys()
    for key, values in found[source].items():
        assert (values.dtype, values.shape, values.tobytes()) == (
            found[path][key].dtype,
            found[path][key].shape,
            found[path][key].tobytes(),
        )


# What KerasHub 0.17 and 0.32 showed for three layers: tests/peers asks them again.
INDICES = {
    "opt": {"layers.0.self_attention.value": 10, "layers.0.self_attention.query": 12, "layers.2.self_attention.query": 32,
            "layers.1.feedforward_output_dense": 15, "layers.1.self_attention.key": 21, "layer_norm": 33},
    "bloom": {"layers.0.self_attention.value": 8, "layers.0.self_attention.query": 10, "layers.2.self_attention.query": 30,
              "layers.1.mlp_intermediate_dense": 14, "layers.1.self_attention.output": 17, "final_layernorm": 32},
    "t5": {"encoder.layers.0.self_attention.value": 9, "encoder.layers.0.self_attention.query": 11,
           "encoder.layers.2.gate_projector": 26, "decoder.layers.0.cross_attention.value": 43,
           "decoder.layers.0.self_attention.query": 51, "decoder.layers.2.cross_attention.query": 79,
           "decoder.layers.2.self_attention.query": 85, "decoder.layer_norm": 86},
    "t5_not_gated": {"encoder.layers.0.self_attention.value": 8, "encoder.layers.2.self_attention.query": 30,
                     "decoder.layers.0.cross_attention.query": 41, "decoder.layers.2.self_attention.query": 79,
                     "decoder.layer_norm": 80},
}  # fmt: skip


@pytest.mark.parametrize("name", INDICES)
def test_indices(name):
    arguments = {"use_gated_activation": name == "t5"} if name.startswith("t5") else {}
    model = make(name.partition("_")[0], num_layers=3, **arguments)
    paths = [parameter.path for parameter in model.parameters()]
    found = keras_lora.indices(model.family, 3, paths)
    assert {path: found[path] for path in INDICES[name]} == INDICES[name]
    assert max(found.values()) == max(INDICES[name].values())


# -- enabling ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_enable_lora(family):
    model, before = make(family), outputs(make(family))
    model.enable_lora(3)
    assert np.array_equal(outputs(model), before), "b is zero"
    found = lora.adapters(model)
    assert {path.rpartition(".")[2] for path in found} == {"query", "value"}
    assert len(found) == (
        12 if family == "t5" else 4
    )  # T5: in the encoder, and twice in the decoder, which KerasHub leaves out
    heads = 1 if family == "t5" else 2
    for adapter in found.values():
        assert (adapter.a.shape, adapter.b.shape, adapter.scale) == ((8, heads, 3), (3, 8 // heads), 1.0)
        limit = np.sqrt(6 / (8 * heads))
        assert 0.8 * limit < np.abs(adapter.a).max() <= limit
        assert not adapter.b.any()
    assert not np.array_equal(*(adapter.a for adapter in list(found.values())[:2]))
    again = make(family)
    _ = again.params  # drawn before, this time
    again.enable_lora(3)
    same_adapters(lora.adapters(again), found)
    kernels = [path for path in again.trainable_parameters() if path.endswith(".kernel")]
    assert kernels == []
    assert len(again.trainable_parameters()) == len(found) * (2 if family == "t5" else 3)


def test_trainable_parameters_without_adapters():
    model = make("opt")
    assert model.trainable_parameters() == [parameter.path for parameter in model.parameters()]
    model.trainable = False
    assert model.trainable_parameters() == []
    model.enable_lora(2)
    assert len(model.trainable_parameters()) == 12


@pytest.mark.parametrize("names", [["query"], ["query_dense"], ["attention_output", "key"], ["mlp_output_dense"]])
def test_target_layer_names(names):
    ours = {"query_dense": "query", "attention_output": "output"}
    model = make("bloom")
    model.enable_lora(2, names)
    found = lora.adapters(model)
    assert {path.rpartition(".")[2] for path in found} == {ours.get(name, name) for name in names} - {"attention_output"}
    assert len(found) % 2 == 0


def test_keras_hub_names_of_opt_and_t5():
    model = make("opt")
    model.enable_lora(2, ["attention_output", "feedforward_intermediate_dense"])
    assert {path.removeprefix("layers.0.") for path in lora.adapters(model) if ".0." in path} == {
        "self_attention.output",
        "feedforward_intermediate_dense",
    }
    model = make("t5")
    model.enable_lora(2, ["output_projector"])
    assert len(lora.adapters(model)) == 10  # of three attentions and two feed-forward parts in two layers


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "3", 10**6])
def test_a_rank_must_be_a_positive_integer(rank):
    with pytest.raises(ValueError, match=r"rank must be an integer from 1 to 65536, got"):
        make("opt").enable_lora(rank)


def test_what_cannot_be_enabled():
    model = make("opt")
    with pytest.raises(
        ValueError, match=r"no layer is named dense, token_embedding; OPTBackbone has attention_output, .*value"
    ):
        model.enable_lora(2, ["token_embedding", "dense"])
    with pytest.raises(TypeError, match="must be a list of names, got the string 'query'"):
        model.enable_lora(2, "query")
    with pytest.raises(TypeError, match=r"must be a list of names, got \['query', 3\]"):
        model.enable_lora(2, ["query", 3])
    assert not model.has_lora
    model.enable_lora(2)
    with pytest.raises(ValueError, match="has adapters already"):
        model.enable_lora(2)


def test_adapters_reach_an_accelerator_that_has_loaded_the_model():
    class Doubling(Accelerator):
        loads = 0

        def load(self, params):
            self.loads += 1
            return params

    accelerator = Doubling("doubling")
    model = make("opt", accelerator=accelerator)
    before = outputs(model)
    model.enable_lora(2)
    for path, leaf in flatten(model.params):
        if path.endswith("lora_kernel_b"):
            leaf[...] = 1
    assert not np.array_equal(outputs(model), before)
    assert accelerator.loads == 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "mixed_bfloat16", "float64"])
def test_adapters_are_wide(dtype):
    model = with_random_adapters("opt", dtype)
    assert {leaf.dtype.name for path, leaf in flatten(model.params) if "lora" in path} == {
        "float64" if dtype == "float64" else "float32"
    }
    assert outputs(model).dtype == model.compute_dtype


# -- merging -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_equals_unmerged(family, dtype):
    model, exact = with_random_adapters(family, dtype), with_random_adapters(family, "float64")
    # The truth has the kernels that this type holds: rounding them is no error of merging.
    values = leaves(model)
    for path, leaf in flatten(exact.params):
        leaf[...] = values[path].astype(np.float64)
    own, truth = outputs(model), outputs(exact)
    model.merge_lora()
    assert not model.has_lora
    assert leaves(model).keys() == {parameter.path for parameter in model.parameters()}
    verdict = compare(outputs(model), truth, calibrated(4), wanted=own)
    assert verdict, verdict
    exact.merge_lora()
    assert np.abs(outputs(exact) - truth).max() <= np.abs(own.astype(np.float64) - truth).max()


def test_a_merged_kernel_by_hand():
    model = with_random_adapters("opt")
    kernel, adapter = leaves(model)[f"{QUERY['opt']}.kernel"], lora.adapters(model)[QUERY["opt"]]
    wanted = [
        [
            kernel[i, 4 * h + j] + sum(float(adapter.a[i, h, r]) * float(adapter.b[r, j]) for r in range(3))
            for h in range(2)
            for j in range(4)
        ]
        for i in range(8)
    ]
    tree = lora.merged(model.params)
    assert np.allclose(dict(flatten(tree))[f"{QUERY['opt']}.kernel"], wanted, rtol=0, atol=2.0**-20)  # a few roundings below 4
    assert model.has_lora, "the model's own tree is as it was"


def test_merging_is_the_hosts_business():
    model, other = with_random_adapters("opt"), with_random_adapters("opt")
    with use(Loopback()):
        model.merge_lora()
    other.merge_lora()
    assert all(np.array_equal(leaf, leaves(other)[path]) for path, leaf in leaves(model).items())


def test_what_cannot_be_merged():
    with pytest.raises(ValueError, match="OPTBackbone has no adapters to merge"):
        make("opt").merge_lora()


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_adapters_of_a_quantised_model(mode, tmp_path):
    model = make("bloom")
    model.quantize(mode)
    before = outputs(model)
    model.enable_lora(2)
    assert np.array_equal(outputs(model), before)
    model.load_peft_adapter(write_peft(tmp_path, {FUSED: factors((24, 8))}))
    assert not np.array_equal(outputs(model), before)
    with pytest.raises(ValueError, match=r"query: a quantised kernel cannot .* call dequantize\(\) first"):
        model.merge_lora()
    model.dequantize()
    assert lora.adapters(model)["layers.1.self_attention.query"].rank == 2
    model.merge_lora()
    assert not model.has_lora


# -- files by path -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("suffix", [".lora.h5", ".safetensors"])
def test_files_again_bit_for_bit(family, suffix, tmp_path):
    model, other = with_random_adapters(family), make(family)
    model.save_lora_weights(tmp_path / f"x{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == [f"x{suffix}"]
    other.load_lora_weights(str(tmp_path / f"x{suffix}"))
    same_adapters(lora.adapters(other), lora.adapters(model))
    assert np.array_equal(outputs(other), outputs(model))
    enabled = make(family)
    enabled.enable_lora(3)
    enabled.load_lora_weights(tmp_path / f"x{suffix}")
    assert np.array_equal(outputs(enabled), outputs(model))


def test_what_a_named_file_holds(tmp_path):
    from safetensors import safe_open

    model = with_random_adapters("opt")
    model.save_lora_weights(tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "numpy") as file:
        assert file.metadata() == {
            "format": "refmodels.lora",
            "version": "1",
            "model": "OPTBackbone",
            "rank": "3",
            "alpha": "3.0",
        }
        assert set(file.keys()) == {path for path in leaves(model) if "lora" in path}


@pytest.mark.parametrize("suffix", [".lora.h5", ".safetensors"])
def test_another_rank_is_refused(suffix, tmp_path):
    with_random_adapters("opt").save_lora_weights(tmp_path / f"x{suffix}")
    model = make("opt")
    model.enable_lora(2)
    before = leaves(model)
    with pytest.raises(ValueError, match="the adapters have rank 3, the model was enabled with rank 2"):
        model.load_lora_weights(tmp_path / f"x{suffix}")
    assert all(leaf is before[path] for path, leaf in leaves(model).items())


@pytest.mark.parametrize("name", ["x.h5", "x", "x.bin", "x.safetensors.index.json"])
def test_the_ending_says_the_form(name, tmp_path):
    model = with_random_adapters("opt")
    for call in (model.save_lora_weights, model.load_lora_weights):
        with pytest.raises(ValueError, match=r"must end in \.lora\.h5 \(KerasHub's form\) or \.safetensors, got '.*/x"):
            call(tmp_path / name)


@pytest.mark.parametrize("suffix", [".lora.h5", ".safetensors"])
def test_nothing_to_save_and_nothing_to_load(suffix, tmp_path):
    model = make("opt")
    with pytest.raises(ValueError, match=r"no adapters to save: call enable_lora\(rank\) first"):
        model.save_lora_weights(tmp_path / f"x{suffix}")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MissingFileError, match="no such file"):
        model.load_lora_weights(tmp_path / f"x{suffix}")
    (tmp_path / f"x{suffix}").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="not a "):
        model.load_lora_weights(tmp_path / f"x{suffix}")


def put(name, values):
    return lambda found: found.update({name: values})


QUERY_A = "lora/12/vars/lora_kernel_a"
H5_FAULTS = {
    "no rank": (lambda found: found.pop("lora/vars/rank"), "dataset 'lora/vars/rank' is missing"),
    "rank 0": (put("lora/vars/rank", np.int64(0)), "is no whole number from 1 to 65536"),
    "rank of floats": (put("lora/vars/rank", np.float32(3)), "is no whole number"),
    "several ranks": (put("lora/vars/rank", np.array([3, 3])), "is no whole number"),
    "other rank": (put("lora/vars/rank", np.int64(2)), r"lora_kernel_a' has shape \(8, 2, 3\), wanted \(8, 2, 2\)"),
    "one layer's a": (lambda found: found.pop(QUERY_A), "'lora/12/vars/lora_kernel_a' of shape .* is missing"),
    "a layer": (lambda found: [found.pop(name) for name in list(found) if "/12/" in name], "lora/12/vars/.* is missing"),
    "surplus layer": (put("lora/14/vars/lora_kernel_a", np.ones((8, 3))), "'lora/14/vars/lora_kernel_a' is surplus"),
    "surplus": (put("layers/dense/vars/0", np.ones((8, 3))), "'layers/dense/vars/0' is surplus"),
    "integers": (put(QUERY_A, np.ones((8, 2, 3), np.int32)), "has dtype int32, wanted one of float16"),
    "nothing": (lambda found: [found.pop(name) for name in list(found) if name != "lora/vars/rank"], "it holds no adapter"),
}  # fmt: skip


@pytest.mark.parametrize("fault", H5_FAULTS)
def test_a_keras_file_that_does_not_fit(fault, tmp_path):
    path, (change, message) = tmp_path / "x.lora.h5", H5_FAULTS[fault]
    with_random_adapters("opt").save_lora_weights(path)
    rewritten(path, change)
    model = make("opt")
    with pytest.raises(CheckpointError, match=message) as caught:
        model.load_lora_weights(path)
    assert str(path) in str(caught.value)
    assert not model.has_lora


@pytest.mark.parametrize("suffix", [".lora.h5", ".safetensors"])
@pytest.mark.parametrize("other", ["more layers", "fewer layers", "wider", "other heads", "t5"])
def test_another_models_file(suffix, other, tmp_path):
    arguments = {
        "more layers": {"num_layers": 3}, "fewer layers": {"num_layers": 1}, "wider": {"hidden_dim": 12},
        "other heads": {"num_heads": 4}, "t5": {},
    }[other]  # fmt: skip
    with_random_adapters("opt").save_lora_weights(tmp_path / f"x{suffix}")
    model = make("t5" if other == "t5" else "opt", **arguments)
    if suffix == ".safetensors" and other in ("more layers", "other heads"):
        model.load_lora_weights(tmp_path / f"x{suffix}")  # names say where they belong; groups need not be heads
        assert len(lora.adapters(model)) == 4
        return
    with pytest.raises(CheckpointError, match=r"does not fit this (OPT|T5)Backbone: tensor"):
        model.load_lora_weights(tmp_path / f"x{suffix}")


NAMED_FAULTS = {
    "b": (lambda found: found.pop(f"{QUERY['opt']}.lora_kernel_b"), "lora_kernel_b' of shape .* is missing"),
    "scale": (lambda found: found.pop(f"{QUERY['opt']}.lora_scale"), "lora_scale' of shape .* is missing"),
    "a": (lambda found: found.pop(f"{QUERY['opt']}.lora_kernel_a"), "lora_kernel_a' is missing"),
    "infinite scale": (put(f"{QUERY['opt']}.lora_scale", np.array(np.inf, np.float32)), "lora_scale is inf, wanted a finite"),
    "long scale": (put(f"{QUERY['opt']}.lora_scale", np.ones(1, np.float32)), r"lora_scale' has shape \(1,\), wanted \(\)"),
    "rank": (put(f"{QUERY['opt']}.lora_kernel_b", np.ones((2, 4), np.float32)), r"has shape \(2, 4\), wanted \(3, 4\)"),
    "rank 0": (put(f"{QUERY['opt']}.lora_kernel_a", np.ones((8, 2, 0), np.float32)), r"shape \(8, 2, 0\), wanted \(8, groups"),
    "groups": (put(f"{QUERY['opt']}.lora_kernel_a", np.ones((8, 3, 3), np.float32)), r"wanted \(8, groups that divide 8"),
    "flat": (put(f"{QUERY['opt']}.lora_kernel_a", np.ones((8, 6), np.float32)), r"shape \(8, 6\), wanted"),
    "integers": (put(f"{QUERY['opt']}.lora_kernel_b", np.ones((3, 4), np.int64)), "has dtype int64"),
    "other layer": (put("token_embedding.lora_kernel_a", np.ones((8, 2, 3), np.float32)), "'token_embedding.* is surplus"),
    "nothing": (lambda found: found.clear(), "it holds no adapter"),
}  # fmt: skip


@pytest.mark.parametrize("fault", NAMED_FAULTS)
def test_a_named_file_that_does_not_fit(fault, tmp_path):
    path, (change, message) = tmp_path / "x.safetensors", NAMED_FAULTS[fault]
    with_random_adapters("opt").save_lora_weights(path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "refmodels.lora", "version": "1"})
    model = make("opt")
    with pytest.raises(CheckpointError, match=message) as caught:
        model.load_lora_weights(path)
    assert str(path) in str(caught.value)
    assert not model.has_lora
    save_file(tensors, path, metadata={"format": "refmodels.lora", "version": "2"})
    with pytest.raises(CheckpointError, match=r"version '2', wanted 'refmodels.lora' version '1'"):
        model.load_lora_weights(path)


def test_weights_and_adapters_are_not_mistaken_for_each_other(tmp_path):
    source = GOLDENS / KERAS_HUB[0]
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    (tmp_path / "model.weights.h5").write_bytes((source / "adapter.lora.h5").read_bytes())
    with pytest.raises(CheckpointError, match="not a model's weights: load the base model, then call its load_lora_weights"):
        Backbone.from_preset(tmp_path)
    (tmp_path / "x.lora.h5").write_bytes((source / "model.weights.h5").read_bytes())
    with pytest.raises(CheckpointError, match="no adapters that KerasHub wrote"):
        Backbone.from_preset(source).load_lora_weights(tmp_path / "x.lora.h5")


# -- other shapes ------------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([0.5, 1.0, 4.0]),
    st.integers(0, 99),
)
def test_another_form_is_the_same_product(k, groups, rank, columns, scale, seed):
    """Integers, so that every form of the product must be equal."""
    rng = np.random.default_rng(seed)
    grouped = Adapter(rng.integers(-3, 4, (k, groups, rank)) * 1.0, rng.integers(-3, 4, (rank, columns)) * 1.0, scale)
    plain = Adapter(rng.integers(-3, 4, (k, 1, rank)) * 1.0, rng.integers(-3, 4, (rank, groups * columns)) * 1.0, scale)
    one, several = grouped.with_groups(1), plain.with_groups(groups)
    assert (one.groups, one.rank) == (1, groups * rank)
    assert several.groups == groups
    assert np.array_equal(product(one), product(grouped))
    assert np.array_equal(product(several), product(plain))
    assert np.array_equal(product(several.with_rank(several.rank + 2)), product(plain))
    assert np.array_equal(product(grouped.with_scale(2.0)), product(grouped))
    same_adapters({"": one.with_groups(groups)}, {"": grouped})


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_any_shape_become_keras_hubs(family, tmp_path):
    model = with_random_adapters(family, "float64", names=["query"])
    found = dict(lora.adapters(model))
    first, second, *_ = found
    rng = np.random.default_rng(0)
    found[first] = Adapter(rng.standard_normal((8, 1, 2)), rng.standard_normal((2, 8)), 0.5)  # as PEFT has it
    del found[second]  # KerasHub adapts all layers of a name
    model.params = lora.attached(model.params, found, "float64")
    model.save_lora_weights(tmp_path / "x.lora.h5")
    other = make(family, "float64")
    other.load_lora_weights(tmp_path / "x.lora.h5")
    again = lora.adapters(other)
    assert len({adapter.rank for adapter in again.values()}) == 1
    assert not again[second].b.any()
    for path, adapter in found.items():
        assert np.array_equal(product(again[path]), product(adapter)), path


def test_layers_that_keras_hub_does_not_have(tmp_path):
    model = make("opt", word_embed_proj_dim=4)
    model.enable_lora(2, ["project_in", "query"])
    model.save_lora_weights(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"KerasHub's OPTBackbone has no layer project_in: save the adapters as \.safetensors"):
        model.save_lora_weights(tmp_path / "x.lora.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


# -- PEFT --------------------------------------------------------------------------------------------------------------------

# A module of the first layer for each family, the shape of its weight there, the layers here that it is.
PLAIN = {
    "opt": ("model.decoder.layers.0.fc1", (12, 8), "layers.0.feedforward_intermediate_dense"),
    "bloom": ("transformer.h.0.mlp.dense_4h_to_h", (8, 12), "layers.0.mlp_output_dense"),
    "t5": ("decoder.block.0.layer.1.EncDecAttention.v", (8, 8), "decoder.layers.0.cross_attention.value"),
}
FUSED = "transformer.h.1.self_attention.query_key_value"


def write_peft(directory, factors, **fields):
    """An adapter as PEFT writes it: module -> (A (r, k), B (n, r))."""
    directory.mkdir(exist_ok=True)
    tensors = {}
    for module, pair in factors.items():
        for letter, values in zip("AB", pair, strict=True):
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = np.ascontiguousarray(values)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": sorted(factors), "bias": "none"}
    config["base_model_name_or_path"] = "someone/base"
    (directory / "adapter_config.json").write_text(json.dumps(config | fields))
    return directory


def factors(shape, rank=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(-3, 4, (rank, shape[1])).astype(np.float32), rng.integers(-3, 4, (shape[0], rank)).astype(np.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_peft_adapter_changes_the_kernel_by_its_product(family, tmp_path):
    module, shape, layer = PLAIN[family]
    a, b = factors(shape)
    model = make(family)
    model.load_peft_adapter(write_peft(tmp_path, {module: (a, b)}))
    found = lora.adapters(model)
    assert found.keys() == {layer}
    assert np.array_equal(product(found[layer]), 4 * (b @ a).T)  # alpha / r = 8 / 2, and the weight there is transposed


@pytest.mark.parametrize("start", ["transformer.", ""])
def test_blooms_fused_module_is_three_layers(start, tmp_path):
    a, b = factors((24, 8))
    model = make("bloom")
    model.load_peft_adapter(write_peft(tmp_path, {start + FUSED.removeprefix("transformer."): (a, b)}))
    found = lora.adapters(model)
    change = 4 * (b @ a)  # row: head, then query key value, then the place in the head
    for number, part in enumerate(("query", "key", "value")):
        rows = [12 * head + 4 * number + place for head in range(2) for place in range(4)]
        assert np.array_equal(product(found[f"layers.1.self_attention.{part}"]), change[rows].T), part


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 4.0),
        ({"lora_alpha": 3}, 1.5),
        ({"lora_alpha": 0.5}, 0.25),
        ({"use_rslora": True}, 8 / 2**0.5),
        ({"alpha_pattern": {"fc1": 6}}, 3.0),
        ({"alpha_pattern": {"layers.0.fc1": 6, "fc1": 2}}, 3.0),
        ({"alpha_pattern": {r"^model\.decoder\.layers\.0\.fc1": 6}}, 3.0),
        ({"alpha_pattern": {r"^decoder\.layers\.0\.fc1": 6, "c1": 6, "layers.1.fc1": 6}}, 4.0),
        ({"r": 16, "rank_pattern": {".*fc[0-9]": 2}}, 4.0),
    ],
)
def test_scales(fields, scale, tmp_path):
    module, shape, layer = PLAIN["opt"]
    model = make("opt", "float64")
    model.load_peft_adapter(write_peft(tmp_path, {module: factors(shape)}, **fields))
    assert lora.adapters(model)[layer].scale == scale


REFUSED = {
    "peft_type": ("LOHA", "field 'peft_type' is 'LOHA', wanted 'LORA'"),
    "use_dora": (True, "field 'use_dora' is set: DoRA adapters are not supported"),
    "modules_to_save": (["lm_head"], "field 'modules_to_save' is set"),
    "bias": ("all", "field 'bias' is 'all', wanted 'none'"),
    "init_lora_weights": ("pissa_niter_4", "field 'init_lora_weights' is 'pissa_niter_4', which changes the base model"),
    "lora_bias": (True, "field 'lora_bias' is set"),
    "layer_replication": ([[0, 2]], "field 'layer_replication' is set"),
    "r": (0, "field 'r' is '0', wanted a whole number"),
    "lora_alpha": (True, "field 'lora_alpha' is 'True', wanted a number"),
    "use_rslora": ("yes", "field 'use_rslora' is 'yes', wanted true or false"),
    "rank_pattern": ({"fc1": 2.5}, "rank_pattern: field 'fc1' is '2.5'"),
    "alpha_pattern": ({"(a|a)*(a|a)*x": 2}, "field 'alpha_pattern' has the key"),
    "target_modules": (None, "field 'target_modules' is 'None', wanted a list"),
    "exclude_modules": (".*", "field 'exclude_modules' is '.*', wanted a list"),
    "layers_to_transform": ([-1], r"field 'layers_to_transform' is '\[-1\]'"),
    "layers_pattern": ("(x)*", r"field 'layers_pattern' is '\(x\)\*'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_named(name, tmp_path):
    value, message = REFUSED[name]
    model = make("opt")
    with pytest.raises(CheckpointError, match=message) as caught:
        model.load_peft_adapter(write_peft(tmp_path, {PLAIN["opt"][0]: factors((12, 8))}, **{name: value}))
    assert str(tmp_path / "adapter_config.json") in str(caught.value)
    assert not model.has_lora


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"target_modules": ["fc1"], "layers_to_transform": 0}, 1),
        ({"target_modules": ["fc1"], "layers_to_transform": [0], "layers_pattern": "layers"}, 1),
        ({"target_modules": ["fc1", "fc2"], "exclude_modules": ["fc2", "layers.1.fc1"]}, 1),
        ({"target_modules": r".*\.0\.fc1"}, 1),
        ({"target_modules": ["fc1"]}, r"decoder.layers.1.fc1.lora_A.weight' of shape \(2, 8\) is missing"),
        ({"target_modules": "all-linear"}, r"is missing; .* is missing; and 14 more"),
        ({"target_modules": ["fc2"], "layers_to_transform": [0]}, "layers.0.fc1' has an adapter, which adapter_config"),
        ({"r": 4}, r"lora_A.weight' has shape \(2, 8\), wanted \(4, 8\)"),
    ],
)  # fmt: skip
def test_the_config_and_the_tensors_must_agree(fields, layers, tmp_path):
    write_peft(tmp_path, {PLAIN["opt"][0]: factors((12, 8))}, **fields)
    model = make("opt")
    if isinstance(layers, int):
        model.load_peft_adapter(tmp_path)
        assert len(lora.adapters(model)) == layers
    else:
        with pytest.raises(CheckpointError, match=layers):
            model.load_peft_adapter(tmp_path)


def test_a_peft_adapter_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model = OPTBackbone(**SIZES, seed=0)
    model.enable_lora(2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_text("the base model's")

    def full(path, value):
        raise OSError(28, "No space left on device")

    write_json = lora_files.write_json
    monkeypatch.setattr(lora_files, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_peft_adapter(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["model.safetensors"]
    monkeypatch.setattr(lora_files, "write_json", write_json)
    model.save_peft_adapter(tmp_path / "mine")
    found = sorted(path.name for path in (tmp_path / "mine").iterdir())
    assert found == ["adapter_config.json", "adapter_model.safetensors", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_peft_tensors_that_do_not_fit(tmp_path):
    module, model = PLAIN["opt"][0], make("opt")
    a, b = factors((12, 8))
    for pair, message in (
        ((a[:, :7], b), r"lora_A.weight' has shape \(2, 7\), wanted \(2, 8\)"),
        ((a, b.T), r"lora_B.weight' has shape \(2, 12\), wanted \(12, 2\)"),
        ((a.astype(int), b), "lora_A.weight' has dtype int64"),
        ((a[0], b), r"lora_A.weight' has shape \(8,\), wanted \(2, 8\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            model.load_peft_adapter(write_peft(tmp_path, {module: pair}))
    both = {module: (a, b), "model.decoder.embed_tokens": (a, b)}
    with pytest.raises(CheckpointError, match=r"'base_model.model.model.decoder.embed_tokens.lora_A.weight' is surplus"):
        model.load_peft_adapter(write_peft(tmp_path, both))
    with pytest.raises(CheckpointError, match=r"does not fit this T5Backbone: .* is surplus"):
        make("t5").load_peft_adapter(write_peft(tmp_path, {module: (a, b)}))
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"wanted adapter_model.safetensors or adapter_model.bin"):
        model.load_peft_adapter(tmp_path)


def test_a_peft_adapter_in_a_torch_file(tmp_path):
    module, shape, layer = PLAIN["opt"]
    a, b = factors(shape)
    write_peft(tmp_path, {module: (a, b)})
    (tmp_path / "adapter_model.safetensors").unlink()
    names = [f"base_model.model.{module}.lora_{letter}.weight" for letter in "AB"]
    stored = list(zip(names, "01", (a, b), strict=True))
    opcodes = {name: tensor(v.shape, (v.shape[1], 1), numel=v.size, key=key) for name, key, v in stored}
    records = {f"data/{key}": values.tobytes() for _, key, values in stored}
    (tmp_path / "adapter_model.bin").write_bytes(archive({"data.pkl": state(**opcodes), **records}))
    model = make("opt")
    model.load_peft_adapter(tmp_path)
    assert np.array_equal(product(lora.adapters(model)[layer]), 4 * (b @ a).T)


def test_a_directory_with_an_adapter_alone_is_no_preset(tmp_path):
    write_peft(tmp_path, {PLAIN["opt"][0]: factors((12, 8))})
    with pytest.raises(CheckpointError, match=r"an adapter of 'someone/base', not a model: .* load_peft_adapter\('.*'\)"):
        Backbone.from_preset(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(CheckpointError, match="an adapter of another model, not a model"):
        Backbone.from_preset(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("names", [None, ["key", "query"], ["output", "input_projector", "mlp_output_dense", "fc1", "value"]])
def test_peft_files_again(family, names, tmp_path):
    """The same product; and from there KerasHub's form again, bit for bit."""
    model, other = with_random_adapters(family, names=names), make(family)
    model.save_peft_adapter(tmp_path / "adapter", "someone/base")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    other.load_peft_adapter(tmp_path / "adapter")
    found, wanted = lora.adapters(other), lora.adapters(model)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(product(found[path]), product(wanted[path])) for path in wanted)
    other.save_lora_weights(tmp_path / "x.lora.h5")
    last = make(family)
    last.load_lora_weights(tmp_path / "x.lora.h5")
    again = lora.adapters(last)
    same_adapters({path: adapter for path, adapter in again.items() if path in wanted}, wanted)
    assert not any(adapter.b.any() for path, adapter in again.items() if path not in wanted)


def test_blooms_shared_factor_stays_shared(tmp_path):
    model = make("bloom")
    model.load_peft_adapter(write_peft(tmp_path / "theirs", {FUSED: factors((24, 8))}))
    model.save_peft_adapter(tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[name], ours[name]) for name in theirs)


def test_ranks_and_scales_of_several_kinds(tmp_path):
    model = make("bloom", "float64")
    rng = np.random.default_rng(0)

    def adapter(groups, rank, scale):
        return Adapter(rng.standard_normal((8, groups, rank)), rng.standard_normal((rank, 8 // groups)), scale)

    wanted = {
        "layers.0.self_attention.query": adapter(1, 2, 0.5),
        "layers.0.self_attention.value": adapter(2, 3, 4.0),
        "layers.1.self_attention.key": adapter(1, 1, 16 / 3),
        "layers.1.self_attention.output": adapter(1, 5, 0.0),
    }
    model.params = lora.attached(model.params, wanted, "float64")
    model.save_peft_adapter(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 8  # of layer 0: 2 + 2 * 3
    assert set(config["rank_pattern"].values()) == {1, 5}
    other = make("bloom", "float64")
    other.load_peft_adapter(tmp_path)
    found = lora.adapters(other)
    assert found.keys() == wanted.keys()
    for path, adapter in wanted.items():
        assert np.array_equal(product(found[path]), product(adapter)), path


def test_whole_alphas_stay_whole():
    scale = float(np.float32(16 / 3))
    document = peft.document("opt", {"a.q_proj": 3}, {"a.q_proj": scale}, ["a.q_proj"], None)
    assert (document["lora_alpha"], document["target_modules"]) == (16, ["q_proj"])
    assert peft.document("opt", {"a.q_proj": 3}, {"a.q_proj": 0.1}, ["a.q_proj", "b.q_proj"], None)["target_modules"] == [
        "a.q_proj"
    ]
