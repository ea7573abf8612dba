"""How fast one model runs here, beside what the hardware allows, measured in the same run. What is measured: spec/bench.md.

`measure` takes the measurements in turns, because a shared machine changes its speed from one second to the next, and gives
one dictionary. Load time, the first call and memory are those of a process of its own.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refmodels.accelerator import REFERENCE, find
from refmodels.backbone import Backbone
from refmodels.generate import Sampling, decode
from refmodels.machine import Limits, child_environment, default_threads, description, last_line, measured_limits, peak_memory
from refmodels.parameters import Parameter, stored_bytes

DECODE_AFTER = 32
"""Tokens that are there when decoding is measured."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is measured: prompts of this length, this many new tokens after `DECODE_AFTER`, these batches, so many times."""

    prompt_length: int = 512
    new_tokens: int = 64
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 3

    def __post_init__(self) -> None:
        if self.new_tokens < 2:
            raise ValueError(f"new_tokens must be at least 2, got {self.new_tokens}: the first one is the prompt's")

    def check(self, backbone: Backbone) -> None:
        """ValueError if the model has too few positions for this. T5 has no limit."""
        limit = getattr(backbone.config, "max_sequence_length", None)
        wanted = {"prompt_length": self.prompt_length, f"{DECODE_AFTER} + new_tokens": DECODE_AFTER + self.new_tokens}
        for name, value in wanted.items():
            if limit is not None and value > limit:
                raise ValueError(f"{name} is {value}, more than the model's max_sequence_length {limit}")


# -- what a model costs ----------------------------------------------------------------------------------------------------


def bytes_per_step(backbone: Backbone) -> int:
    """Bytes of the parameters that one decoding step reads, whatever the batch, in the types they are stored in.

    Not among them: tables of which a step reads a few rows, T5's encoder, and its projections of the encoder's output.
    """
    return stored_bytes(filter(_read_each_step(backbone), backbone.parameters()), backbone.variable_dtype)


def _read_each_step(backbone: Backbone) -> Callable[[Parameter], bool]:
    tied = backbone.config.tie_embedding_weights

    def is_read(parameter: Parameter) -> bool:
        path = parameter.path
        if path.startswith("token_embedding."):
            return tied or path.startswith("token_embedding.reverse_embeddings")
        looked_up = path.endswith(("position_embedding.embeddings", "relative_attention_bias.embeddings"))
        return not (looked_up or _takes_encoder_tokens(path))

    return is_read


def _takes_encoder_tokens(path: str) -> bool:
    """Whether this is one of T5's parameters that are applied to the encoder's tokens, once for each input."""
    return path.startswith("encoder.") or ".cross_attention.key." in path or ".cross_attention.value." in path


def prefill_flops(backbone: Backbone, length: int) -> int:
    """Operations, two for each multiplication with its addition, from a prompt of so many tokens to its next token's scores.

    The products with kernels, the two of every attention (a causal one has half), and the head for one token. For T5 the
    prompt is the encoder's, and the decoder takes its first token.
    """
    config, t5 = backbone.config, backbone.family == "t5"
    flops = 2 * config.vocabulary_size * backbone.embedding_dim
    for parameter in backbone.plain_parameters():
        if parameter.path.endswith(".kernel"):
            tokens = length if not t5 or _takes_encoder_tokens(parameter.path) else 1
            flops += 2 * parameter.size * tokens
    pairs = length * length + 1 + length if t5 else length * (length + 1) // 2  # the decoder's one token sees itself and all
    return int(flops + 4 * config.num_layers * config.num_heads * config.head_dim * pairs)


# -- measurements ----------------------------------------------------------------------------------------------------------


