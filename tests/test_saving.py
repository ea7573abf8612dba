"""What is saved is what was there, in the form that each side writes itself."""

import errno
import json
import logging
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from refmodels import Backbone, BloomBackbone, OPTBackbone, T5Backbone, T5Seq2SeqLM
from refmodels.files import CheckpointError
from refmodels.ops.precision import numpy_dtype
from refmodels.parameters import flatten
from refmodels.staging import locked, staged
from refmodels.task import Task
from refmodels.weights import huggingface

GOLDENS = Path(__file__).parent / "data" / "goldens"
TOKENIZERS = Path(__file__).parent / "data" / "tokenizers"
SHIPPED = ["t5_tiny_numbers", "opt_tiny_stdlib", "bloom_tiny_stdlib"]
SIZES = {"vocabulary_size": 13, "num_layers": 2, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 32}


def leaves(model):
    return dict(flatten(model.params))


def assert_same(model, other):
    """Every parameter, bit for bit, of the same type."""
    found, wanted = leaves(other), leaves(model)
    assert found.keys() == wanted.keys()
    for path, values in wanted.items():
        assert found[path].dtype == values.dtype, path
        assert found[path].shape == values.shape, path
        assert found[path].tobytes() == values.tobytes(), path


def arguments(model):
    """Constructor arguments that a checkpoint of Hugging Face's keeps, T5's head size resolved."""
    config = {key: value for key, value in model.get_config().items() if key not in {"name", "trainable", "dtype"}}
    return config | ({"key_value_dim": model.config.head_dim} if "key_value_dim" in config else {})


# -- round trips ----------------------------------------------------------------------------------------------------------

DTYPES = ["float32", "float16", "bfloat16"]


@st.composite
def models(draw):
    """A tiny model of any variant, in any type, with every kind of value among its parameters."""
    heads, head_dim, layers = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    hidden, flag = heads * head_dim, st.booleans()
    common = {"vocabulary_size": draw(st.integers(1, 9)), "num_layers": layers, "num_heads": heads, "hidden_dim": hidden}
    common |= {"intermediate_dim": draw(st.integers(1, 9)), "dropout": draw(st.sampled_from([0.0, 0.25]))}
    common |= {"dtype": draw(st.sampled_from(DTYPES)), "seed": draw(st.integers(0, 9))}
    kind = draw(st.sampled_from([T5Backbone, OPTBackbone, BloomBackbone]))
    if kind is T5Backbone:
        common |= {"use_gated_activation": draw(flag), "tie_embedding_weights": draw(flag)}
        common |= {"activation": draw(st.sampled_from(["relu", "gelu", "gelu_approximate", "silu", "linear"]))}
        common |= {
            "key_value_dim": draw(st.sampled_from([None, 3])),
            "scale_logits": draw(st.sampled_from([None, False, True])),
        }
    elif kind is OPTBackbone:
        common |= {"max_sequence_length": draw(st.integers(1, 5)), "do_layer_norm_before": draw(flag)}
        common |= {"word_embed_proj_dim": draw(st.sampled_from([None, hidden + 1])), "remove_final_layer_norm": draw(flag)}
        common |= {"tie_embedding_weights": draw(flag)}
    else:
        common |= {"intermediate_dim": 4 * hidden, "layer_norm_epsilon": 0.5, "tie_embedding_weights": draw(flag)}
    model = kind(**common)
    special = np.array([0.0, -0.0, np.finfo(np.float16).smallest_subnormal, 65504.0, -1.5])
    for number, values in enumerate(leaves(model).values()):
        values.reshape(-1)[: min(len(special), values.size)] = np.roll(special, number)[: values.size]
    return model


@given(model=models(), shard=st.sampled_from([1e-7, 1.0]))
@settings(max_examples=60)
def test_every_variant_comes_back_from_either_form(tmp_path_factory, model, shard):
    directory = tmp_path_factory.mktemp("round")
    model.save_to_preset(directory / "keras", max_shard_size=shard)
    keras = Backbone.from_preset(directory / "keras")
    assert_same(model, keras)
    assert keras.get_config() == model.get_config()
    keras.save_to_hf(directory / "hf", max_shard_size=shard)
    hugging_face = Backbone.from_preset(directory / "hf", dtype=model.config.dtype)
    assert_same(model, hugging_face)
    assert arguments(hugging_face) == arguments(model)
    hugging_face.save_to_preset(directory / "again")
    assert_same(model, Backbone.from_preset(directory / "again"))


