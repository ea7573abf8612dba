"""Presets: every golden directory loads, every built-in preset has its true size, and bad input is refused with one
clear error."""

import json
import math
import shutil
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from refmodels import loading, presets
from refmodels.backbone import Backbone
from refmodels.bloom import BloomBackbone
from refmodels.causal_lm import CausalLM
from refmodels.files import CheckpointError
from refmodels.loading import load_backbone, preset_directory
from refmodels.opt import OPTBackbone, OPTCausalLM
from refmodels.parameters import flatten
from refmodels.presets import locate, preset_info, preset_names
from refmodels.t5 import T5Backbone, T5Seq2SeqLM
from refmodels.task import Task
from refmodels.tokenizers import OPTTokenizer, T5Tokenizer

h5py = pytest.importorskip("h5py")
package = pytest.importorskip("safetensors.numpy")

GOLDENS = Path(__file__).parent / "data" / "goldens"
TOKENIZERS = GOLDENS.parent / "tokenizers"
QUANTISED = ("_int8", "_int4")  # these are for test_quantize.py
DIRECTORIES = sorted(path.parent for path in GOLDENS.glob("*/*/config.json") if not path.parent.name.endswith(QUANTISED))
KERAS = [path for path in DIRECTORIES if path.parent.name.startswith("keras_hub")]
HUGGING_FACE = [path for path in DIRECTORIES if path.parent.name == "hf"]
REMOTE = sorted(path.stem for path in presets.data_directory().glob("*.json"))
CLASSES = {"t5": T5Backbone, "opt": OPTBackbone, "bloom": BloomBackbone}


def label(path):
    return f"{path.parent.name}/{path.name}"


def family(path):
    return path.name.split("_")[0]


def datasets(path):
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


@pytest.fixture
def copy(tmp_path):
    """`copy("hf/opt")` gives a directory with the files of that golden, to damage."""

    def make(name):
        target = tmp_path / "preset"
        shutil.copytree(GOLDENS / name, target)
        return target

    return make


def edit(path, **changes):
    """Change fields of a JSON file; in a KerasHub config.json, of its inner config. `...` removes a field."""
    whole = json.loads(path.read_text())
    fields = whole["config"] if "registered_name" in whole else whole
    for name, value in changes.items():
        fields.pop(name, None)
        if value is not ...:
            fields[name] = value
    path.write_text(json.dumps(whole))


def refused(directory, *words, error=ValueError, cls=Backbone, **kwargs):
    """Loading is refused with one message that has all of these words."""
    with pytest.raises(error) as caught:
        load_backbone(cls, directory, **kwargs)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    return message


# -- what loads ------------------------------------------------------------------------------------------------------


def test_there_are_goldens():
    assert (len(KERAS), len(HUGGING_FACE)) == (24, 8)


@pytest.mark.parametrize("directory", DIRECTORIES, ids=label)
def test_golden_loads(directory):
    backbone = load_backbone(Backbone, directory)
    assert type(backbone) is CLASSES[family(directory)]
    assert type(load_backbone(CLASSES[family(directory)], str(directory), load_weights=False)) is type(backbone)
    leaves = dict(flatten(backbone.params))
    assert {name: values.shape for name, values in leaves.items()} == {
        parameter.path: parameter.shape for parameter in backbone.parameters()
    }
    size = sum(values.size for values in leaves.values())
    assert size == backbone.count_params()
    golden = json.loads((directory / "golden.json").read_text())
    assert golden.get("count_params", size) == size
    for values in leaves.values():
        assert values.dtype == backbone.variable_dtype
        assert values.flags.c_contiguous
        assert values.flags.writeable
        assert values.flags.owndata
        assert np.isfinite(values.astype(np.float32)).all()


