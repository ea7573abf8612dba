"""Real files of every format, damaged in two thousand seeded ways.

Each case loads, or raises CheckpointError; it takes less than a second and little memory, and has no other effect. The cases of
a format run in a process of their own, so that a crash or an endless loop in a C library is a failure with a seed: `python
tests/test_fuzz.py safetensors 17 1` runs case 17 alone and shows its error.
"""

import contextlib
import copy
import faulthandler
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors.numpy
from test_torch_bin import archive, legacy, state, tensor

from refmodels import Backbone
from refmodels.files import CheckpointError
from refmodels.loading import load_backbone
from refmodels.opt import OPTBackbone
from refmodels.preprocessor_files import task_settings
from refmodels.preprocessors import OPTCausalLMPreprocessor
from refmodels.tokenizer_files import load_tokenizer
from refmodels.tokenizers import BloomTokenizer
from refmodels.weights import huggingface

resource = pytest.importorskip("resource")  # limits, which Windows lacks

CASES, SECONDS, HANGS = 200, 1.0, 30  # for each format; of its own time in a case; until a case counts as endless
MEMORY_FACTOR, MEMORY_BASE = 20, 4 * 2**20
ADDRESS_SPACE = 2**30  # more than this in one case, in whatever library, fails
PRESETS = Path(__file__).parent.parent / "presets"

SIZES = {
    "vocabulary_size": 5,
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 4,
    "intermediate_dim": 3,
    "max_sequence_length": 6,
}
KERAS_CONFIG = {"registered_name": "keras_hub>OPTBackbone", "config": SIZES | {"dropout": 0.1, "dtype": "float32"}}
HF_CONFIG = {"model_type": "opt", "vocab_size": 5, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
HF_CONFIG |= {"ffn_dim": 3, "max_position_embeddings": 6, "dropout": 0.1}


# -- sound files -----------------------------------------------------------------------------------------------------


def h5_file(tensors):
    with tempfile.TemporaryDirectory() as directory:
        with h5py.File(Path(directory) / "file", "w") as file:
            file.create_group("layers/input_layer/vars")
            for name, values in tensors.items():
                if values.dtype == np.float32:
                    file[name] = values
                else:  # as Keras writes bfloat16
                    file.create_dataset(name, data=values.view("V2")).attrs["dtype"] = "bfloat16"
        return (Path(directory) / "file").read_bytes()


def keras_tensors():
    generator = np.random.default_rng(0)
    values = {p.keras: generator.normal(size=p.keras_shape).astype("f4") for p in OPTBackbone(**SIZES).parameters()}
    return values | {"layers/layer_normalization/vars/0": np.ones(4, "<u2")}


def hf_tensors():
    parameters = OPTBackbone(**SIZES).parameters()
    return {f"model.decoder.{p.huggingface[0]}": np.ones(huggingface.stored_shape(p), "f4") for p in parameters}


def halves(tensors):
    names = list(tensors)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    return [{name: tensors[name] for name in part} for part in parts]


def index_of(shards, key=lambda name: name):
    places = {key(name): file for file, tensors in shards.items() for name in tensors}
    return json.dumps({"metadata": {}, "weight_map": places}).encode()


def bin_file(tensors):
    """Without checksums, so that damage reaches what is behind them."""
    entries, opcodes = {}, {}
    for number, (name, values) in enumerate(tensors.items()):
        entries[f"data/{number}"] = {"content": values.tobytes(), "crc": 0}
        strides = [stride // 4 for stride in values.strides]
        opcodes[name] = tensor(values.shape, strides, numel=values.size, key=str(number))
    return archive(
        {"data.pkl": {"content": state(**opcodes), "crc": 0}, "byteorder": {"content": b"little", "crc": 0}} | entries
    )


def legacy_file(tensors):
    opcodes = {
        name: tensor(values.shape, [stride // 4 for stride in values.strides], numel=values.size, key=str(number), part=b"N")
        for number, (name, values) in enumerate(tensors.items())
    }
    return legacy(state(**opcodes), {str(number): values for number, values in enumerate(tensors.values())})


def tokenizer_files(family, keras):
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *"abcde", "ab", "abc", "de"]
    vocabulary, merges = {token: i for i, token in enumerate(tokens)}, ["a b", "ab c", "d e"]
    if not keras:
        model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
        added = [{"id": 0, "content": "<s>"}, {"id": 1, "content": "<pad>"}]
        config = {"model_type": family, "vocab_size": 12}
        rule = {"Regex": BloomTokenizer.splitting_pattern}
        words = {"type": "Split", "pattern": rule, "behavior": "Isolated", "invert": False}
        into_bytes = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        steps = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, into_bytes]}}
        files = {"tokenizer.json": {"model": model, "added_tokens": added} | steps, "config.json": config}
        return {name: json.dumps(value).encode() for name, value in files.items()}
    config = {"sequence_length": None, "add_prefix_space": False, "unsplittable_tokens": ["<s>"], "dtype": "int32"}
    return {
        "tokenizer.json": json.dumps(
            {"class_name": {"opt": "OPTTokenizer", "bloom": "BloomTokenizer"}[family], "config": config}
        ),
        "assets/tokenizer/vocabulary.json": json.dumps(vocabulary),
        "assets/tokenizer/merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n",
    }


