"""The table of formats in `spec/formats.md`: every cell is a test here, and the page is what this module renders.

A cell is (format, direction, dtype). To read is tested on files that independent code writes (h5py, the safetensors package, a
torch archive byte by byte), to write by reading ours with h5py and the safetensors package. Every tensor must be equal, bit for
bit, for all three families. Whether the real packages read them is another matter: tests/peers.

`python tests/test_formats.py > spec/formats.md` renders the page.
"""

import copy
import json
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from test_torch_bin import archive, legacy, state, tensor

from refmodels import Backbone, BloomBackbone, OPTBackbone, T5Backbone
from refmodels.parameters import flatten

PAGE = Path(__file__).parent.parent / "spec" / "formats.md"
DTYPES = ("float32", "float16", "bfloat16")
SIZES = {"vocabulary_size": 11, "num_layers": 2, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 32}
FAMILIES = {
    "t5": (T5Backbone, SIZES | {"key_value_dim": 3}),
    "t5 untied": (T5Backbone, SIZES | {"tie_embedding_weights": False, "activation": "gelu_approximate"}),
    "opt": (OPTBackbone, SIZES | {"max_sequence_length": 6}),
    "bloom": (BloomBackbone, SIZES),
}
STORAGE = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}
GIB = 2**30


def make(family, dtype):
    cls, arguments = FAMILIES[family]
    return cls(**arguments, dtype=dtype, seed=5)


def leaves(backbone):
    return dict(flatten(backbone.params))


def same(found, wanted):
    """Equal names, types, shapes and bits."""
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape), name
        assert found[name].tobytes() == values.tobytes(), name


def halves(tensors):
    names = list(tensors)
    middle = len(names) // 2
    return [{name: tensors[name] for name in part} for part in (names[:middle], names[middle:])]


# -- files by independent code -------------------------------------------------------------------------------------------


def keras_tensors(backbone):
    values = leaves(backbone)
    return {p.keras: values[p.path].reshape(p.keras_shape) for p in backbone.parameters()}


def write_h5(path, tensors):
    with h5py.File(path, "w") as file:
        for name, values in tensors.items():
            if values.dtype == ml_dtypes.bfloat16:
                file.create_dataset(name, data=values.view("V2")).attrs["dtype"] = "bfloat16"
            else:
                file[name] = values


def read_h5(path):
    tensors = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            values = item[()]
            bfloat16 = item.attrs.get("dtype") == "bfloat16"
            tensors[name] = values.view(ml_dtypes.bfloat16) if bfloat16 else values

    with h5py.File(path) as file:
        file.visititems(visit)
    return tensors


def keras_config(directory, backbone, package="keras_hub", dtype=True):
    name = type(backbone).__name__
    config = backbone.get_config()
    policy = config.pop("dtype")
    if not isinstance(policy, str):  # a quantised model's map of policies, as Keras writes it
        config["dtype"] = policy
    elif dtype:
        inner = {"name": policy}
        config["dtype"] = {"module": "keras", "class_name": "DTypePolicy", "config": inner, "registered_name": None}
    if config.get("activation") == "gelu_approximate":
        function = f"{package}>gelu_approximate"
        config["activation"] = {"module": "builtins", "class_name": "function", "config": function}
    envelope = {"module": f"{package}.src", "class_name": name, "config": config, "registered_name": f"{package}>{name}"}
    (directory / "config.json").write_text(json.dumps(envelope))