@pytest.mark.parametrize("directory", KERAS, ids=label)
def test_keras_values_are_those_of_the_file(directory):
    backbone = load_backbone(Backbone, directory)
    stored = {}
    for path in directory.glob("model*.weights.h5"):
        stored |= datasets(path)
    if family(directory) == "opt":  # BLOOM's underscores are there in files of any age
        stored = {name.replace("_layer/_", "_layer/"): values for name, values in stored.items()}
    leaves = dict(flatten(backbone.params))
    used = set()
    for parameter in backbone.parameters():
        values = stored[parameter.keras]
        used.add(parameter.keras)
        if values.dtype == "V2":
            values = values.view(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(
            leaves[parameter.path].astype(np.float32), values.reshape(parameter.shape).astype(np.float32)
        )
    assert used == stored.keys()


@pytest.mark.parametrize("directory", HUGGING_FACE, ids=label)
def test_hugging_face_values_all_land_once(directory):
    """The multiset of values is that of the files, without the two rows that OPT's positions leave out."""
    stored = {}
    for path in directory.glob("model*.safetensors"):
        stored |= package.load_file(path)
    if directory.name == "opt_bin":
        with zipfile.ZipFile(directory / "pytorch_model.bin") as archive:
            records = [name for name in archive.namelist() if "/data/" in name]
            stored = {name: np.frombuffer(archive.read(name), np.float32) for name in records}
        positions = stored.pop("pytorch_model/data/1").reshape(-1, 32)  # the second tensor
        stored["model.decoder.embed_positions.weight"] = positions
    if family(directory) == "opt":
        stored["model.decoder.embed_positions.weight"] = stored["model.decoder.embed_positions.weight"][2:]
    wanted = np.sort(np.concatenate([values.ravel() for values in stored.values()]))
    leaves = [values.ravel() for _, values in flatten(load_backbone(Backbone, directory).params)]
    np.testing.assert_array_equal(np.sort(np.concatenate(leaves)), wanted)


def test_hugging_face_bloom_query_key_value():
    stored = package.load_file(GOLDENS / "hf/bloom_6_heads/model.safetensors")
    fused = stored["transformer.h.2.self_attention.query_key_value.weight"].reshape(6, 3, 8, 48)
    attention = load_backbone(Backbone, GOLDENS / "hf/bloom_6_heads").params["layers"][2]["self_attention"]
    for part, name in enumerate(("query", "key", "value")):
        for head in range(6):
            np.testing.assert_array_equal(attention[name]["kernel"][:, head * 8 : head * 8 + 8], fused[head, part].T)


def test_old_spellings_of_groups_load(copy):
    directory = copy("keras_hub_0.17/opt")
    with h5py.File(directory / "model.weights.h5", "a") as file:
        for suffix in ("", "_1", "_2"):
            attention = file[f"layers/transformer_decoder{suffix}/_self_attention_layer"]
            for name in ("query", "key", "value", "output"):
                attention.move(f"{name}_dense", f"_{name}_dense")
        file.move("layers", "_layer_checkpoint_dependencies")
    same_values(directory, "keras_hub_0.17/opt")


def same_values(directory, golden):
    wanted = dict(flatten(load_backbone(Backbone, GOLDENS / golden).params))
    found = dict(flatten(load_backbone(Backbone, directory).params))
    assert found.keys() == wanted.keys()
    for name, values in found.items():
        np.testing.assert_array_equal(values, wanted[name])


@pytest.mark.parametrize("prefix", ["decoder.", ""])
def test_opt_with_other_prefixes_and_aliases(copy, prefix):
    path = copy("hf/opt") / "model.safetensors"
    stored = {name.replace("model.decoder.", prefix): values for name, values in package.load_file(path).items()}
    stored[f"{prefix}version"] = np.ones(1, np.float32)
    stored["lm_head.weight"] = stored[f"{prefix}embed_tokens.weight"].copy()
    package.save_file(stored, path)
    same_values(path.parent, "hf/opt")
    del stored[f"{prefix}embed_tokens.weight"]
    package.save_file(stored, path)
    same_values(path.parent, "hf/opt")


def test_bloom_bare_with_mask_buffers(copy):
    path = copy("hf/bloom") / "model.safetensors"
    stored = {name.removeprefix("transformer."): values for name, values in package.load_file(path).items()}
    stored["h.0.self_attention.masked_bias"] = np.array(-1e4, np.float32)
    stored["lm_head.weight"] = stored["word_embeddings.weight"].copy()
    package.save_file(stored, path)
    same_values(path.parent, "hf/bloom")
    stored["lm_head.weight"][3, 4] += 1
    package.save_file(stored, path)
    refused(path.parent, "model.safetensors", "'lm_head.weight' differs from 'word_embeddings.weight'", "'tie_word_embeddings'")


def test_t5_with_aliases_and_the_unused_table(copy):
    path = copy("hf/t5_relu_tied") / "model.safetensors"
    stored = package.load_file(path)
    stored["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.ones((32, 4), np.float32)
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        stored[name] = stored["shared.weight"].copy()
    package.save_file(stored, path)
    same_values(path.parent, "hf/t5_relu_tied")
    del stored["shared.weight"]
    package.save_file(stored, path)
    same_values(path.parent, "hf/t5_relu_tied")


def test_bfloat16_safetensors(copy):
    path = copy("hf/opt") / "model.safetensors"
    stored = {name: values.astype(ml_dtypes.bfloat16) for name, values in package.load_file(path).items()}
    package.save_file(stored, path)
    table = load_backbone(Backbone, path.parent).params["token_embedding"]["embeddings"]
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table, stored["model.decoder.embed_tokens.weight"].astype(np.float32))


# -- dtype and overrides ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("directory", "given", "policy", "stored"),
    [
        ("keras_hub_0.17/bloom_f16", {}, "float32", "float32"),  # a float16 file, no dtype in its config
        ("keras_hub_0.32/bloom_f16", {}, "float16", "float16"),  # a DTypePolicy in its config
        ("keras_hub_0.17/opt_bf16", {}, "float32", "float32"),
        ("keras_hub_0.32/opt_bf16", {}, "bfloat16", "bfloat16"),
        ("keras_hub_0.32/opt_bf16", {"dtype": None}, "bfloat16", "bfloat16"),
        ("keras_hub_0.32/opt_bf16", {"dtype": "float64"}, "float64", "float64"),
        ("keras_hub_0.32/opt_bf16", {"dtype": "mixed_bfloat16"}, "mixed_bfloat16", "float32"),
        ("hf/t5_relu_tied", {}, "float32", "float32"),
        ("hf/t5_relu_tied", {"dtype": "float16"}, "float16", "float16"),
    ],
)
def test_dtype_given_else_saved_else_float32(directory, given, policy, stored):
    backbone = load_backbone(Backbone, GOLDENS / directory, **given)
    assert backbone.config.dtype == policy
    assert {values.dtype.name for _, values in flatten(backbone.params)} == {stored}


