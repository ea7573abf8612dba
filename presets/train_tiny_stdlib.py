"""Build and train the `opt_tiny_stdlib` and `bloom_tiny_stdlib` presets from nothing.

Both are byte-level BPE language models of Python source.  They are trained on the standard library of the
running interpreter; a fixed list of modules is kept out of training (and out of the BPE) and used to measure
bits per byte, as defined by `bits_per_byte` below.

Usage:

    python train_tiny_stdlib.py opt --out opt_tiny_stdlib               # train, export, measure
    python train_tiny_stdlib.py bloom --out bloom_tiny_stdlib
    python train_tiny_stdlib.py opt --out /tmp/trial --steps 100        # a quick trial run
    python train_tiny_stdlib.py opt --out opt_tiny_stdlib --measure     # only measure the files on disk

Needs torch, h5py and tokenizers.  Progress goes to stderr; the measurements go to stdout as JSON.  The training
text, and with it the result, depends on the Python version.  Runs are repeatable on one machine with one torch
version and one thread count; other machines may differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import sysconfig
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import h5py
import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

SEED = 20261
CONTEXT = 256  # window length in tokens for the measurement
BLOCK = 512  # longest training window in tokens
VOCABULARY_SIZE = 1024

# Ordinary modules that every CPython 3.11 to 3.14 has as a single file.
HELD_OUT = (
    "bisect.py", "calendar.py", "configparser.py", "csv.py", "fnmatch.py", "graphlib.py", "heapq.py", "reprlib.py",
    "sched.py", "shlex.py", "statistics.py", "textwrap.py",
)  # fmt: skip
# Not used at all: other people's packages, tests, and files that are mostly generated tables.
SKIPPED_DIRECTORIES = {"site-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
SKIPPED_FILES = {"html/entities.py"}
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")

SPECIAL_TOKENS = {"opt": ["<s>", "<pad>", "</s>", "<unk>"], "bloom": ["<unk>", "<s>", "</s>", "<pad>"]}
START_TOKEN = {"opt": "</s>", "bloom": "<s>"}
END_TOKEN = "</s>"
BLOOM_PATTERN = " ?[^(\\s|[.,!?…。，、।۔،])]+"

STEPS = {"opt": 2800, "bloom": 3200}
SIZES = {"vocabulary_size": VOCABULARY_SIZE, "num_layers": 4}
CONFIGS = {
    "opt": {
        "name": "opt_tiny_stdlib",
        "trainable": True,
        **SIZES,
        "num_heads": 5,
        "hidden_dim": 160,
        "intermediate_dim": 640,
        "dropout": 0.1,
        "max_sequence_length": BLOCK,
    },
    "bloom": {
        "name": "bloom_tiny_stdlib",
        "trainable": True,
        **SIZES,
        "num_heads": 4,
        "hidden_dim": 160,
        "intermediate_dim": 640,
        "dropout": 0.0,
        "layer_norm_epsilon": 1e-05,
    },
}

# ---------------------------------------------------------------------------------------------------------------
# Text.


def stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def training_files() -> list[Path]:
    """Every standard library source file that is neither held out nor skipped, in a fixed order."""
    chosen = []
    for path in sorted(stdlib().rglob("*.py")):
        relative = path.relative_to(stdlib())
        skipped = SKIPPED_DIRECTORIES & set(relative.parts) or relative.as_posix() in SKIPPED_FILES
        skipped = skipped or relative.parts[0].startswith(SKIPPED_PREFIXES)
        if not skipped and relative.as_posix() not in HELD_OUT:
            chosen.append(path)
    return chosen


def training_texts() -> list[str]:
    held_out = {hashlib.sha256((stdlib() / name).read_bytes()).hexdigest() for name in HELD_OUT}
    texts = []
    for path in training_files():
        data = path.read_bytes()
        assert hashlib.sha256(data).hexdigest() not in held_out, path
        try:
            texts.append(data.decode("utf-8"))
        except UnicodeDecodeError:
            print(f"not UTF-8, left out: {path}", file=sys.stderr)
    return [text for text in texts if text]


def held_out_texts() -> dict[str, str]:
    return {name: (stdlib() / name).read_bytes().decode("utf-8") for name in HELD_OUT}


# ---------------------------------------------------------------------------------------------------------------
# Tokenizer.


def pre_tokenizer(kind: str) -> pre_tokenizers.PreTokenizer:
    """The published pre-split of each family."""
    if kind == "opt":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    split = pre_tokenizers.Split(tokenizers.Regex(BLOOM_PATTERN), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train_bpe(kind: str, texts: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges: special tokens first, then the 256 byte symbols, then merges."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(kind)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS[kind],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    vocabulary = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    assert list(vocabulary)[:4] == SPECIAL_TOKENS[kind]
    assert list(vocabulary.values()) == list(range(VOCABULARY_SIZE))
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(vocabulary)
    assert not {a + b for a, b in merges} & set(SPECIAL_TOKENS[kind])
    return vocabulary, merges


def write_tokenizer(out: Path, kind: str, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> None:
    assets = out / "assets/tokenizer"
    assets.mkdir(parents=True, exist_ok=True)
    (assets / "vocabulary.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (assets / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    dtype = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "int32"}, "registered_name": None}
    config = {"name": f"{kind}_tokenizer", "trainable": True, "dtype": dtype, "config_file": "tokenizer.json"}
    config |= {"sequence_length": None, "add_prefix_space": False}
    config["unsplittable_tokens"] = sorted({START_TOKEN[kind], END_TOKEN, "<pad>"})
    class_name = {"opt": "OPTTokenizer", "bloom": "BloomTokenizer"}[kind]
    write_json(out / "tokenizer.json", envelope(kind, "tokenizer", class_name, config))


def read_tokenizer(out: Path, kind: str) -> tokenizers.Tokenizer:
    """The tokenizer from its two files.  Special tokens are never made from text here."""
    assets = out / "assets/tokenizer"
    vocabulary = json.loads((assets / "vocabulary.json").read_text(encoding="utf-8"))
    lines = (assets / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizer(kind)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------
# Models.  Weights live under the names of their HDF5 datasets.


def numbered(name: str, index: int) -> str:
    return f"layers/{name}" + (f"_{index}" if index else "")


class LanguageModel(nn.Module):
    """What OPT and BLOOM share: layer normalization before each block, biases everywhere, a tied output head."""

    def __init__(self, config: dict, weights: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.config = config
        self.dim, self.heads, self.layers = config["hidden_dim"], config["num_heads"], config["num_layers"]
        self.head_size = self.dim // self.heads
        self.weights = nn.ParameterDict()
        for name, value in self.initial_weights().items():
            if weights is not None:
                assert weights[name].shape == value.shape, name
            self.weights[name] = nn.Parameter(value if weights is None else weights[name])
        assert weights is None or set(weights) == set(self.weights)

    # Names that differ between the two.
    token_embedding = ""
    layer = ""
    attention_prefix = ""
    norm_names = ("", "")
    dense_names = ("", "")
    final_norm = ""
    epsilon = 1e-5
    embedding_std = 0.05

    def output_kernel_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def extra_weights(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def embed(self, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise NotImplementedError

    def activation(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def initial_weights(self) -> dict[str, Tensor]:
        dim, ff, split = self.dim, self.config["intermediate_dim"], (self.heads, self.head_size)
        output_std = (2 * self.layers) ** -0.5
        weights = {self.token_embedding + "/vars/0": torch.randn(self.config["vocabulary_size"], dim) * self.embedding_std}
        weights |= self.extra_weights() | self.norm_weights(self.final_norm)
        for index in range(self.layers):
            path = numbered(self.layer, index)
            for name in ("query", "key", "value"):
                dense = f"{path}/_self_attention_layer/{self.attention_prefix}{name}_dense/vars"
                weights[dense + "/0"] = torch.randn(dim, *split) * dim**-0.5
                weights[dense + "/1"] = torch.zeros(*split)
            dense = f"{path}/_self_attention_layer/{self.attention_prefix}output_dense/vars"
            weights[dense + "/0"] = torch.randn(*self.output_kernel_shape()) * dim**-0.5 * output_std
            weights[dense + "/1"] = torch.zeros(dim)
            first, second = (f"{path}/{name}/vars" for name in self.dense_names)
            weights[first + "/0"] = torch.randn(dim, ff) * dim**-0.5
            weights[first + "/1"] = torch.zeros(ff)
            weights[second + "/0"] = torch.randn(ff, dim) * ff**-0.5 * output_std
            weights[second + "/1"] = torch.zeros(dim)
            for name in self.norm_names:
                weights |= self.norm_weights(f"{path}/{name}")
        return weights

    def norm_weights(self, path: str) -> dict[str, Tensor]:
        return {path + "/vars/0": torch.ones(self.dim), path + "/vars/1": torch.zeros(self.dim)}

    def norm(self, x: Tensor, path: str) -> Tensor:
        return nn.functional.layer_norm(
            x, (self.dim,), self.weights[path + "/vars/0"], self.weights[path + "/vars/1"], self.epsilon
        )

    def dense(self, x: Tensor, path: str) -> Tensor:
        """A dense layer; kernels with three axes are used as matrices."""
        kernel, bias = self.weights[path + "/vars/0"], self.weights[path + "/vars/1"]
        return nn.functional.linear(x, kernel.reshape(x.shape[-1], -1).T, bias.flatten())

    def forward(self, ids: Tensor) -> Tensor:
        """Logits for every position."""
        x = self.embed(ids)
        for index in range(self.layers):
            path = numbered(self.layer, index)
            attention = f"{path}/_self_attention_layer/{self.attention_prefix}"
            normed = self.norm(x, f"{path}/{self.norm_names[0]}")
            query, key, value = (
                self.dense(normed, f"{attention}{name}_dense").unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for name in ("query", "key", "value")
            )
            mixed = self.attend(query * self.head_size**-0.5, key, value).transpose(1, 2).flatten(2)
            x = x + self.dense(mixed, f"{attention}output_dense")
            normed = self.norm(x, f"{path}/{self.norm_names[1]}")
            hidden = self.activation(self.dense(normed, f"{path}/{self.dense_names[0]}"))
            x = x + self.dense(hidden, f"{path}/{self.dense_names[1]}")
        return nn.functional.linear(self.norm(x, self.final_norm), self.weights[self.token_embedding + "/vars/0"])


class OPT(LanguageModel):
    """Learned positions, relu."""

    token_embedding = "layers/token_and_position_embedding/token_embedding"
    position_embedding = "layers/token_and_position_embedding/position_embedding/vars/0"
    layer = "transformer_decoder"
    norm_names = ("_self_attention_layer_norm", "_feedforward_layer_norm")
    dense_names = ("_feedforward_intermediate_dense", "_feedforward_output_dense")
    final_norm = "layers/layer_normalization"
    embedding_std = 0.1

    def output_kernel_shape(self) -> tuple[int, ...]:
        return self.heads, self.head_size, self.dim

    def extra_weights(self) -> dict[str, Tensor]:
        # Sinusoids are only the starting point; the table is trained like every other weight.
        frequencies = 1000.0 ** -(torch.arange(0, self.dim, 2) / self.dim)
        angles = torch.arange(self.config["max_sequence_length"])[:, None] * frequencies
        return {self.position_embedding: self.embedding_std * torch.cat([angles.sin(), angles.cos()], 1)}

    def embed(self, ids: Tensor) -> Tensor:
        positions = self.weights[self.position_embedding][: ids.shape[1]]
        return self.weights[self.token_embedding + "/vars/0"][ids] + positions

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)

    def activation(self, x: Tensor) -> Tensor:
        return nn.functional.relu(x)


class Bloom(LanguageModel):
    """Normalized embeddings, linear attention biases (ALiBi) instead of positions, tanh gelu."""

    token_embedding = "layers/reversible_embedding"
    embedding_norm = "layers/layer_normalization"
    layer = "bloom_decoder"
    attention_prefix = "_"
    norm_names = ("_pre_attention_layernorm", "_post_attention_layernorm")
    dense_names = ("_mlp_intermediate_dense", "_mlp_output_dense")
    final_norm = "layers/layer_normalization_1"

    def output_kernel_shape(self) -> tuple[int, ...]:
        return self.dim, self.dim

    def extra_weights(self) -> dict[str, Tensor]:
        assert self.heads & (self.heads - 1) == 0, "the slopes below are for a power of two"
        return self.norm_weights(self.embedding_norm)

    def embed(self, ids: Tensor) -> Tensor:
        return self.norm(self.weights[self.token_embedding + "/vars/0"][ids], self.embedding_norm)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # slope * (key position - query position): equal, after the softmax, to slope * key position.
        length = query.shape[2]
        slopes = 2.0 ** (-8.0 / self.heads * torch.arange(1, self.heads + 1))
        positions = torch.arange(length)
        bias = slopes[:, None, None] * (positions[None, :] - positions[:, None])
        bias = bias.masked_fill(positions[None, :] > positions[:, None], -math.inf)[None].to(query.dtype)
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)

    def activation(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x, approximate="tanh")


MODELS: dict[str, type[LanguageModel]] = {"opt": OPT, "bloom": Bloom}

# ---------------------------------------------------------------------------------------------------------------
# Training.


def batches(tokens: Tensor, start_id: int, blocks: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (inputs, targets).  Targets are windows of the token stream; inputs are the same windows moved right
    by one behind the start token.  One batch in four has windows of BLOCK tokens, the others of BLOCK / 2."""
    while True:
        offset = int(torch.randint(BLOCK, (1,), generator=generator))
        rows = tokens[offset : offset + (len(tokens) - offset) // BLOCK * BLOCK].view(-1, BLOCK)
        order = torch.randperm(len(rows), generator=generator)
        for chosen in order[: len(rows) // blocks * blocks].view(-1, blocks):
            targets = rows[chosen]
            if torch.rand(1, generator=generator) >= 0.25:
                targets = targets.reshape(-1, BLOCK // 2)
            starts = torch.full((len(targets), 1), start_id)
            yield torch.cat([starts, targets[:, :-1]], 1), targets


def train(kind: str, out: Path, texts: list[str], steps: int, blocks: int, peak_rate: float) -> LanguageModel:
    """Train on `texts`, each followed by </s>."""
    tokenizer = read_tokenizer(out, kind)
    end_id, start_id = tokenizer.token_to_id(END_TOKEN), tokenizer.token_to_id(START_TOKEN[kind])
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        stream += [*encoding.ids, end_id]
    tokens = torch.tensor(stream)
    size = sum(len(text.encode("utf-8")) for text in texts)
    print(f"{len(texts)} files, {size} bytes, {len(tokens)} tokens", file=sys.stderr)

    torch.manual_seed(SEED)
    model = MODELS[kind](CONFIGS[kind])
    matrices = [w for w in model.parameters() if w.ndim > 1]
    vectors = [w for w in model.parameters() if w.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, 0.98))
    warmup, decay = min(100, steps // 10 + 1), max(1, steps * 3 // 10)
    source = batches(tokens, start_id, blocks, torch.Generator().manual_seed(SEED))
    started, running = time.monotonic(), 0.0
    for step in range(steps):
        # Linear warm-up, then constant, then linear to zero over the last three tenths.
        rate = peak_rate * min((step + 1) / warmup, 1.0, (steps - step) / decay)
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = next(source)
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            seconds = time.monotonic() - started
            bits = running / math.log(2) * len(tokens) / size
            line = f"step {step + 1}/{steps} loss {running:.4f} (about {bits:.3f} bits per byte) rate {rate:.2e}"
            print(f"{line} {seconds:.0f} s", file=sys.stderr)
    return model


# ---------------------------------------------------------------------------------------------------------------
# Measurement.


@torch.inference_mode()
def bits_per_byte(model: LanguageModel, files: list[list[int]], size: int, start_id: int, context: int) -> float:
    """Bits the model needs per byte of text.

    `files` holds each file's tokens, encoded without special tokens, and `size` the sum of the files' lengths in
    UTF-8 bytes.  Every file is cut into consecutive windows of `context` tokens (the last one may be shorter).
    Each window is predicted from the start token and the tokens before it in that window, so that every token of
    every file is predicted exactly once.  The result is the sum of -log2 p over all tokens, divided by `size`.
    """
    windows = [tokens[i : i + context] for tokens in files for i in range(0, len(tokens), context)]
    bits = 0.0
    for window in windows:
        inputs = torch.tensor([[start_id, *window[:-1]]])
        log_p = model(inputs)[0].double().log_softmax(-1)
        bits -= log_p.gather(1, torch.tensor(window)[:, None]).sum().item() / math.log(2)
    return bits / size


@torch.inference_mode()
def continuation(model: LanguageModel, tokenizer: tokenizers.Tokenizer, start_id: int, prompt: str, count: int) -> str:
    """The prompt and `count` greedy tokens."""
    ids = [start_id, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    end_id = tokenizer.token_to_id(END_TOKEN)
    for _ in range(count):
        following = int(model(torch.tensor([ids]))[0, -1].argmax())
        if following == end_id:
            break
        ids.append(following)
    return tokenizer.decode(ids[1:])


def held_out_description() -> dict:
    """Which files were kept out, from the running interpreter."""
    contents = {name: (stdlib() / name).read_bytes() for name in HELD_OUT}
    return {
        "python": platform.python_version(),
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
        "bytes": sum(map(len, contents.values())),
    }


def measure(kind: str, out: Path, prompt: str) -> dict:
    """Bits per byte from the files in `out`: float16 weights, float32 arithmetic."""
    model, tokenizer = load_model(kind, out), read_tokenizer(out, kind)
    start_id = tokenizer.token_to_id(START_TOKEN[kind])
    texts = held_out_texts()
    files = {name: tokenizer.encode(text, add_special_tokens=False).ids for name, text in texts.items()}
    for name, tokens in files.items():
        assert tokenizer.decode(tokens, skip_special_tokens=False) == texts[name], name
        assert min(tokens) >= len(SPECIAL_TOKENS[kind]), name
    size = sum(len(text.encode("utf-8")) for text in texts.values())

    def measured(context: int) -> float:
        return round(bits_per_byte(model, list(files.values()), size, start_id, context), 4)

    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "held_out": held_out_description(),
        "tokens": sum(map(len, files.values())),
        "bytes_per_token": round(size / sum(map(len, files.values())), 4),
        "bits_per_byte": measured(CONTEXT),
        "bits_per_byte_context_512": measured(512),
        "continuation": continuation(model, tokenizer, start_id, prompt, 96),
    }


# ---------------------------------------------------------------------------------------------------------------
# Files.


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def envelope(kind: str, module: str, class_name: str, config: dict) -> dict:
    return {
        "module": f"keras_hub.src.models.{kind}.{kind}_{module}",
        "class_name": class_name,
        "config": config,
        "registered_name": f"keras_hub>{class_name}",
    }


def write_model(out: Path, kind: str, model: LanguageModel) -> None:
    """config.json, metadata.json and the weights rounded to float16."""
    weights = {name: value.detach().numpy().astype(np.float16) for name, value in model.weights.items()}
    with h5py.File(out / "model.weights.h5", "w") as file:
        for name in sorted(weights):
            file.create_dataset(name, data=weights[name], track_times=False)
    class_name = {"opt": "OPTBackbone", "bloom": "BloomBackbone"}[kind]
    write_json(out / "config.json", envelope(kind, "backbone", class_name, CONFIGS[kind]))
    metadata = {
        "keras_version": "3.7.0",
        "keras_hub_version": "0.17.0",
        "parameter_count": sum(value.size for value in weights.values()),
        "date_saved": datetime.now().strftime("%Y-%m-%d@%H:%M:%S"),
        "description": f"Python source: a small {kind.upper()} trained on the standard library.",
        "weights_dtype": "float16",
    }
    write_json(out / "metadata.json", metadata)


def load_model(kind: str, out: Path) -> LanguageModel:
    """The model as stored, in float32."""
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))["config"]
    weights = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            weights[name] = torch.from_numpy(item[()].astype(np.float32))

    with h5py.File(out / "model.weights.h5", "r") as file:
        file.visititems(visit)
    return MODELS[kind](config, weights)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and measure a tiny language model of Python source.")
    parser.add_argument("kind", choices=sorted(MODELS))
    parser.add_argument("--out", type=Path, required=True, help="preset directory to write (or to measure)")
    parser.add_argument("--steps", type=int, help=f"default: {STEPS}")
    parser.add_argument("--blocks", type=int, default=4, help=f"training blocks of {BLOCK} tokens per step")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", action="store_true", help="do not train, measure the files in --out")
    parser.add_argument("--prompt", default='def read_lines(path):\n    """', help="start of the text to continue")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    kind, out = arguments.kind, arguments.out
    steps = arguments.steps or STEPS[kind]
    if not arguments.measure:
        texts = training_texts()
        write_tokenizer(out, kind, *train_bpe(kind, texts))
        write_model(out, kind, train(kind, out, texts, steps, arguments.blocks, arguments.rate))
    results = measure(kind, out, arguments.prompt)
    if not arguments.measure:
        write_json(out / "held_out.json", {**results["held_out"], "bits_per_byte": round(results["bits_per_byte"], 3)})
    print(json.dumps(results, indent=4, ensure_ascii=False))


if __name__ == "__main__":
    main()