def generation_seconds(backbone: Backbone, batch: int, length: int, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token after random prompts of this length, and from there to the last; greedy, with no stop token.

    For T5 the prompts are the encoder's inputs, and the decoder starts from token 0.
    """
    ids = np.random.default_rng(0).integers(0, backbone.config.vocabulary_size, (batch, length))
    began = time.perf_counter()
    with backbone.running():
        if backbone.family == "t5":
            prompts = [[0]] * batch
            device_ids, mask = backbone.on_device(ids), backbone.on_device(np.ones(ids.shape, bool))
            cache = backbone.new_cache(device_ids, mask, 1 + new_tokens)
        else:
            prompts = ids.tolist()
            cache = backbone.new_cache(batch, length + new_tokens - 1)
    steps = decode(backbone, cache, prompts, [new_tokens] * batch, frozenset(), [Sampling()] * batch)
    next(steps)
    first = time.perf_counter()
    for _ in steps:
        pass
    return first - began, time.perf_counter() - first


def measure(
    backbone: Backbone, plan: Plan, directory: Path | None, settings: Mapping[str, Any], progress: Progress
) -> dict[str, Any]:
    """Everything in spec/bench.md about this model.

    directory   where the preset is, if it is this model as it is; else one is written for a while
    settings    the accelerator's, of which `threads` is the number with which the limits are measured, too
    progress    is told what is being measured
    """
    plan.check(backbone)
    accelerator, threads = backbone.accelerator, settings.get("threads") or default_threads()
    progress("the first calls")
    for batch in {1, *plan.batches}:  # an accelerator may compile and pack now
        generation_seconds(backbone, batch, 2, 3)
    progress("a process of its own")
    fresh = fresh_process(backbone, plan, directory, settings)
    turns = [("first token", 1), *((kind, batch) for kind in ("prefill", "decode") for batch in plan.batches)]
    found: dict[tuple[str, int], list[float]] = {turn: [] for turn in turns}
    limits: list[Limits] = []
    for i in range(plan.repeats):
        for kind, batch in turns if i % 2 == 0 else turns[::-1]:
            progress(f"round {i + 1} of {plan.repeats}: {kind}, batch {batch}")
            found[kind, batch].append(measured(backbone, plan, kind, batch))
        progress(f"round {i + 1} of {plan.repeats}: the hardware's limits")
        of_device = None if accelerator is None else accelerator.limits()
        limits.append(measured_limits(threads) if of_device is None else Limits(*of_device))
    best, firsts = Limits(*map(max, zip(*limits, strict=True))), found.pop(("first token", 1))
    step, flops = bytes_per_step(backbone), prefill_flops(backbone, plan.prompt_length)
    rates = {"prefill": best.flops_per_second / flops * plan.prompt_length, "decode": best.bytes_per_second / step}
    figures = []
    for (kind, batch), speeds in found.items():
        median, limit = statistics.median(speeds), rates[kind] * (batch if kind == "decode" else 1)
        figures.append(
            {"figure": kind, "batch": batch, "tokens_per_second": median, "least": min(speeds), "most": max(speeds)}
            | {"limit_tokens_per_second": limit, "fraction_of_limit": median / limit}
        )
    return {
        "parameters": backbone.count_params(),
        "weights_bytes": stored_bytes(backbone.parameters(), backbone.variable_dtype),
        "threads": threads,
        "hardware": None if accelerator is None else accelerator.hardware(),
        "machine": description() | {"python": sys.version.split()[0], "numpy": np.__version__},
        **asdict(plan),
        "bytes_per_step": step,
        "flops_per_prompt": flops,
        "limits": best._asdict(),
        "figures": figures,
        "first_token_seconds": statistics.median(firsts),
        "fresh_process": fresh,
    }


def measured(backbone: Backbone, plan: Plan, kind: str, batch: int) -> float:
    """One measurement: tokens a second of `prefill` or `decode`, or seconds to the `first token` after a prompt of one."""
    if kind == "first token":
        return generation_seconds(backbone, batch, 1, 1)[0]
    if kind == "prefill":
        return batch * plan.prompt_length / generation_seconds(backbone, batch, plan.prompt_length, 1)[0]
    return batch * (plan.new_tokens - 1) / generation_seconds(backbone, batch, DECODE_AFTER, plan.new_tokens)[1]


# -- a process of its own --------------------------------------------------------------------------------------------------


def fresh_process(backbone: Backbone, plan: Plan, directory: Path | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `fresh_figures` says in a new process; where that cannot be, `left_out` says why."""
    if shortage := None if directory is not None else _shortage(backbone):
        return {"left_out": shortage}
    accelerator = backbone.accelerator
    with _saved(backbone, directory) as place:
        order = {
            "directory": str(place),
            "dtype": backbone.config.dtype,
            "accelerator": REFERENCE if accelerator is None else accelerator.name,
            "settings": dict(settings),
            "prompt_length": plan.prompt_length,
            "new_tokens": plan.new_tokens,
        }
        command = [sys.executable, "-c", "from refmodels.bench import fresh_main; fresh_main()"]
        done = subprocess.run(
            command, input=json.dumps(order), env=child_environment(), capture_output=True, text=True, check=False
        )
    if done.returncode:
        return {"left_out": last_line(done.stderr)}
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _shortage(backbone: Backbone) -> str | None:
    size, free = stored_bytes(backbone.parameters(), backbone.variable_dtype), shutil.disk_usage(tempfile.gettempdir()).free
    return f"{tempfile.gettempdir()} has no room for a preset of {size / 1e9:.1f} GB" if 2 * size > free else None


@contextmanager
def _saved(backbone: Backbone, directory: Path | None) -> Iterator[Path]:
    """The directory, or a preset that is written for a while."""
    if directory is not None:
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="refmodels-bench-") as root:
        backbone.save_to_preset(Path(root, "preset"))
        yield Path(root, "preset")


def fresh_main() -> None:
    """Read what to measure from standard input, as `fresh_process` wrote it, and print `fresh_figures`."""
    print(json.dumps(fresh_figures(**json.load(sys.stdin))))


def fresh_figures(
    directory: str, dtype: str, accelerator: str, settings: dict[str, Any], prompt_length: int, new_tokens: int
) -> dict[str, Any]:
    """Seconds to load a preset, seconds from there to the first token after one token, and the most bytes in memory: before
    loading, and after one row has been taken in and continued."""
    import refmodels.loading  # what a user's process has imported by then

    found = find(accelerator, **settings)
    before, began = peak_memory(), time.perf_counter()
    backbone = refmodels.loading.load_backbone(Backbone, directory, dtype=dtype, accelerator=found)  # type: ignore[type-abstract]
    loaded = time.perf_counter() - began
    first, _ = generation_seconds(backbone, 1, 1, 1)
    for length, new in ((prompt_length, 1), (DECODE_AFTER, new_tokens)):
        generation_seconds(backbone, 1, length, new)
    return {
        "load_seconds": loaded,
        "first_token_seconds": first,
        "memory_before_bytes": before,
        "peak_memory_bytes": peak_memory(),
    }