def test_saved_dtype_as_a_plain_string(copy):
    directory = copy("keras_hub_0.17/opt")
    edit(directory / "config.json", dtype="bfloat16")
    assert load_backbone(Backbone, directory).config.dtype == "bfloat16"


@pytest.mark.filterwarnings("error")
def test_values_beyond_float16_become_infinities_quietly(copy):
    directory = copy("keras_hub_0.17/opt")
    name = "layers/layer_normalization/vars/0"
    with h5py.File(directory / "model.weights.h5", "a") as file:
        file[name][0] = 1e6
    assert math.isinf(load_backbone(Backbone, directory, dtype="float16").params["layer_norm"]["gamma"][0])


def test_arguments_override_the_config():
    backbone = load_backbone(Backbone, GOLDENS / "keras_hub_0.32/opt", dropout=0.5, name="mine", trainable=False)
    assert (backbone.config.dropout, backbone.name, backbone.trainable) == (0.5, "mine", False)
    larger = load_backbone(OPTBackbone, "opt_125m_en", load_weights=False, num_layers=2)
    assert (larger.num_layers, larger.hidden_dim) == (2, 768)
    with pytest.raises(TypeError, match="foo"):
        load_backbone(Backbone, GOLDENS / "keras_hub_0.32/opt", foo=1)
    refused(GOLDENS / "keras_hub_0.32/opt", "(97, 32), wanted (98, 32)", vocabulary_size=98)
    refused(GOLDENS / "keras_hub_0.32/opt", "dropout", "-1", dropout=-1)