@pytest.mark.parametrize("name", sorted(f"{path.parent.name}/{path.name}" for path in GOLDENS.glob("*/*")))
@pytest.mark.parametrize("shard", [1e-5, 1])
def test_goldens_come_back(tmp_path, name, shard):
    model = Backbone.from_preset(GOLDENS / name)
    model.save_to_preset(tmp_path / "keras", max_shard_size=shard)
    again = Backbone.from_preset(tmp_path / "keras")
    assert_same(model, again)
    assert again.get_config() == model.get_config()
    reason = (
        r"always has 4 \* hidden_dim" if model.family == "bloom" and model.intermediate_dim != 4 * model.hidden_dim else None
    )
    if model.quantization is not None:
        reason = "is quantised, which these files cannot hold"
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            model.save_to_hf(tmp_path / "hf")
        return
    model.save_to_hf(tmp_path / "hf", max_shard_size=shard)
    assert_same(model, Backbone.from_preset(tmp_path / "hf", dtype=model.config.dtype))


@pytest.mark.parametrize("policy", ["float64", "mixed_float16", "mixed_bfloat16"])
def test_other_policies_are_kept(tmp_path, policy):
    model = OPTBackbone(**SIZES, dtype=policy, seed=0)
    model.save_to_preset(tmp_path / "keras")
    again = Backbone.from_preset(tmp_path / "keras")
    assert_same(model, again)
    assert again.config.dtype == policy
    with h5py.File(tmp_path / "keras" / "model.weights.h5") as file:  # mixed policies store float32
        assert file["layers/layer_normalization/vars/0"].dtype == ("float64" if policy == "float64" else "float32")
    model.save_to_hf(tmp_path / "hf")
    assert_same(model, Backbone.from_preset(tmp_path / "hf", dtype=policy))


# -- the form of the files ------------------------------------------------------------------------------------------------


def datasets(path):
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
        return {
            name: (item.dtype, item.shape, item.chunks, item[()].tobytes(), dict(item.attrs)) for name, item in found.items()
        }


@pytest.mark.parametrize("name", ["opt", "opt_bf16", "bloom", "bloom_f16", "t5_flan_like", "t5_gelu_erf", "t5_relu_tied"])
def test_the_same_datasets_as_keras_hub(tmp_path, name):
    """Names, types, shapes, values, the mark of bfloat16: as in the file that KerasHub 0.17 wrote."""
    golden = GOLDENS / "keras_hub_0.17" / name
    policy = {"opt_bf16": "bfloat16", "bloom_f16": "float16"}.get(name)
    Backbone.from_preset(golden, dtype=policy).save_to_preset(tmp_path)
    assert datasets(tmp_path / "model.weights.h5") == datasets(golden / "model.weights.h5")
    assert (tmp_path / "model.weights.h5").read_bytes()[8] == 0  # the superblock's version


@pytest.mark.parametrize("name", ["opt_bf16", "bloom", "t5_flan_like", "t5_gelu_erf", "t5_relu_tied"])
def test_the_same_config_as_keras_hub(tmp_path, name):
    golden = GOLDENS / "keras_hub_0.32" / name
    Backbone.from_preset(golden).save_to_preset(tmp_path)
    found, wanted = (json.loads((place / "config.json").read_text()) for place in (tmp_path, golden))
    policy = wanted["config"].pop("dtype")
    if policy["config"]["name"] != "float32":
        assert found["config"].pop("dtype") == policy
    assert found == wanted
    assert list(found["config"]) == list(wanted["config"])
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    assert metadata.keys() == json.loads((golden / "metadata.json").read_text()).keys()
    assert metadata["parameter_count"] == Backbone.from_preset(golden).count_params()


@pytest.mark.parametrize("name", ["opt", "bloom", "bloom_6_heads", "t5_gated_gelu_untied", "t5_relu_tied"])
def test_the_same_tensors_and_fields_as_transformers(tmp_path, name):
    golden = GOLDENS / "hf" / name
    model = Backbone.from_preset(golden)
    model.save_to_hf(tmp_path)
    found, wanted = (load_file(place / "model.safetensors") for place in (tmp_path, golden))
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        rows = slice(2 if key.endswith("embed_positions.weight") else 0, None)  # which no position uses
        assert found[key].dtype == values.dtype
        assert found[key].shape == values.shape
        assert np.array_equal(found[key][rows], values[rows]), key
        assert not found[key][: rows.start].any()
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    config, peer = (json.loads((place / "config.json").read_text()) for place in (tmp_path, golden))
    same = peer.keys() - {"transformers_version", "classifier_dropout", "is_decoder", "tie_word_embeddings", "pad_token_id"}
    assert {key: config[key] for key in same} == {key: peer[key] for key in same}