def sound_files():
    """Format -> (what loads a directory, its files, which of them are damaged)."""
    keras, config = json.dumps(KERAS_CONFIG).encode(), json.dumps(HF_CONFIG).encode()
    h5_shards = {f"model_0000{i}.weights.h5": part for i, part in enumerate(halves(keras_tensors()))}
    st_shards = {f"model-{i}.safetensors": part for i, part in enumerate(halves(hf_tensors()))}
    bin_shards = {f"pytorch_model-{i}.bin": part for i, part in enumerate(halves(hf_tensors()))}
    h5_index = index_of(h5_shards, lambda name: "/" + name.rpartition("/")[0])
    t5 = PRESETS / "t5_tiny_numbers"
    spm = {name: (t5 / name).read_bytes() for name in ("tokenizer.json", "assets/tokenizer/vocabulary.spm")}
    h5, st, pt = h5_file(keras_tensors()), safetensors.numpy.save(hf_tensors()), bin_file(hf_tensors())
    bpe = {name: text.encode() for name, text in tokenizer_files("opt", True).items()}
    formats = {
        "config": (backbone, {"config.json": keras, "model.weights.h5": h5}, ["config.json"]),
        "hf_config": (backbone, {"config.json": config, "model.safetensors": st}, ["config.json"]),
        "h5": (backbone, {"config.json": keras, "model.weights.h5": h5}, ["model.weights.h5"]),
        "h5_shards": (
            backbone,
            {"config.json": keras, "model.weights.json": h5_index} | {k: h5_file(v) for k, v in h5_shards.items()},
            ["model.weights.json", "model.weights.json", "model_00000.weights.h5"],
        ),
        "safetensors": (backbone, {"config.json": config, "model.safetensors": st}, ["model.safetensors"]),
        "safetensors_shards": (
            backbone,
            {"config.json": config, "model.safetensors.index.json": index_of(st_shards)}
            | {name: safetensors.numpy.save(part) for name, part in st_shards.items()},
            ["model.safetensors.index.json", "model.safetensors.index.json", "model-1.safetensors"],
        ),
        "torch": (backbone, {"config.json": config, "pytorch_model.bin": pt}, ["pytorch_model.bin"]),
        "torch_shards": (
            backbone,
            {"config.json": config, "pytorch_model.bin.index.json": index_of(bin_shards)}
            | {name: bin_file(part) for name, part in bin_shards.items()},
            ["pytorch_model.bin.index.json", "pytorch_model-1.bin"],
        ),
        "torch_legacy": (
            backbone,
            {"config.json": config, "pytorch_model.bin": legacy_file(hf_tensors())},
            ["pytorch_model.bin"],
        ),
        "bpe": (tokenizer, bpe, list(bpe)),
        "tokenizer_json": (tokenizer, tokenizer_files("bloom", False), ["tokenizer.json", "tokenizer.json", "config.json"]),
        "preprocessor": (preprocessor, preprocessor_files(), ["preprocessor.json"]),
        "task": (preprocessor, preprocessor_files() | task_file(), ["task.json"]),
        "spm": (tokenizer, spm, list(spm)[1:] * 3 + list(spm)[:1]),
        **adapter_formats(),
    }
    return formats


def preprocessor(root):
    return task_settings(root, "OPTCausalLM", OPTCausalLMPreprocessor)


def preprocessor_files():
    tokenizer = {"class_name": "OPTTokenizer", "config": {"sequence_length": None}}
    config = {"name": "mine", "trainable": True, "dtype": "float32", "tokenizer": tokenizer, "config_file": "preprocessor.json"}
    config |= {"sequence_length": 99, "add_start_token": True, "add_end_token": False}
    return {"preprocessor.json": json.dumps({"class_name": "OPTCausalLMPreprocessor", "config": config}).encode()}


def task_file():
    inner = json.loads(preprocessor_files()["preprocessor.json"])
    config = {"backbone": KERAS_CONFIG, "preprocessor": inner, "name": "opt_causal_lm"}
    return {"task.json": json.dumps({"class_name": "OPTCausalLM", "config": config}).encode()}