def test_extra_keys_and_build_config_are_ignored(copy):
    directory = copy("keras_hub_0.17/opt")
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "build_config": {"input_shape": [1]}, "assets": []}))
    assert load_backbone(Backbone, directory).count_params() == 27728


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        ("gelu", "gelu"),
        ("silu", "silu"),
        (None, "linear"),
        ({"class_name": "function", "config": "keras_nlp>gelu_approximate"}, "gelu_approximate"),
        ({"class_name": "function", "config": "keras_hub>gelu_approximate"}, "gelu_approximate"),
    ],
)
def test_activation_forms(copy, activation, name):
    directory = copy("keras_hub_0.17/t5_relu_tied")
    edit(directory / "config.json", activation=activation)
    assert load_backbone(Backbone, directory, load_weights=False).config.activation == name


def test_without_weights_no_weight_file_is_touched(copy):
    for name, weights in (
        ("keras_hub_0.17/t5_relu_tied", "model.weights.h5"),
        ("hf/t5_relu_tied", "model.safetensors"),
    ):
        directory = copy(name)
        (directory / weights).write_bytes(b"garbage")
        refused(directory, weights)
        assert load_backbone(Backbone, directory, load_weights=False).count_params() == 59200
        (directory / weights).unlink()
        assert load_backbone(Backbone, directory, load_weights=False).count_params() == 59200
        shutil.rmtree(directory)


# -- built-in presets ------------------------------------------------------------------------------------------------


def test_there_are_23_remote_presets():
    assert len(REMOTE) == 23
    assert set(REMOTE) <= set(preset_names())


@pytest.mark.parametrize("name", REMOTE)
def test_remote_preset(name):
    info = preset_info(name)
    assert list(info) == [
        "name",
        "class",
        "config",
        "parameter_count",
        "description",
        "kaggle_handle",
        "huggingface_repo",
        "weights_dtype",
    ]
    backbone = load_backbone(Backbone, name, load_weights=False)
    assert info["name"] == name
    assert type(backbone).__name__ == info["class"]
    assert backbone.count_params() == info["parameter_count"]
    assert {**backbone.get_config(), **info["config"]} == backbone.get_config()
    located = locate(name)
    assert located.handle == info["kaggle_handle"]
    assert located.handle.startswith(f"kaggle://keras/{backbone.family}/keras/{name}/")
    assert locate(located.handle).handle == located.handle


def test_counts_that_the_documentation_gets_wrong():
    wanted = {
        "t5_small_multi": 60_506_624,
        "t5_1.1_small": 76_961_152,
        "t5_1.1_large": 783_150_080,
        "opt_2.7b_en": 2_651_591_680,
        "opt_6.7b_en": 6_658_465_792,
        "bloom_560m_multi": 559_214_592,
    }
    assert {name: preset_info(name)["parameter_count"] for name in wanted} == wanted


def test_class_presets():
    shipped = set(preset_names()) - set(REMOTE)
    for cls, number in ((T5Backbone, 11), (OPTBackbone, 4), (BloomBackbone, 8)):
        found = presets.class_presets(cls)
        assert len(found.keys() - shipped) == number
        assert {entry["metadata"]["path"] for entry in found.values()} == {cls.family}
    everything = presets.class_presets(Backbone)
    assert sorted(everything) == preset_names()
    entry = everything["opt_125m_en"]
    assert entry["kaggle_handle"] == "kaggle://keras/opt/keras/opt_125m_en/3"
    assert entry["metadata"]["params"] == 125_237_760
    assert entry["metadata"]["description"].startswith("12 decoder layers")