def test_the_tensors_of_a_safetensors_file_begin_at_multiples_of_eight(tmp_path):
    OPTBackbone(**SIZES | {"vocabulary_size": 3}, dtype="float16", seed=0).save_to_hf(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    assert json.loads(content[8 : 8 + length])["__metadata__"] == {"format": "pt"}


def test_shards_are_no_larger_than_asked(tmp_path):
    model = OPTBackbone(**SIZES, seed=0)
    limit = 1000
    model.save_to_preset(tmp_path / "keras", max_shard_size=limit / 2**30)
    index = json.loads((tmp_path / "keras" / "model.weights.json").read_text())
    assert index["metadata"]["total_size"] == 4 * model.count_params()
    assert any(isinstance(files, list) for files in index["weight_map"].values())  # a group in two shards
    shards = sorted((tmp_path / "keras").glob("model_*.weights.h5"))
    assert len(shards) > 5
    assert shards[0].name == "model_00000.weights.h5"
    assert not (tmp_path / "keras" / "model.weights.h5").exists()
    for shard in shards:
        sizes = [len(values) for *_, values, _ in datasets(shard).values()]
        assert sum(sizes) <= limit or len(sizes) == 1
    model.save_to_hf(tmp_path / "hf", max_shard_size=limit / 2**30)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    for shard in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "hf" / shard)
        assert sum(values.nbytes for values in tensors.values()) <= limit or len(tensors) == 1
        assert {index["weight_map"][name] for name in tensors} == {shard}


@pytest.mark.parametrize("save", ["save_to_preset", "save_to_hf"])
def test_saving_needs_the_memory_of_one_tensor(tmp_path, save):
    sizes = {"vocabulary_size": 64, "num_layers": 12, "num_heads": 4, "hidden_dim": 256, "intermediate_dim": 1024}
    model = BloomBackbone(**sizes, seed=0)
    values = leaves(model)
    largest, total = max(array.nbytes for array in values.values()), sum(array.nbytes for array in values.values())
    tracemalloc.start()
    getattr(model, save)(tmp_path / "saved")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * largest < total / 8  # BLOOM's query, key and value are joined


def test_a_type_for_hugging_face(tmp_path):
    model = OPTBackbone(**SIZES, seed=0)
    model.save_to_hf(tmp_path, dtype="bfloat16")
    half = Backbone.from_preset(tmp_path, dtype="bfloat16")
    for path, values in leaves(model).items():
        assert np.array_equal(leaves(half)[path], values.astype(numpy_dtype("bfloat16")))
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_overflow_is_told(tmp_path, caplog):
    model = OPTBackbone(**SIZES, seed=0)
    model.params["layer_norm"]["gamma"][0] = 1e5
    with caplog.at_level(logging.WARNING, "refmodels"):
        model.save_to_hf(tmp_path, dtype="float16")
    assert [record.getMessage() for record in caplog.records] == [
        "tensor model.decoder.final_layer_norm.weight has values that are not finite as float16"
    ]


def test_a_model_that_keras_hub_has_no_class_for(tmp_path, caplog):
    model = OPTBackbone(**SIZES, word_embed_proj_dim=4, do_layer_norm_before=False, seed=0)
    with caplog.at_level(logging.WARNING, "refmodels"):
        model.save_to_preset(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["registered_name"] == "refmodels>OPTBackbone"
    assert "KerasHub's OPTBackbone cannot hold this model" in caplog.text
    again = Backbone.from_preset(tmp_path)
    assert_same(model, again)
    assert again.get_config() == model.get_config()


# -- configurations of Transformers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "gated", "proj"),
    [
        ("relu", False, "relu"),
        ("relu", True, "gated-relu"),
        ("gelu", False, "gelu"),
        ("gelu", True, "gated-gelu_python"),
        ("gelu_approximate", False, "gelu_new"),
        ("gelu_approximate", True, "gated-gelu"),
        ("silu", True, "gated-silu"),
        ("linear", False, "linear"),
    ],
)
def test_t5_feed_forward(activation, gated, proj):
    given = T5Backbone(**SIZES, activation=activation, use_gated_activation=gated).get_config()
    config = huggingface.configuration("t5", given, "float32", huggingface.TOKEN_IDS["t5"])
    assert config["feed_forward_proj"] == proj
    read = huggingface.arguments(config, "config.json")
    assert (read["activation"], read["use_gated_activation"]) == (activation, gated)


def test_an_argument_that_transformers_lacks_is_refused():
    given = OPTBackbone(**SIZES).get_config() | {"rotary": True}
    with pytest.raises(ValueError, match="rotary=True: OPTForCausalLM has no such argument, so it cannot hold this model"):
        huggingface.configuration("opt", given, "float32", {})