def adapter_formats():
    """Adapters as KerasHub, PEFT and we keep them."""
    model = OPTBackbone(**SIZES, seed=0)
    model.enable_lora(2)
    with tempfile.TemporaryDirectory() as place:
        model.save_lora_weights(f"{place}/x.lora.h5")
        model.save_lora_weights(f"{place}/x.safetensors")
        model.save_peft_adapter(place)
        found = {path.name: path.read_bytes() for path in Path(place).iterdir()}
    weights, config = "adapter_model.safetensors", "adapter_config.json"
    patterns = json.loads(found[config]) | {
        "alpha_pattern": {"q_proj": 3},
        "rank_pattern": {"k_proj": 7},
        "layers_to_transform": [0],
    }
    return {
        "lora_h5": (adapter, {"x.lora.h5": found["x.lora.h5"]}, ["x.lora.h5"]),
        "lora_safetensors": (adapter, {"x.safetensors": found["x.safetensors"]}, ["x.safetensors"]),
        "peft": (adapter, {config: json.dumps(patterns).encode(), weights: found[weights]}, [config, config, weights]),
    }


def adapter(directory):
    model = OPTBackbone(**SIZES, seed=0)
    names = [path for path in directory.iterdir() if path.name.startswith("x.")]
    if names:
        model.load_lora_weights(names[0])
    else:
        model.load_peft_adapter(directory)


def backbone(directory):
    load_backbone(Backbone, directory)


def tokenizer(directory):
    found = load_tokenizer(directory)
    found.sequence_length = None  # ten million is allowed, and takes that much memory once it is used
    with contextlib.suppress(ValueError):  # a sound vocabulary that has not all symbols of this text
        found.detokenize(found.tokenize("abc de<s> 17"))


# -- damage ----------------------------------------------------------------------------------------------------------

VALUES = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, -0.5, float("nan"), "", "..", "../config.json", "/etc/passwd"]
VALUES += ["a" * 5000, "\0", "\ud800", "float32", [], {}, [[]], {"": None}, [1] * 1000, [2**40, 2**40], ["config.json"] * 2]


def damage_json(content, rng):
    """One or two values replaced, removed, renamed or doubled; sometimes at a great depth."""
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 2))):
        node, parents = value, []
        while isinstance(node, dict | list) and node and (not parents or rng.random() < 0.7):
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            parents.append((node, key))
            node = node[key]
        if not parents:
            return json.dumps(rng.choice(VALUES)).encode()
        owner, key = parents[-1]
        how = rng.random()
        if how < 0.7:
            owner[key] = copy.deepcopy(rng.choice(VALUES))
        elif how < 0.8:
            del owner[key]
        elif isinstance(owner, dict):
            owner[str(rng.choice(VALUES))] = owner.pop(key) if how < 0.9 else copy.deepcopy(owner[key])
        else:
            owner.append(copy.deepcopy(node))
    text = json.dumps(value)
    return (text.replace("null", "[" * 5000, 1) if rng.random() < 0.03 else text).encode()


def damage_bytes(content, rng):
    """Bytes flipped, overwritten, cut off, put in or moved; whole numbers of eight and four bytes inflated; digits."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place = rng.randrange(len(data) or 1)
        number = rng.choice(
            (2**64 - 1, 2**63, 2**63 - 1, 2**32 - 1, 2**31, 2 ** rng.randrange(64), rng.randrange(len(data) + 1), 0)
        )
        how = rng.randrange(10)
        if how < 2 and data:
            data[place] ^= 1 << rng.randrange(8)
        elif how < 4:
            data[place : place + 1] = rng.randbytes(1)
        elif how == 4:
            data[place : place + 8] = struct.pack("<Q", number)
        elif how == 5:
            data[place : place + 4] = struct.pack("<I", number & 0xFFFFFFFF)
        elif how == 6:
            start, length = rng.randrange(len(data) or 1), rng.choice((4, 8, 16, 40, 64, 500))
            data[place : place + length] = data[start : start + length]
        elif how == 7:
            data = data[:place] if rng.random() < 0.5 else data[:place] + rng.randbytes(rng.choice((1, 8, 100))) + data[place:]
        elif how == 8:
            digits = list(re.finditer(rb"\d+", data))
            if digits:
                found = rng.choice(digits)
                data[found.start() : found.end()] = str(rng.choice((number, -1, 10**20, "9" * 5000))).encode()
        else:
            found = rng.choice((b"..", b"../", b"\0", b"\xff\xff", b"PK\3\4", b"cos\nsystem\n", b"R", b"Q", b"\x93"))
            data[place : place + len(found)] = found
    return bytes(data)


def damage(name, content, rng):
    if name.endswith(".json") and rng.random() < 0.8:
        return damage_json(content, rng)
    if name.endswith(".safetensors") and rng.random() < 0.6:
        length = struct.unpack("<Q", content[:8])[0]
        header = damage_json(content[8 : 8 + length], rng)
        return struct.pack("<Q", len(header)) + header + content[8 + length :]
    if name.endswith((".h5", ".bin", ".spm", ".safetensors")) and rng.random() < 0.05:
        return content + bytes(rng.choice((1, 100, 10_000)))
    return damage_bytes(content, rng)


# -- running ---------------------------------------------------------------------------------------------------------

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
EFFECTS = ("os.", "shutil.", "subprocess.", "socket.", "ctypes.", "exec", "compile", "pickle.")
HARMLESS = ("os.listdir", "os.scandir", "os.fwalk", "os.walk")


class Watch:
    """Everything with an effect that Python's own audit hook reports while `on`."""

    def __init__(self):
        self.on, self.found = False, []
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if not self.on:
            return
        if event == "open":
            if isinstance(arguments[2], int) and arguments[2] & WRITING:
                self.found.append((event, str(arguments[0])))
        elif event.startswith(EFFECTS) and event not in HARMLESS:
            self.found.append((event, str(arguments)[:200]))