def huggingface_tensors(backbone):
    """In Hugging Face's names and layouts, from the definitions in the specification."""
    values, tensors, fused = leaves(backbone), {}, {}
    prefix = {"t5": "", "opt": "model.decoder.", "bloom": "transformer."}[backbone.family]
    for p in backbone.parameters():
        value, name = values[p.path], p.huggingface[0] if p.huggingface[0] == "lm_head.weight" else prefix + p.huggingface[0]
        if p.layout == "transposed":
            value = value.T
        elif p.layout == "offset_rows":
            value = np.concatenate([np.zeros_like(value[:2]), value])
        elif p.layout in ("query", "key", "value"):
            fused.setdefault(name, {})[p.layout] = value.T.reshape(backbone.num_heads, -1, *value.T.shape[1:])
            continue
        tensors[name] = np.ascontiguousarray(value)
    for name, parts in fused.items():
        stacked = np.stack([parts["query"], parts["key"], parts["value"]], 1)
        tensors[name] = np.ascontiguousarray(stacked.reshape(-1, *stacked.shape[3:]))
    return tensors


def huggingface_config(directory, backbone):
    n, layers, heads = backbone.hidden_dim, backbone.num_layers, backbone.num_heads
    if backbone.family == "t5":
        tied = backbone.tie_embedding_weights
        config = {"d_model": n, "d_ff": backbone.intermediate_dim, "num_layers": layers, "num_heads": heads}
        config |= {"d_kv": backbone.key_value_dim or n // heads, "tie_word_embeddings": tied, "dropout_rate": 0.1}
        config["feed_forward_proj"] = "gated-relu" if backbone.activation == "relu" else "gated-gelu"
    elif backbone.family == "opt":
        config = {"hidden_size": n, "num_hidden_layers": layers, "num_attention_heads": heads, "dropout": 0.1}
        config |= {"ffn_dim": backbone.intermediate_dim, "max_position_embeddings": backbone.max_sequence_length}
    else:
        config = {"hidden_size": n, "n_layer": layers, "n_head": heads}
    config |= {"model_type": backbone.family, "vocab_size": backbone.vocabulary_size}
    (directory / "config.json").write_text(json.dumps(config))


def torch_state(tensors, **more):
    opcodes = {}
    for number, (name, values) in enumerate(tensors.items()):
        strides = [stride // values.itemsize for stride in values.strides]
        kind = STORAGE[values.dtype.name]
        opcodes[name] = tensor(values.shape, strides, numel=values.size, key=str(number), kind=kind, **more)
    return state(**opcodes)


def torch_archive(tensors):
    entries = {f"data/{number}": values.tobytes() for number, values in enumerate(tensors.values())}
    return archive({"data.pkl": torch_state(tensors), "byteorder": b"little"} | entries)


def torch_legacy(tensors):
    """Storages in the order of their keys as text, as torch has it."""
    storages = {str(number): values for number, values in enumerate(tensors.values())}
    return legacy(torch_state(tensors, part=b"N"), dict(sorted(storages.items())))


def index(directory, name, shards):
    places = {tensor: file for file, tensors in shards.items() for tensor in tensors}
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": places}))


# -- cells -----------------------------------------------------------------------------------------------------------------

CELLS = {}


def cell(name, direction, dtypes=DTYPES):
    def decorate(test):
        CELLS.update({(name, direction, dtype): test for dtype in dtypes})
        return test

    return decorate


def read_back(directory, backbone, dtype):
    """The type must come from the directory where its config says it, else from the argument."""
    same(leaves(Backbone.from_preset(directory, dtype=dtype)), leaves(backbone))


@cell("KerasHub, one file", "read")
def read_keras(directory, backbone, dtype):
    keras_config(directory, backbone)
    write_h5(directory / "model.weights.h5", keras_tensors(backbone))
    read_back(directory, backbone, None)


@cell("KerasHub, shards", "read")
def read_keras_shards(directory, backbone, dtype):
    """A group with two datasets is split between the shards."""
    keras_config(directory, backbone)
    shards = {f"model_0000{i}.weights.h5": part for i, part in enumerate(halves(keras_tensors(backbone)))}
    places = {}
    for file, part in shards.items():
        write_h5(directory / file, part)
        for name in part:
            files = places.setdefault(f"/{name.rpartition('/')[0]}", [])
            files += [] if file in files else [file]
    (directory / "model.weights.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    read_back(directory, backbone, None)


@cell("keras_nlp era", "read")
def read_keras_nlp(directory, backbone, dtype):
    """No dtype in the config, names of the old package, attention groups with an underscore in front."""
    keras_config(directory, backbone, package="keras_nlp", dtype=False)
    tensors = {
        name.replace("_self_attention_layer/", "_self_attention_layer/_").replace("/__", "/_"): values
        for name, values in keras_tensors(backbone).items()
    }
    write_h5(directory / "model.weights.h5", tensors)
    read_back(directory, backbone, dtype)


@cell("Hugging Face safetensors, one file", "read")
def read_safetensors(directory, backbone, dtype):
    huggingface_config(directory, backbone)
    safetensors.numpy.save_file(huggingface_tensors(backbone), directory / "model.safetensors")
    read_back(directory, backbone, dtype)


@cell("Hugging Face safetensors, shards", "read")
def read_safetensors_shards(directory, backbone, dtype):
    huggingface_config(directory, backbone)
    shards = {f"model-{i}.safetensors": part for i, part in enumerate(halves(huggingface_tensors(backbone)))}
    for file, part in shards.items():
        safetensors.numpy.save_file(part, directory / file)
    index(directory, "model.safetensors.index.json", shards)
    read_back(directory, backbone, dtype)


@cell("Hugging Face pytorch_model.bin, one file", "read")
def read_bin(directory, backbone, dtype):
    huggingface_config(directory, backbone)
    (directory / "pytorch_model.bin").write_bytes(torch_archive(huggingface_tensors(backbone)))
    read_back(directory, backbone, dtype)


@cell("Hugging Face pytorch_model.bin, shards", "read")
def read_bin_shards(directory, backbone, dtype):
    huggingface_config(directory, backbone)
    shards = {f"pytorch_model-{i}.bin": part for i, part in enumerate(halves(huggingface_tensors(backbone)))}
    for file, part in shards.items():
        (directory / file).write_bytes(torch_archive(part))
    index(directory, "pytorch_model.bin.index.json", shards)
    read_back(directory, backbone, dtype)


@cell("Hugging Face pytorch_model.bin, torch < 1.6", "read")
def read_bin_legacy(directory, backbone, dtype):
    huggingface_config(directory, backbone)
    (directory / "pytorch_model.bin").write_bytes(torch_legacy(huggingface_tensors(backbone)))
    read_back(directory, backbone, dtype)


@cell("KerasHub, one file", "write")
def write_keras(directory, backbone, dtype):
    backbone.save_to_preset(directory)
    same(read_h5(directory / "model.weights.h5"), keras_tensors(backbone))


@cell("KerasHub, shards", "write")
def write_keras_shards(directory, backbone, dtype):
    backbone.save_to_preset(directory, max_shard_size=2000 / GIB)
    listed = json.loads((directory / "model.weights.json").read_text())["weight_map"]
    files = {file for value in listed.values() for file in ([value] if isinstance(value, str) else value)}
    assert len(files) > 1
    found = {}
    for file in sorted(files):
        part = read_h5(directory / file)
        assert not part.keys() & found.keys()
        found |= part
    same(found, keras_tensors(backbone))


@cell("Hugging Face safetensors, one file", "write")
def write_safetensors(directory, backbone, dtype):
    backbone.save_to_hf(directory)
    same(safetensors.numpy.load_file(directory / "model.safetensors"), huggingface_tensors(backbone))


@cell("Hugging Face safetensors, shards", "write")
def write_safetensors_shards(directory, backbone, dtype):
    backbone.save_to_hf(directory, max_shard_size=2000 / GIB)
    listed = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(listed.values())) > 1
    found = {}
    for file in sorted(set(listed.values())):
        found |= safetensors.numpy.load_file(directory / file)
    assert found.keys() == listed.keys()
    same(found, huggingface_tensors(backbone))


# -- quantised weights and adapters ----------------------------------------------------------------------------------------


def quantised_cells(mode):
    name = f"KerasHub, {mode}"

    @cell(name, "read")
    def read_quantised(directory, backbone, dtype):
        backbone.quantize(mode, block_size=4 if mode == "int4" else None)
        keras_config(directory, backbone)
        write_h5(directory / "model.weights.h5", keras_tensors(backbone))
        read_back(directory, backbone, None)

    @cell(name, "write")
    def write_quantised(directory, backbone, dtype):
        backbone.quantize(mode, block_size=4 if mode == "int4" else None)
        backbone.save_to_preset(directory)
        found = read_h5(directory / "model.weights.h5")
        same(found, keras_tensors(backbone))
        assert {values.dtype.name for values in found.values()} == {"int8", "float32", dtype}


quantised_cells("int8")
quantised_cells("int4")


def with_adapter(backbone):
    """An adapter of rank 2 with values in both matrices; gives its leaves."""
    backbone.enable_lora(2)
    generator = np.random.default_rng(3)
    adapter = {path: values for path, values in leaves(backbone).items() if "lora_kernel" in path}
    for values in adapter.values():
        values[...] = generator.standard_normal(values.shape)
    return adapter


def without_adapter(backbone):
    return type(backbone)(**{**backbone.get_config(), "name": None}, seed=5)


def keras_adapter(backbone, adapter):
    """The names of KerasHub's file, from the indices that were observed there: (first, of each layer) of value and of query."""
    found = {"lora/vars/rank": np.array(2)}
    first, each = {"opt": ({"value": 10, "query": 12}, 10), "bloom": ({"value": 8, "query": 10}, 10)}[backbone.family]
    for path, values in adapter.items():
        _, layer, _, part, leaf = path.split(".")
        groups = (backbone.hidden_dim, backbone.num_heads, 2) if leaf.endswith("a") else (2, -1)
        found[f"lora/{first[part] + each * int(layer)}/vars/{leaf}"] = values.reshape(groups)
    return found


@cell("KerasHub .lora.h5", "read", ["float32"])
def read_lora_h5(directory, backbone, dtype):
    """T5 has no indices of KerasHub's: ours are tested in test_lora."""
    bare, adapter = without_adapter(backbone), with_adapter(backbone)
    if backbone.family == "t5":
        backbone.save_lora_weights(directory / "x.lora.h5")
    else:
        write_h5(directory / "x.lora.h5", keras_adapter(backbone, adapter))
    bare.load_lora_weights(directory / "x.lora.h5")
    same(leaves(bare), leaves(backbone))


@cell("KerasHub .lora.h5", "write", ["float32"])
def write_lora_h5(directory, backbone, dtype):
    adapter = with_adapter(backbone)
    backbone.save_lora_weights(directory / "x.lora.h5")
    found = read_h5(directory / "x.lora.h5")
    if backbone.family == "t5":
        assert sorted(v.tobytes() for n, v in found.items() if n != "lora/vars/rank") == sorted(
            v.tobytes() for v in adapter.values()
        )
        return
    wanted = keras_adapter(backbone, adapter)
    assert found.pop("lora/vars/rank") == wanted.pop("lora/vars/rank")
    same(found, wanted)


@cell("adapter .safetensors, by name", "read", ["float32"])
def read_lora_safetensors(directory, backbone, dtype):
    bare = without_adapter(backbone)
    with_adapter(backbone)
    backbone.save_lora_weights(directory / "x.safetensors")
    bare.load_lora_weights(directory / "x.safetensors")
    same(leaves(bare), leaves(backbone))


@cell("adapter .safetensors, by name", "write", ["float32"])
def write_lora_safetensors(directory, backbone, dtype):
    adapter = with_adapter(backbone)
    backbone.save_lora_weights(directory / "x.safetensors")
    found = safetensors.numpy.load_file(directory / "x.safetensors")
    same({name: values for name, values in found.items() if name in adapter}, adapter)


def peft_adapter(directory, backbone):
    """An adapter of rank 2 on one output product for each layer, written by hand; gives {our path: (A, B)}."""
    generator, tensors, wanted = np.random.default_rng(4), {}, {}
    start = "base_model.model." + {"t5": "", "opt": "model.decoder.", "bloom": "transformer."}[backbone.family]
    target = {"t5": "o", "opt": "out_proj", "bloom": "dense"}[backbone.family]
    for p in backbone.parameters():
        if p.path.endswith("attention.output.kernel"):
            a, b = (generator.standard_normal(shape).astype("f4") for shape in ((2, p.shape[0]), (p.shape[1], 2)))
            name = start + p.huggingface[0].removesuffix(".weight")
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            wanted[p.path.removesuffix(".kernel")] = a, b
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": [target], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return tensors, wanted


def check_peft(directory, backbone, wanted):
    backbone.load_peft_adapter(directory)
    found = leaves(backbone)
    for path, (a, b) in wanted.items():
        assert np.array_equal(found[f"{path}.lora_kernel_a"][:, 0], a.T)
        assert np.array_equal(found[f"{path}.lora_kernel_b"], b.T)
        assert found[f"{path}.lora_scale"] == 1.5
    assert sum(name.endswith("lora_scale") for name in found) == len(wanted) > 1


@cell("PEFT adapter, safetensors", "read", ["float32"])
def read_peft(directory, backbone, dtype):
    tensors, wanted = peft_adapter(directory, backbone)
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")
    check_peft(directory, backbone, wanted)


@cell("PEFT adapter, .bin", "read", ["float32"])
def read_peft_bin(directory, backbone, dtype):
    tensors, wanted = peft_adapter(directory, backbone)
    (directory / "adapter_model.bin").write_bytes(torch_archive(tensors))
    check_peft(directory, backbone, wanted)


@cell("PEFT adapter, safetensors", "write", ["float32"])
def write_peft(directory, backbone, dtype):
    tensors, _ = peft_adapter(directory, backbone)
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")
    backbone.load_peft_adapter(directory)
    (directory / "ours").mkdir()
    backbone.save_peft_adapter(directory / "ours")
    same(safetensors.numpy.load_file(directory / "ours" / "adapter_model.safetensors"), tensors)


# -- the tests and the page ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", CELLS, ids=" ".join)
def test_cell(place, family, tmp_path):
    CELLS[place](tmp_path, make(family, place[2]), place[2])


def test_a_wrong_bit_is_found():
    backbone = make("opt", "float32")
    wanted = leaves(backbone)
    found = copy.deepcopy(wanted)
    found["layer_norm.beta"].view(np.uint32)[3] ^= 1
    with pytest.raises(AssertionError, match=r"layer_norm\.beta"):
        same(found, wanted)


def render():
    names = dict.fromkeys(name for name, _, _ in CELLS)
    lines = [
        "# Formats",
        "",
        "What is read and written, for T5, OPT and BLOOM, without a difference in a single bit. Each \u2713 is a test in",
        "`tests/test_formats.py`, which renders this page. An empty place is a form that its owner does not have, or, for",
        "`.bin` files, one that nobody should still write. The files are described in [files.md](files.md), integers in",
        "[quantization.md](quantization.md), adapters in [lora.md](lora.md).",
        "",
        "| format | " + " | ".join(f"{direction} {dtype}" for direction in ("read", "write") for dtype in DTYPES) + " |",
        "|---|" + "---|" * 2 * len(DTYPES),
    ]
    for name in names:
        marks = ["\u2713" if (name, d, t) in CELLS else "" for d in ("read", "write") for t in DTYPES]
        lines.append(f"| {name} | {' | '.join(marks)} |")
    return "\n".join(lines) + "\n"


def test_page_is_what_the_cells_give():
    assert PAGE.read_text() == render(), "run: python tests/test_formats.py > spec/formats.md"


if __name__ == "__main__":
    print(render(), end="")