def test_special_tokens_are_the_tokenizer_s(tmp_path):
    task = T5Seq2SeqLM.from_preset("t5_tiny_numbers")
    task.save_to_hf(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    for name, value in (("pad_token_id", task.tokenizer.pad_token_id), ("eos_token_id", task.tokenizer.end_token_id)):
        assert config[name] == generation[name] == value
    assert generation["decoder_start_token_id"] == task.tokenizer.pad_token_id


# -- tokenizers -----------------------------------------------------------------------------------------------------------

TEXTS = ["spell: 4207", "def f(x):\n    return don't,  12345\t", " é漢字🙂 <pad></s><extra_id_0> x", ""]


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("save", ["save_to_preset", "save_to_hf"])
def test_a_task_comes_back(tmp_path, name, save):
    task = Task.from_preset(name)
    getattr(task, save)(tmp_path / "saved")
    again = Task.from_preset(tmp_path / "saved")
    assert_same(task.backbone, again.backbone)
    assert again.tokenizer(TEXTS) == task.tokenizer(TEXTS)
    assert again.tokenizer.special_token_ids == task.tokenizer.special_token_ids
    assert again.generate("digits: seven", max_length=24) == task.generate("digits: seven", max_length=24)


@pytest.mark.parametrize("extra_ids", [0, 100])
@pytest.mark.parametrize("save", ["save_to_preset", "save_to_hf"])
def test_extra_ids_come_back(tmp_path, extra_ids, save):
    from refmodels.tokenizers import T5Tokenizer

    tokenizer = T5Tokenizer(TOKENIZERS / "t5" / "spiece.model", extra_ids=extra_ids)
    task = T5Seq2SeqLM(T5Backbone(**SIZES, seed=0), tokenizer=tokenizer)
    getattr(task, save)(tmp_path)
    again = Task.from_preset(tmp_path).tokenizer
    assert again.extra_ids == extra_ids
    assert again(TEXTS) == tokenizer(TEXTS)
    if save == "save_to_preset":
        assert "extra_ids" not in json.loads((tmp_path / "tokenizer.json").read_text())["config"]


def test_a_tokenizer_that_transformers_cannot_have(tmp_path):
    from refmodels.tokenizer_files import load_tokenizer, save_hugging_face

    tokenizer = load_tokenizer(TOKENIZERS / "bloom", "bloom", add_prefix_space=True)
    with pytest.raises(ValueError, match="add_prefix_space=True: Transformers would put"):
        save_hugging_face(tokenizer, tmp_path)


# -- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -1, float("nan"), float("inf"), "10", True, None])
@pytest.mark.parametrize("save", ["save_to_preset", "save_to_hf"])
def test_a_shard_size_that_is_none(tmp_path, save, size):
    with pytest.raises(ValueError, match="max_shard_size must be a positive number of GiB"):
        getattr(OPTBackbone(**SIZES, seed=0), save)(tmp_path / "saved", size)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["int8", "mixed_float16", "half"])