def test_shipped_directories(copy, monkeypatch):
    directory = copy("keras_hub_0.32/opt")
    (directory.parent / "train.py").write_text("")
    (directory.parent / "empty").mkdir()
    monkeypatch.setattr(presets, "data_directory", lambda: directory.parent)
    assert preset_names() == ["preset"]
    info = preset_info("preset")
    assert (info["class"], info["config"]["hidden_dim"], info["kaggle_handle"]) == ("OPTBackbone", 32, None)
    assert info["parameter_count"] == 27728
    assert presets.class_presets(OPTBackbone)["preset"]["metadata"]["params"] == 27728
    assert presets.class_presets(T5Backbone) == {}
    assert preset_directory("preset") == directory
    assert load_backbone(Backbone, "preset").count_params() == 27728


def test_shipped_presets_load():
    for name in set(preset_names()) - set(REMOTE):
        assert load_backbone(Backbone, name).count_params() == preset_info(name)["parameter_count"]


def test_data_directory_of_an_installed_package(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "__file__", str(tmp_path / "refmodels" / "presets.py"))
    assert presets.data_directory() == tmp_path / "presets"
    (tmp_path / "refmodels" / "presets").mkdir(parents=True)
    assert presets.data_directory() == tmp_path / "refmodels" / "presets"


# -- handles ---------------------------------------------------------------------------------------------------------


def test_kinds_of_handle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "opt_125m_en").mkdir()
    assert locate(tmp_path).directory == tmp_path
    assert locate(str(tmp_path)).directory == tmp_path
    assert locate("opt_125m_en").handle == "kaggle://keras/opt/keras/opt_125m_en/3"  # the name wins
    assert locate("./opt_125m_en").directory == Path("opt_125m_en")
    for handle in ("kaggle://keras/opt/keras/opt_125m_en", "kaggle://a/b/keras/c/12", "hf://facebook/opt-125m"):
        assert locate(handle).handle == handle


@pytest.mark.parametrize(
    "handle",
    [
        "kaggle://keras/opt/keras",
        "kaggle://keras/opt/keras/x/1/2",
        "kaggle://keras/opt/keras/x/latest",
        "kaggle://keras/opt/pytorch/x",
        "kaggle://keras/../keras/x",
        "kaggle://",
        "hf://",
        "hf://a/b/c",
        "hf://../b",
    ],
)
def test_a_malformed_handle_is_refused(handle):
    with pytest.raises(ValueError, match=f"is not of the form {handle.partition(':')[0]}://org/") as caught:
        locate(handle)
    assert handle in str(caught.value)


@pytest.mark.parametrize(
    ("name", "near"),
    [("opt_125m", "opt_125m_en"), ("bloom_560m_mutli", "bloom_560m_multi"), ("t5_1.1_smal", "t5_1.1_small")],
)
def test_an_unknown_name_gets_near_names(name, near):
    for function in (locate, preset_info):
        with pytest.raises(ValueError, match=f"unknown preset '{name}'; near names: .*{near}") as caught:
            function(name)
        assert "kaggle://" in str(caught.value)
        assert "hf://" in str(caught.value)
        assert "local directory" in str(caught.value)


def test_what_is_no_preset_at_all(tmp_path):
    with pytest.raises(ValueError, match="unknown preset 'zzzzzz'; a preset is"):
        locate("zzzzzz")
    for name in ("a\0b", "", "a" * 10_000, "\ud800"):
        with pytest.raises(ValueError, match="unknown preset"):
            locate(name)
    for value in (3, None, b"opt_125m_en", ["opt_125m_en"]):
        with pytest.raises(ValueError, match=rf"of type {type(value).__name__}, wanted "):
            locate(value)
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        locate(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("preset", "client"),
    [
        ("opt_125m_en", "kagglehub"),
        ("kaggle://keras/opt/keras/x", "kagglehub"),
        ("hf://facebook/opt-125m", "huggingface_hub"),
    ],
)
def test_without_a_client_the_error_says_what_to_install(monkeypatch, preset, client):
    monkeypatch.setitem(sys.modules, client, None)
    with pytest.raises(ImportError, match=f"pip install {client}; a local directory") as caught:
        load_backbone(Backbone, preset)
    assert preset in str(caught.value)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["keras_hub_0.17/t5_relu_tied", "hf/t5_relu_tied"])
