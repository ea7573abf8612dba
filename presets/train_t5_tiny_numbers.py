"""Build and train the `t5_tiny_numbers` preset from nothing.

The model turns short texts about the integers 0..9999 into short texts:

    spell: 4207           ->  four thousand two hundred seven
    roman: 1994           ->  MCMXCIV                            (1..3999)
    digits: ninety-nine   ->  99

Everything it learns from is computed in this file.  About 1000 integers (`held_out.json`) are kept out of
training in all three tasks; accuracy is measured on exactly those.

Usage:

    python train_t5_tiny_numbers.py --out t5_tiny_numbers                 # train, export, measure
    python train_t5_tiny_numbers.py --out t5_tiny_numbers --steps 200     # a quick trial run
    python train_t5_tiny_numbers.py --out t5_tiny_numbers --measure       # only measure the files on disk

Needs torch, h5py and sentencepiece.  Progress goes to stderr; the measurements go to stdout as JSON.  Runs are
repeatable on one machine with one torch version; other machines may differ in the last bits.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import struct
import sys
import time
from datetime import datetime
from pathlib import Path

import h5py
import numpy as np
import sentencepiece
import torch
from torch import Tensor, nn

SEED = 20260
PAD, EOS, UNK = 0, 1, 2
TASKS = ("spell", "roman", "digits")
EXAMPLES = {"spell: 4207": "four thousand two hundred seven", "roman: 1994": "MCMXCIV", "digits: ninety-nine": "99"}

CONFIG = {
    "name": "t5_tiny_numbers",
    "trainable": True,
    "vocabulary_size": 64,
    "hidden_dim": 64,
    "intermediate_dim": 192,
    "num_layers": 2,
    "num_heads": 4,
    "activation": "relu",
    "key_value_dim": 16,
    "dropout": 0.1,
    "use_gated_activation": False,
    "layer_norm_epsilon": 1e-06,
    "tie_embedding_weights": True,
}
RELATIVE_BUCKETS, RELATIVE_MAX_DISTANCE = 32, 128

# ---------------------------------------------------------------------------------------------------------------
# The three tasks.

UNITS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEENS = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
ROMAN = [
    (1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"),
    (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
]  # fmt: skip


def spell(number: int) -> str:
    """English words for 0..9999, without "and"."""
    if number == 0:
        return "zero"
    words = []
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            words += [UNITS[number // size - 1], name]
            number %= size
    if number >= 20:
        tens, units = divmod(number, 10)
        words.append(TENS[tens - 2] + ("-" + UNITS[units - 1] if units else ""))
    elif number >= 10:
        words.append(TEENS[number - 10])
    elif number:
        words.append(UNITS[number - 1])
    return " ".join(words)


def roman(number: int) -> str:
    """Roman numeral for 1..3999."""
    letters = ""
    for value, symbol in ROMAN:
        count, number = divmod(number, value)
        letters += symbol * count
    return letters


def pair(task: str, number: int) -> tuple[str, str]:
    """The input and target text of one task for one number."""
    if task == "spell":
        return f"spell: {number}", spell(number)
    if task == "roman":
        return f"roman: {number}", roman(number)
    return f"digits: {spell(number)}", str(number)


def pairs(task: str, numbers: list[int]) -> list[tuple[str, str]]:
    """All pairs of a task for the numbers it is defined on."""
    return [pair(task, n) for n in numbers if task != "roman" or 1 <= n <= 3999]


def held_out_numbers() -> list[int]:
    """The fixed numbers never used in training: 12 with two digits, 988 with three or four."""
    rng = random.Random(SEED)
    return sorted(rng.sample(range(10, 100), 12) + rng.sample(range(100, 10000), 988))


def training_numbers() -> list[int]:
    """All other numbers: every training pair is about one of them."""
    held_out = set(held_out_numbers())
    return [n for n in range(10000) if n not in held_out]


# ---------------------------------------------------------------------------------------------------------------
# The vocabulary: a SentencePiece unigram model written out directly, so that digits and Roman letters are always
# single pieces and number words are whole pieces.


def vocabulary() -> list[str]:
    """The pieces, in id order; the first three are <pad>, </s>, <unk>."""
    words = ["zero", *UNITS, *TEENS, *TENS, "hundred", "thousand"]
    pieces = ["<pad>", "</s>", "<unk>", "▁", "-"]
    pieces += ["▁" + task + ":" for task in TASKS]
    pieces += list("0123456789") + list("MDCLXVI")
    pieces += ["▁" + word for word in words]
    pieces += UNITS  # the part after a hyphen
    return pieces


def protobuf_field(number: int, value: float | bytes | str) -> bytes:
    """One field in protocol buffer encoding: varint, 32-bit float or length-delimited."""

    def varint(n: int) -> bytes:
        n &= (1 << 64) - 1
        out = bytearray()
        while n > 127:
            out.append(n & 127 | 128)
            n >>= 7
        return bytes(out) + bytes([n])

    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def sentencepiece_model() -> bytes:
    """A serialized SentencePiece ModelProto for `vocabulary()`."""
    normal, unknown, control = 1, 2, 3
    field = protobuf_field
    model = b""
    for index, piece in enumerate(vocabulary()):
        kind = unknown if index == UNK else control if index < UNK else normal
        # Scores between -1 and -2: of two segmentations the one with fewer pieces always wins.
        score = 0.0 if kind != normal else -1.0 - index / 100
        model += field(1, field(1, piece) + field(2, score) + field(3, kind))
    trainer = field(3, 1) + field(4, len(vocabulary()))  # unigram, vocabulary size
    trainer += field(40, UNK) + field(41, -1) + field(42, EOS) + field(43, PAD)  # ids of unk, bos, eos, pad
    normalizer = field(1, "identity") + field(3, 1) + field(4, 1) + field(5, 1)  # dummy prefix, trim, escape spaces
    return model + field(2, trainer) + field(3, normalizer)


# ---------------------------------------------------------------------------------------------------------------
# The model.  Weights live under the names of their HDF5 datasets.


def layer_path(index: int) -> str:
    return "layers/t5_transformer_layer" + (f"_{index}" if index else "")


def initial_weights(config: dict) -> dict[str, Tensor]:
    """Random weights by dataset name."""
    dim, ff, heads = config["hidden_dim"], config["intermediate_dim"], config["num_heads"]
    head = config["key_value_dim"]
    inner, layers = heads * head, config["num_layers"]

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape) * std

    weights = {
        "layers/reversible_embedding/vars/0": normal(config["vocabulary_size"], dim, std=1.0),
        "layers/t5_layer_norm/vars/0": torch.ones(dim),
        "layers/t5_layer_norm_1/vars/0": torch.ones(dim),
    }
    for index in range(2 * layers):
        path = layer_path(index)
        for attention in ("self_attention", "cross_attention")[: 1 + (index >= layers)]:
            weights[f"{path}/{attention}/query_projector/vars/0"] = normal(dim, inner, std=(dim * head) ** -0.5)
            weights[f"{path}/{attention}/key_projector/vars/0"] = normal(dim, inner, std=dim**-0.5)
            weights[f"{path}/{attention}/value_projector/vars/0"] = normal(dim, inner, std=dim**-0.5)
            weights[f"{path}/{attention}/output_projector/vars/0"] = normal(inner, dim, std=inner**-0.5)
            weights[f"{path}/{attention}_layer_norm/vars/0"] = torch.ones(dim)
        if index in (0, layers):
            weights[f"{path}/self_attention/vars/0"] = normal(RELATIVE_BUCKETS, heads, std=inner**-0.5)
        weights[f"{path}/input_projector/vars/0"] = normal(dim, ff, std=dim**-0.5)
        weights[f"{path}/output_projector/vars/0"] = normal(ff, dim, std=ff**-0.5)
        weights[f"{path}/layer_norm/vars/0"] = torch.ones(dim)
    return weights


def relative_buckets(length: int, bidirectional: bool) -> Tensor:
    """Bucket number of every (query, key) pair."""
    positions = torch.arange(length)
    relative = positions[None, :] - positions[:, None]
    buckets, offset = RELATIVE_BUCKETS, torch.zeros_like(relative)
    if bidirectional:
        buckets //= 2
        offset = (relative > 0) * buckets
        distance = relative.abs()
    else:
        distance = (-relative).clamp(min=0)
    exact = buckets // 2
    scaled = torch.log(distance.clamp(min=1) / exact) / math.log(RELATIVE_MAX_DISTANCE / exact)
    far = (exact + (scaled * (buckets - exact)).long()).clamp(max=buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


class T5(nn.Module):
    """Encoder-decoder with RMS norm before each block, relative position bias and a tied output head."""

    def __init__(self, config: dict, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.weights = nn.ParameterDict({name: nn.Parameter(value) for name, value in weights.items()})

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["layer_norm_epsilon"])
        return x * scale * self.weights[name + "/vars/0"]

    def bias(self, length: int, path: str, bidirectional: bool) -> Tensor:
        table = self.weights[f"{path}/self_attention/vars/0"]
        return table[relative_buckets(length, bidirectional)].permute(2, 0, 1)[None]

    def attention(self, x: Tensor, memory: Tensor, path: str, bias: Tensor) -> Tensor:
        heads, size = self.config["num_heads"], self.config["key_value_dim"]

        def project(states: Tensor, name: str) -> Tensor:
            projected = states @ self.weights[f"{path}/{name}_projector/vars/0"]
            return projected.view(*states.shape[:2], heads, size).transpose(1, 2)

        query, key, value = project(x, "query"), project(memory, "key"), project(memory, "value")
        probabilities = (query @ key.transpose(-1, -2) + bias).softmax(-1)  # not divided by sqrt(size)
        merged = (probabilities @ value).transpose(1, 2).flatten(2)
        return merged @ self.weights[f"{path}/output_projector/vars/0"]

    def feed_forward(self, x: Tensor, path: str) -> Tensor:
        hidden = nn.functional.relu(self.norm(x, f"{path}/layer_norm") @ self.weights[f"{path}/input_projector/vars/0"])
        return hidden @ self.weights[f"{path}/output_projector/vars/0"]

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.weights["layers/reversible_embedding/vars/0"][ids]
        bias = self.bias(ids.shape[1], layer_path(0), True) + (1.0 - mask.float())[:, None, None, :] * -1e9
        for index in range(self.config["num_layers"]):
            path = layer_path(index)
            normed = self.norm(x, f"{path}/self_attention_layer_norm")
            x = x + self.attention(normed, normed, f"{path}/self_attention", bias)
            x = x + self.feed_forward(x, path)
        return self.norm(x, "layers/t5_layer_norm")

    def decode(self, ids: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        layers, length = self.config["num_layers"], ids.shape[1]
        x = self.weights["layers/reversible_embedding/vars/0"][ids]
        visible = torch.ones(length, length).tril()[None] * mask.float()[:, None, :]
        bias = self.bias(length, layer_path(layers), False) + (1.0 - visible)[:, None] * -1e9
        cross_bias = (1.0 - memory_mask.float())[:, None, None, :] * -1e9
        for index in range(layers, 2 * layers):
            path = layer_path(index)
            normed = self.norm(x, f"{path}/self_attention_layer_norm")
            x = x + self.attention(normed, normed, f"{path}/self_attention", bias)
            normed = self.norm(x, f"{path}/cross_attention_layer_norm")
            x = x + self.attention(normed, memory, f"{path}/cross_attention", cross_bias)
            x = x + self.feed_forward(x, path)
        return self.norm(x, "layers/t5_layer_norm_1")

    def logits(self, decoder_output: Tensor) -> Tensor:
        return decoder_output * self.config["hidden_dim"] ** -0.5 @ self.weights["layers/reversible_embedding/vars/0"].T


# ---------------------------------------------------------------------------------------------------------------
# Training.


def padded(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def sampling_weights(numbers: list[int]) -> Tensor:
    """Half of the draws are uniform over the numbers; the other half first picks a digit count."""
    digits = torch.tensor([len(str(n)) for n in numbers])
    uniform = torch.full((len(numbers),), 1 / len(numbers))
    by_length = 1 / torch.bincount(digits)[digits] / digits.unique().numel()
    return (uniform + by_length) / 2


def train(processor: sentencepiece.SentencePieceProcessor, steps: int, batch: int, peak_rate: float) -> T5:
    """Train on every number that is not held out."""
    numbers = training_numbers()
    used, weights, sources, targets = [], [], [], []
    for task in TASKS:
        task_numbers = [n for n in numbers if task != "roman" or 1 <= n <= 3999]
        used += task_numbers
        weights.append(sampling_weights(task_numbers))
        for source, target in pairs(task, numbers):
            sources.append([*processor.encode(source), EOS])
            targets.append([PAD, *processor.encode(target), EOS])
    assert set(held_out_numbers()).isdisjoint(used)
    assert len(used) == len(sources)
    assert UNK not in {i for row in sources + targets for i in row}

    source_lengths, target_lengths = (torch.tensor([len(r) for r in rows]) for rows in (sources, targets))
    source_ids, target_ids = padded(sources, PAD), padded(targets, PAD)
    probabilities = torch.cat(weights)

    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = T5(CONFIG, initial_weights(CONFIG))
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.99), weight_decay=0.01)
    warmup = min(500, steps // 10 + 1)
    started, running = time.monotonic(), 0.0
    for step in range(steps):
        progress = max(0.0, (step - warmup) / max(1, steps - warmup))
        rate = peak_rate * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.multinomial(probabilities, batch, replacement=True, generator=generator)
        source_length, target_length = source_lengths[rows], target_lengths[rows]
        source = source_ids[rows, : int(source_length.max())]
        target = target_ids[rows, : int(target_length.max())]
        source_mask = torch.arange(source.shape[1]) < source_length[:, None]
        inputs, labels = target[:, :-1], target[:, 1:]
        input_mask = torch.arange(inputs.shape[1]) < (target_length - 1)[:, None]
        output = model.decode(inputs, input_mask, model.encode(source, source_mask), source_mask)
        loss = nn.functional.cross_entropy(model.logits(output)[input_mask], labels[input_mask])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            seconds = time.monotonic() - started
            print(f"step {step + 1}/{steps} loss {running:.5f} rate {rate:.2e} {seconds:.0f} s", file=sys.stderr)
    return model


# ---------------------------------------------------------------------------------------------------------------
# Files.


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def envelope(module: str, name: str, config: dict) -> dict:
    return {
        "module": f"keras_hub.src.models.t5.{module}",
        "class_name": name,
        "config": config,
        "registered_name": f"keras_hub>{name}",
    }


def write_tokenizer(out: Path) -> None:
    (out / "assets/tokenizer").mkdir(parents=True, exist_ok=True)
    (out / "assets/tokenizer/vocabulary.spm").write_bytes(sentencepiece_model())
    dtype = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "int32"}, "registered_name": None}
    config = {"name": "t5_tokenizer", "trainable": True, "dtype": dtype, "config_file": "tokenizer.json"}
    config |= {"proto": None, "sequence_length": None, "add_bos": False, "add_eos": False}
    write_json(out / "tokenizer.json", envelope("t5_tokenizer", "T5Tokenizer", config))


def write_model(out: Path, model: T5) -> None:
    """config.json, metadata.json and the weights rounded to float16."""
    weights = {name: value.detach().numpy().astype(np.float16) for name, value in model.weights.items()}
    with h5py.File(out / "model.weights.h5", "w") as file:
        for name in sorted(weights):
            file.create_dataset(name, data=weights[name], track_times=False)
    write_json(out / "config.json", envelope("t5_backbone", "T5Backbone", CONFIG))
    metadata = {
        "keras_version": "3.7.0",
        "keras_hub_version": "0.17.0",
        "parameter_count": sum(value.size for value in weights.values()),
        "date_saved": datetime.now().strftime("%Y-%m-%d@%H:%M:%S"),
        "description": "Numbers from 0 to 9999 between digits, English words and Roman numerals.",
        "weights_dtype": "float16",
    }
    write_json(out / "metadata.json", metadata)


def load_model(out: Path) -> T5:
    """The model as stored: float16 weights, float32 arithmetic."""
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))["config"]
    weights = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            weights[name] = torch.from_numpy(item[()].astype(np.float32))

    with h5py.File(out / "model.weights.h5", "r") as file:
        file.visititems(visit)
    expected = initial_weights(config)
    assert {n: w.shape for n, w in weights.items()} == {n: w.shape for n, w in expected.items()}
    return T5(config, weights)


# ---------------------------------------------------------------------------------------------------------------
# Measurement.


@torch.inference_mode()
def answer(model: T5, processor: sentencepiece.SentencePieceProcessor, texts: list[str], limit: int = 24) -> list[str]:
    """Greedy decoding from <pad> until </s>."""
    rows = [[*processor.encode(text), EOS] for text in texts]
    source = padded(rows, PAD)
    source_mask = torch.arange(source.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    memory = model.encode(source, source_mask)
    output = torch.full((len(rows), 1), PAD)
    finished = torch.zeros(len(rows), dtype=torch.bool)
    for _ in range(limit):
        states = model.decode(output, torch.ones_like(output), memory, source_mask)
        following = model.logits(states[:, -1]).argmax(-1)
        following[finished] = PAD
        output = torch.cat([output, following[:, None]], 1)
        finished |= following == EOS
        if finished.all():
            break
    # An answer that never stops keeps its extra words and therefore counts as wrong.
    answers = [row[: row.index(EOS)] if EOS in row else row for row in output[:, 1:].tolist()]
    return [processor.decode(row) for row in answers]


def measure(out: Path) -> dict:
    """Exact-match counts per task from the files in `out`."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(out / "assets/tokenizer/vocabulary.spm"))
    model = load_model(out)
    held_out = json.loads((out / "held_out.json").read_text(encoding="utf-8"))["numbers"]
    groups = {
        "held_out": held_out,
        "training": sorted(set(range(10000)) - set(held_out)),
        "0..99": list(range(100)),
        "all": list(range(10000)),
    }
    results: dict = {"parameters": sum(w.numel() for w in model.parameters())}
    results["examples"] = {text: answer(model, processor, [text])[0] for text in EXAMPLES}
    results["examples_right"] = results["examples"] == EXAMPLES
    wrong: list[str] = []
    for task in TASKS:
        right = {}
        for source, target in pairs(task, groups["all"]):
            assert processor.decode(processor.encode(target)) == target, target
            right[source] = target
        sources = list(right)
        given: dict[str, str] = {}
        for start in range(0, len(sources), 1000):
            chunk = sources[start : start + 1000]
            given.update(zip(chunk, answer(model, processor, chunk), strict=True))
        wrong += [f"{s} -> {given[s]}" for s in sources if given[s] != right[s]]
        results[task] = {}
        for group, numbers in groups.items():
            chosen = [source for source, _ in pairs(task, numbers)]
            good = sum(given[s] == right[s] for s in chosen)
            results[task][group] = {"right": good, "of": len(chosen), "percent": round(100 * good / len(chosen), 3)}
    results["wrong"] = wrong[:20]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and measure the t5_tiny_numbers preset.")
    parser.add_argument("--out", type=Path, required=True, help="preset directory to write (or to measure)")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", action="store_true", help="do not train, measure the files in --out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    if not arguments.measure:
        assert len(vocabulary()) == len(set(vocabulary())) == CONFIG["vocabulary_size"]
        write_tokenizer(arguments.out)
        processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
        (arguments.out / "held_out.json").write_text(json.dumps({"numbers": held_out_numbers()}) + "\n")
        write_model(arguments.out, train(processor, arguments.steps, arguments.batch, arguments.rate))
    print(json.dumps(measure(arguments.out), indent=4, ensure_ascii=False))


if __name__ == "__main__":
    main()