def run_cases(kind, first, count, root):
    """In a process of its own: prints every case's number before it is run, and at last how they ended."""
    load, files, targets = sound_files()[kind]
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    load(root)  # sound, and everything is imported
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"):
        "".encode(encoding)  # json imports these when a file looks like one, and zipfile the next
    for encoding in ("cp437", "raw-unicode-escape"):  # and pickletools this one
        "".encode(encoding)
    with contextlib.suppress(OSError, ValueError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, used + ADDRESS_SPACE))
    tracemalloc.start()
    faulthandler.enable()
    watch, ends, worst = Watch(), {}, [0.0, 0.0]
    for case in range(first, first + count):
        rng = random.Random(f"{kind} {case}")
        name = rng.choice(targets)
        content = damage(name, files[name], rng)
        (root / name).write_bytes(content)
        print(f"case {case}: {name}", flush=True)
        signal.alarm(HANGS)  # by default this ends the process, whatever a C library is doing
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        began, end, length = time.process_time(), "loaded", 0
        watch.on = True
        try:
            load(root)
        except CheckpointError as error:
            end = type(error).__name__
            if count == 1:
                print(f"{type(error).__name__}: {error}")
            length = len(str(error))
        watch.on = False
        seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1] - before
        signal.alarm(0)
        size = len(content) + sum(map(len, files.values()))
        assert seconds < SECONDS, f"{seconds:.2f} s"
        assert peak < MEMORY_FACTOR * size + MEMORY_BASE, f"{peak} bytes for files of {size}"
        assert length < 20_000, f"a message of {length} characters"
        assert not watch.found, watch.found
        assert {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} == files.keys()
        (root / name).write_bytes(files[name])
        ends[end] = ends.get(end, 0) + 1
        worst = [max(worst[0], seconds), max(worst[1], peak / 2**20)]
    print(json.dumps({"ends": ends, "seconds": worst[0], "memory": worst[1]}))


FORMATS = ("config", "hf_config", "h5", "h5_shards", "safetensors", "safetensors_shards", "torch", "torch_shards", "bpe")
FORMATS += ("torch_legacy", "tokenizer_json", "spm", "preprocessor", "task", "lora_h5", "lora_safetensors", "peft")


def test_two_thousand_damaged_files(tmp_path, capsys):
    def run(kind):
        root = tmp_path / kind
        root.mkdir()
        command = [sys.executable, __file__, kind, "0", str(CASES), str(root)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PRESETS.parent), *sys.path])}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        lines = done.stdout.splitlines() or [""]
        assert done.returncode == 0, f"{kind}, {lines[-1]}: status {done.returncode}\n{done.stderr[-3000:]}"
        return json.loads(lines[-1])

    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(FORMATS, pool.map(run, FORMATS), strict=True))
    total = sum(sum(result["ends"].values()) for result in results.values())
    with capsys.disabled():
        print(f"\n{total} damaged files:")
        for kind, result in results.items():
            ends = ", ".join(f"{count} {end}" for end, count in sorted(result["ends"].items()))
            print(f"  {kind}: {ends}; at most {result['seconds']:.2f} s, {result['memory']:.1f} MiB")
    assert total == CASES * len(FORMATS) >= 2000
    for result in results.values():
        assert result["ends"].get("CheckpointError", 0) > CASES / 10, "the damage is too small to test anything"
    assert {path.name for path in tmp_path.iterdir()} == set(FORMATS)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        given = [*sys.argv[1:], directory]
        run_cases(given[0], int(given[1]), int(given[2]), Path(given[3]))