def test_class_mismatch_names_both_classes(name):
    message = refused(GOLDENS / name, "config.json", "T5Backbone", "OPTBackbone", cls=OPTBackbone)
    assert "call T5Backbone.from_preset" in message
    refused("t5_small_multi", "t5_small_multi", "T5Backbone", "BloomBackbone", cls=BloomBackbone, load_weights=False)


def test_a_derived_class_loads_as_itself():
    class Mine(OPTBackbone):
        pass

    assert type(load_backbone(Mine, GOLDENS / "hf/opt")) is Mine


KERAS_CONFIGS = [
    ({"hidden_dim": ...}, ["field 'hidden_dim' is missing", "wanted a whole number"]),
    ({"num_heads": None}, ["field 'num_heads' is missing or null"]),
    ({"num_layers": 10**9}, ["field 'num_layers' is '1000000000'", "10 thousand"]),
    ({"vocabulary_size": 10**12}, ["field 'vocabulary_size' is '1000000000000'", "10 million"]),
    ({"intermediate_dim": -48}, ["field 'intermediate_dim' is '-48'"]),
    ({"hidden_dim": "32"}, ["field 'hidden_dim' is '32'"]),
    ({"hidden_dim": True}, ["field 'hidden_dim' is 'True'"]),
    ({"dropout": 1.5}, ["field 'dropout' is '1.5'", "0 to below 1"]),
    ({"max_sequence_length": None}, ["field 'max_sequence_length' is missing or null"]),
    ({"layer_norm_epsilon": 1e-5}, ["field 'layer_norm_epsilon' is unknown", "max_sequence_length"]),
    ({"dtype": "float8"}, ["dtype", "float8", "bfloat16"]),
    ({"dtype": {"class_name": "DTypePolicyMap", "config": {"policy_map": {}}}}, ["policy_map is missing or empty"]),
]


@pytest.mark.parametrize(("changes", "words"), KERAS_CONFIGS, ids=[str(changes) for changes, _ in KERAS_CONFIGS])
@pytest.mark.parametrize("load_weights", [True, False])
def test_keras_config_that_is_wrong(copy, changes, words, load_weights):
    directory = copy("keras_hub_0.17/opt")
    edit(directory / "config.json", **changes)
    refused(directory, str(directory / "config.json"), *words, load_weights=load_weights)


def test_t5_config_that_is_wrong(copy):
    path = copy("keras_hub_0.17/t5_relu_tied") / "config.json"
    for changes, words in (
        ({"activation": "mish"}, ["activation", "mish", "relu"]),
        ({"activation": ["relu"]}, ["field 'activation' is", "relu"]),
        ({"activation": {"config": ["relu"]}}, ["activation"]),
        ({"activation": "relu", "tie_embedding_weights": 1}, ["field 'tie_embedding_weights' is '1'", "true or false"]),
    ):
        edit(path, **changes)
        refused(path.parent, str(path), *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", ["not valid JSON"]),
        (b"", ["not valid JSON"]),
        (b"[" * 100_000, ["not valid JSON"]),
        (b"[]", ["wanted a JSON object, found list"]),
        (b"{}", ["'registered_name'", "'model_type'", "missing"]),
        (b'{"registered_name": "keras_hub>GPT2Backbone"}', ["'keras_hub>GPT2Backbone'", "keras_hub>OPTBackbone"]),
        (b'{"registered_name": "evil>OPTBackbone"}', ["'evil>OPTBackbone'", "keras_hub>OPTBackbone"]),
        (b'{"registered_name": 3}', ["field 'registered_name' is '3'"]),
        (b'{"registered_name": "keras_hub>OPTBackbone"}', ["field 'config'", "NoneType"]),
        (b'{"model_type": "gpt2"}', ["field 'model_type' is 'gpt2'", "bloom"]),
        (b'{"model_type": ["opt"]}', ["field 'model_type'", "bloom"]),
        (b'{"model_type": "opt"}', ["field 'hidden_size' is missing"]),
    ],
)
def test_config_file_that_is_wrong(copy, content, words):
    directory = copy("keras_hub_0.17/opt")
    (directory / "config.json").write_bytes(content)
    refused(directory, str(directory / "config.json"), *words)