def test_a_type_that_is_none(tmp_path, dtype):
    with pytest.raises(ValueError, match="dtype must be one of float16, bfloat16, float32, float64"):
        OPTBackbone(**SIZES, seed=0).save_to_hf(tmp_path / "saved", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("save", ["save_to_preset", "save_to_hf"])
def test_parameters_that_do_not_fit(tmp_path, save):
    model = OPTBackbone(**SIZES, seed=0)
    model.params["layer_norm"]["gamma"] = np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"OPTBackbone params: layer_norm.gamma has shape \(3,\), wanted \(8,\)"):
        getattr(model, save)(tmp_path / "saved")
    del model.params["layer_norm"]["gamma"]
    with pytest.raises(ValueError, match=r"layer_norm.gamma is missing, wanted \(8,\)"):
        getattr(model, save)(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_seen_before(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(OSError, match=r"No space left on device: \d+ bytes are to be written, 10 are free"):
        OPTBackbone(**SIZES, seed=0).save_to_preset(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


# -- directories that appear when they are complete -----------------------------------------------------------------------


def test_a_new_directory_appears_at_the_end(tmp_path):
    target = tmp_path / "one" / "two"
    with staged(target) as place:
        assert place.parent == target.parent
        assert place.name.startswith(".two.partial-")
        (place / "file").write_text("new")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["two"]
    assert (target / "file").read_text() == "new"


def failing(target, error, **options):
    with staged(target, **options) as place:
        (place / "config.json").write_text("broken")
        raise error


def test_nothing_is_left_of_a_failure(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        failing(tmp_path / "one" / "two", KeyboardInterrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("mounted", [False, True])
def test_a_directory_that_is_there(tmp_path, replace, mounted, monkeypatch):
    target = tmp_path / "target"
    monkeypatch.setattr(Path, "is_mount", lambda path: mounted)
    for name in ("config.json", "model.safetensors", "README.md", "assets/old", "assets/tokenizer/file"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("old")
    with pytest.raises(RuntimeError):
        failing(target, RuntimeError, replace=replace)
    assert {path.read_text() for path in target.rglob("*") if path.is_file()} == {"old"}
    with staged(target, replace=replace, superseded=re.compile(r"model\..*")) as place:
        assert place.parent == (target if mounted else tmp_path)
        (place / "assets" / "tokenizer").mkdir(parents=True)
        for name in ("config.json", "model.weights.h5", "assets/tokenizer/file"):
            (place / name).write_text("new")
    found = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    new = dict.fromkeys(["config.json", "model.weights.h5", "assets/tokenizer/file"], "new")
    kept = {} if replace else {"README.md": "old", "assets/old": "old"}
    assert found.keys() - {"assets/old"} == (new | kept).keys() - {"assets/old"}
    assert {name: found[name] for name in new} == new
    assert ("assets/old" in found) == (not replace)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("empty", [False, True])
def test_the_directory_we_are_in_stays_the_same(tmp_path, replace, empty, monkeypatch):
    """Were another put in its place, the shell or the notebook would be in one that is gone."""
    target = tmp_path / "target"
    target.mkdir()
    if not empty:
        (target / "config.json").write_text("old")
    monkeypatch.chdir(target)
    with pytest.raises(RuntimeError):
        failing(Path(), RuntimeError, replace=replace)
    with staged(Path(), replace=replace) as place:
        (place / "config.json").write_text("new")
    assert Path.cwd().samefile(target)
    assert {path.name: path.read_text() for path in target.iterdir()} == {"config.json": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_an_error_that_names_no_file(tmp_path):
    with pytest.raises(OSError, match="No space left on device") as caught:
        failing(tmp_path / "target", OSError(errno.ENOSPC, "No space left on device"))
    assert caught.value.filename == str(tmp_path / "target")


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_replacement_that_fails_or_is_interrupted(tmp_path, monkeypatch, step, after, error):
    target, rename, steps = tmp_path / "target", Path.replace, []
    target.mkdir()
    (target / "config.json").write_text("old")

    def failing(path, other):
        steps.append(path)
        if len(steps) != step or after:
            rename(path, other)
        if len(steps) == step:
            raise error

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(error), staged(target, replace=True) as place:
        (place / "config.json").write_text("new")
    assert (target / "config.json").read_text() == ("new" if step == 2 and after else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is there and is no directory"), staged(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_what_a_killed_process_left_is_removed_and_what_a_running_one_has_is_not(tmp_path):
    dead, alive, other = (tmp_path / name for name in (".a[b].partial-1-f", ".a[b].partial-2-f", ".ab.partial-3-f"))
    for place in (dead, alive, other):
        place.mkdir()
        (place / "file").write_text("half")
    script = (
        "import sys, fcntl, os; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(alive)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        with staged(tmp_path / "a[b]"):
            pass
        assert sorted(path.name for path in tmp_path.iterdir()) == [alive.name, other.name, "a[b]"]
    finally:
        process.communicate(b"\n")
    with staged(tmp_path / "a[b]"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "a[b]"]


def test_a_replacement_that_was_killed_half_way_is_undone(tmp_path):
    old = tmp_path / ".a.partial-1-f-old"
    old.mkdir()
    (old / "file").write_text("old")
    with pytest.raises(RuntimeError):
        failing(tmp_path / "a", RuntimeError)
    assert (tmp_path / "a" / "file").read_text() == "old"


def test_two_locks_exclude_each_other(tmp_path):
    with locked(tmp_path), pytest.raises(BlockingIOError), locked(tmp_path):
        pass


def test_a_model_is_saved_where_it_was_loaded_from(tmp_path):
    model = OPTBackbone(**SIZES, seed=0)
    model.save_to_preset(tmp_path / "a", max_shard_size=1e-6)
    again = Backbone.from_preset(tmp_path / "a")
    again.save_to_preset(tmp_path / "a")
    assert not list((tmp_path / "a").glob("model_*"))  # the shards are gone with their index
    assert not (tmp_path / "a" / "model.weights.json").exists()
    assert_same(model, Backbone.from_preset(tmp_path / "a"))
    (tmp_path / "a" / "model.weights.h5").write_bytes(b"broken")
    with pytest.raises(CheckpointError):
        Backbone.from_preset(tmp_path / "a")