def test_the_error_of_an_argument_does_not_blame_the_file(copy):
    directory = copy("hf/opt")
    for arguments in ({"seed": -1}, {"dtype": "int3"}, {"num_heads": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))) as caught:
            load_backbone(Backbone, directory, **arguments)
        assert not isinstance(caught.value, CheckpointError)
        assert "config.json" not in str(caught.value)


def test_missing_files(copy):
    directory = copy("keras_hub_0.17/opt")
    (directory / "model.weights.h5").unlink()
    refused(directory, str(directory), "no weight file, wanted model.weights.h5", error=FileNotFoundError)
    (directory / "config.json").unlink()
    refused(directory, "config.json: no such file", error=FileNotFoundError)


def test_an_adapter_is_no_model(copy):
    directory = copy("hf/opt")
    (directory / "config.json").rename(directory / "adapter_config.json")
    refused(directory, "adapter_config.json", "an adapter of", "not a model", "load_peft_adapter")


def test_safetensors_are_preferred_to_torch_files_and_one_file_to_shards(copy):
    for golden, preferred, others in (
        ("hf/opt", "model.safetensors", ["model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]),
        ("hf/opt_bin", "pytorch_model.bin", ["pytorch_model.bin.index.json"]),
        ("keras_hub_0.32/opt", "model.weights.h5", ["model.weights.json"]),
    ):
        directory = copy(golden)
        for other in others:
            (directory / other).write_text("neither read nor valid")
        load_backbone(Backbone, directory)
        (directory / preferred).unlink()
        refused(directory, others[0])
        shutil.rmtree(directory)


def test_damaged_weight_files(copy):
    for golden, name in (("keras_hub_0.17/opt", "model.weights.h5"), ("hf/opt", "model.safetensors")):
        directory = copy(golden)
        content = (directory / name).read_bytes()
        for damaged in (b"", content[:100], content[: len(content) // 2], content[:-1]):
            (directory / name).write_bytes(damaged)
            refused(directory, str(directory / name), "truncated")
        shutil.rmtree(directory)


def rewrite_keras(directory, change):
    with h5py.File(directory / "model.weights.h5", "a") as file:
        change(file, "layers/transformer_decoder_1/_feedforward_layer_norm/vars/0")


def replace(values):
    def change(file, name):
        del file[name]
        if values is not None:
            file[name] = values

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replace(None), ["of shape (32,) is missing"]),
        (replace(np.ones(33, np.float32)), ["has shape (33,), wanted (32,)"]),
        (replace(np.ones((32, 1), np.float32)), ["has shape (32, 1), wanted (32,)"]),
        (replace(np.ones(32, np.int8)), ["has dtype int8, wanted one of float16"]),
        (replace(np.zeros(32, "V2")), ["has dtype |V2, wanted one of float16"]),
    ],
)
def test_keras_tensors_that_are_wrong(copy, change, words):
    directory = copy("keras_hub_0.17/opt")
    rewrite_keras(directory, change)
    message = refused(directory, str(directory / "model.weights.h5"), "OPTBackbone", *words)
    assert "'layers/transformer_decoder_1/_feedforward_layer_norm/vars/0'" in message
    assert ";" not in message  # this tensor only


def test_keras_surplus_lora_and_links(copy):
    directory = copy("keras_hub_0.17/opt")
    path = directory / "model.weights.h5"
    whole = path.read_bytes()

    with h5py.File(path, "a") as file:
        file["layers/extra/vars/0"] = np.ones(3)
    refused(directory, str(path), "tensor 'layers/extra/vars/0' is surplus")

    path.write_bytes(whole)
    rewrite_keras(directory, replace(h5py.ExternalLink("/etc/passwd", "/x")))
    refused(directory, str(path), "_feedforward_layer_norm/vars/0' is a ExternalLink")

    with h5py.File(path, "w") as file:
        file["lora/10/vars/lora_kernel_a"] = np.ones((4, 2))
    refused(directory, str(path), "it holds adapters (lora/), not a model's weights", "load_lora_weights")


def test_many_problems_make_one_short_message(copy):
    directory = copy("keras_hub_0.17/opt")
    with h5py.File(directory / "model.weights.h5", "w") as file:
        file["something/else"] = np.ones(3)
    message = refused(directory, "is missing", "more")
    assert len(message) < 1500


def test_hugging_face_tensors_that_are_wrong(copy):
    path = copy("hf/bloom") / "model.safetensors"
    stored = package.load_file(path)
    name = "transformer.h.1.self_attention.query_key_value.weight"

    def with_tensor(values):
        changed = {**stored, name: values}
        package.save_file({key: value for key, value in changed.items() if value is not None}, path)

    with_tensor(stored[name][:-1])
    refused(path.parent, str(path), f"'{name}' has shape (95, 32), wanted (96, 32)")
    with_tensor(None)
    refused(path.parent, str(path), f"'{name}' of shape (96, 32) is missing")
    with_tensor(stored[name].astype(np.int8))
    refused(path.parent, str(path), f"'{name}' has dtype int8")
    package.save_file({**stored, "transformer.h.3.ln.weight": np.ones(3)}, path)
    refused(path.parent, str(path), "'transformer.h.3.ln.weight' is surplus")


def test_links_out_of_the_directory(copy, tmp_path):
    for golden, name in (("keras_hub_0.17/opt", "model.weights.h5"), ("hf/opt", "model.safetensors")):
        for file in (name, "config.json"):
            directory = copy(golden)
            (directory / file).rename(tmp_path / "outside")
            (directory / file).symlink_to(tmp_path / "outside")
            refused(directory, str(directory / file), "a link that leads out of the directory")
            shutil.rmtree(directory)


def test_missing_shard(copy):
    directory = copy("hf/bloom_sharded")
    (directory / "model-00004-of-00010.safetensors").unlink()
    refused(directory, "model-00004-of-00010.safetensors: no such file", error=FileNotFoundError)


def test_task_is_a_backbone_and_a_tokenizer(copy, monkeypatch):
    directory = copy("keras_hub_0.17/opt")
    task = loading.load_task(CausalLM, directory, dropout=0.0)
    assert (type(task), type(task.backbone), task.tokenizer) == (OPTCausalLM, OPTBackbone, None)
    same = dict(flatten(load_backbone(OPTBackbone, directory).params))
    assert all((values == same[name]).all() for name, values in flatten(task.backbone.params))
    assert task.backbone.config.dropout == 0.0
    shutil.rmtree(directory)
    shutil.copy(TOKENIZERS / "opt" / "tokenizer.json", copy("hf/opt"))
    assert type(loading.load_task(OPTCausalLM, directory).tokenizer) is OPTTokenizer
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    task = loading.load_task(Task, "t5_small_multi", load_weights=False)
    assert (type(task), task.tokenizer) == (T5Seq2SeqLM, None)
    with pytest.raises(ValueError, match=r"t5_small_multi holds a T5Backbone, .* call T5Seq2SeqLM\.from_preset"):
        loading.load_task(CausalLM, "t5_small_multi")


def test_tokenizer_of_a_preset(copy):
    directory = copy("hf/opt")
    shutil.copy(TOKENIZERS / "opt" / "tokenizer.json", directory)
    assert type(loading.load_preset_tokenizer(directory)) is OPTTokenizer
    with pytest.raises(ValueError, match=r"holds OPTTokenizer, not T5Tokenizer: call OPTTokenizer\.from_preset"):
        loading.load_preset_tokenizer(directory, T5Tokenizer)
