"""How fast the NumPy reference decodes, beside Hugging Face Transformers and the limit of this machine, in one run.

    python benchmarks/decode_speed.py                 # the shape of opt-125m; needs torch and transformers
    python benchmarks/decode_speed.py --no-peer       # without them: the reference and the limit

Both sides have the same random float32 weights, take in the same prompt and decode greedily, one row, with a cache. They take
turns after every few tokens, because a shared machine changes its speed from one second to the next: trust the median of the
ratios of neighbouring blocks before any number of tokens a second. The limit is that of reading every weight once a token, at
the read bandwidth measured between the runs. OMP_NUM_THREADS sets the threads of both sides (default: all cores).
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

from refmodels import OPTBackbone, watching
from refmodels.op import Array, Op
from refmodels.parameters import flatten

THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
"""What NumPy's OpenBLAS takes by itself; the peer and the measured bandwidth are given as many."""

PAUSE = 0.1
"""Seconds between turns: the threads of one library go on spinning for a while after its last product."""


@dataclass
class Run:
    """One decoding: the scores that each token was chosen from, and the speed of every block after the first token."""

    logits: list[Array]
    tokens_per_second: list[float]

    @property
    def tokens(self) -> list[int]:
        return [int(scores.argmax()) for scores in self.logits]

    @property
    def margins(self) -> list[float]:
        """How far the highest score was above the second."""
        return [float(np.ptp(np.partition(scores, -2)[-2:])) for scores in self.logits]


def reference_steps(backbone: OPTBackbone, prompt: Array, new_tokens: int) -> Iterator[Array]:
    """Greedy decoding by refmodels: the scores of one token after another."""
    length = prompt.shape[1]
    cache = backbone.new_cache(1, length + new_tokens)
    logits = backbone.prefill(prompt, np.ones(prompt.shape, bool), np.array([length]), cache, np.zeros(1, np.int64))
    yield logits[0]
    for step in range(new_tokens - 1):
        token = logits.argmax(-1, keepdims=True)
        logits = backbone.decode_step(token, np.ones((1, 1), bool), np.array([length + step]), cache)
        yield logits[0]


def peer_steps(model: Any, prompt: Array, new_tokens: int) -> Iterator[Array]:
    """The same by Transformers: its forward pass in a bare loop, which is faster than its `generate`."""
    import torch

    ids, cache = torch.from_numpy(prompt), None
    for _ in range(new_tokens):
        with torch.inference_mode():
            out = model(ids, past_key_values=cache, use_cache=True)
            ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        yield out.logits[0, -1].numpy()


def decode_in_turns(sides: list[Iterator[Array]], block: int) -> list[Run]:
    """Let the sides decode in turns, `block` tokens at a time, and change who begins from turn to turn."""
    runs = [Run([next(side)], []) for side in sides]
    order = list(zip(runs, sides, strict=True))
    going = True
    while going:
        for run, side in order:
            time.sleep(PAUSE)
            began = time.perf_counter()
            logits = list(islice(side, block))
            if going := len(logits) == block:  # what is left of less than a block is too short to measure
                run.tokens_per_second.append(block / (time.perf_counter() - began))
            run.logits += logits
        order.reverse()
    return runs


def peer_model(backbone: OPTBackbone) -> Any:
    """Transformers' OPTForCausalLM with the weights of this backbone."""
    import torch
    import transformers  # type: ignore[import-not-found,import-untyped,unused-ignore]

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(THREADS)
    config = transformers.OPTConfig(
        vocab_size=backbone.vocabulary_size,
        hidden_size=backbone.hidden_dim,
        word_embed_proj_dim=backbone.hidden_dim,
        num_hidden_layers=backbone.num_layers,
        num_attention_heads=backbone.num_heads,
        ffn_dim=backbone.intermediate_dim,
        max_position_embeddings=backbone.max_sequence_length,
        dropout=0.0,
        dtype="float32",
    )
    model = transformers.OPTForCausalLM(config).eval().float()
    arrays, state = dict(flatten(backbone.params)), {}
    for parameter in backbone.parameters():
        values = arrays[parameter.path]
        if parameter.layout == "offset_rows":
            values = np.concatenate([np.zeros((2, values.shape[1]), values.dtype), values])
        values = values.T if parameter.layout == "transposed" else values
        state[f"model.decoder.{parameter.huggingface[0]}"] = torch.from_numpy(np.array(values, order="C"))
    missing, surplus = model.load_state_dict(state, strict=False)
    if surplus or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"Transformers names its weights otherwise: missing {missing}, surplus {surplus}")
    model.tie_weights()
    return model


def agreement(ours: Run, theirs: Run) -> str:
    """Whether both chose the same tokens; if not, where they part and how close that choice was."""
    pairs = enumerate(zip(ours.tokens, theirs.tokens, strict=True))
    step = next((i for i, (a, b) in pairs if a != b), None)
    if step is None:
        return f"the same {len(ours.tokens)} tokens (the closest choice was won by {min(ours.margins):.2g})"
    return (
        f"tokens differ from step {step} on, where the highest score is above the second by {ours.margins[step]:.2g} here "
        f"and {theirs.margins[step]:.2g} there"
    )


def bandwidth(parts: list[Array]) -> float:
    """Bytes a second that all threads read together: each takes the maximum of its part of a large array.

    A maximum and not a sum, because NumPy's pairwise sum is slower than the memory.
    """
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(np.max, parts))  # start the threads
        began = time.perf_counter()
        list(pool.map(np.max, parts))
        return float(sum(part.nbytes for part in parts)) / (time.perf_counter() - began)


@contextmanager
def timing(seconds: dict[str, float]) -> Iterator[None]:
    """Add up the time of every call of the ops named in `seconds`."""

    def observer(op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Callable[[], Any]) -> Any:
        if op.name not in seconds:
            return proceed()
        began = time.perf_counter()
        result = proceed()
        seconds[op.name] += time.perf_counter() - began
        return result

    with watching(observer):
        yield


def cost_by_position(backbone: OPTBackbone, positions: list[int], repeats: int) -> list[dict[str, float]]:
    """Milliseconds of one decoding step at each position: attention, and everything else."""
    cache = backbone.new_cache(1, max(positions) + 1)
    generator = np.random.default_rng(0)
    for _, array in flatten(cache):  # pages that were never written are read from one page of zeros, which is cheaper
        array[...] = True if array.dtype == bool else generator.standard_normal(array.shape, np.float32)
    costs: dict[int, list[tuple[float, float]]] = {position: [] for position in positions}
    for _ in range(repeats):
        for position in positions:
            seconds = {"attention": 0.0}
            began = time.perf_counter()
            with timing(seconds):
                backbone.decode_step(np.array([[5]]), np.ones((1, 1), bool), np.array([position]), cache)
            total = time.perf_counter() - began
            costs[position].append((seconds["attention"] * 1e3, (total - seconds["attention"]) * 1e3))
    # The fastest of many: a step is short enough to be undisturbed now and then.
    best = {position: [min(part) for part in zip(*pairs, strict=True)] for position, pairs in costs.items()}
    return [{"position": position, "attention_ms": best[position][0], "rest_ms": best[position][1]} for position in positions]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    backbone = OPTBackbone(
        vocabulary_size=arguments.vocabulary,
        num_layers=arguments.layers,
        num_heads=arguments.heads,
        hidden_dim=arguments.hidden,
        intermediate_dim=arguments.intermediate or 4 * arguments.hidden,
        max_sequence_length=arguments.positions,
        seed=0,
    )
    if arguments.prompt + arguments.new > arguments.positions:
        raise ValueError(f"--prompt and --new together are more than --positions {arguments.positions}")
    if arguments.new <= arguments.block:
        raise ValueError(f"--new must be more than --block, got {arguments.new} and {arguments.block}")
    prompt = np.random.default_rng(1).integers(0, arguments.vocabulary, (1, arguments.prompt))
    weight_bytes = sum(array.nbytes for path, array in flatten(backbone.params) if path != "position_embedding.embeddings")
    peer = None if arguments.no_peer else peer_model(backbone)
    parts = np.array_split(np.ones(weight_bytes // 4, np.float32), THREADS)
    runs: list[list[Run]] = []
    limits: list[float] = []
    for i in range(1 + arguments.repeats):
        sides = [reference_steps(backbone, prompt, arguments.new)]
        if peer is not None:
            sides.append(peer_steps(peer, prompt, arguments.new))
        if i == 0:  # warm up
            for side in sides:
                list(islice(side, 3))
            continue
        runs.append(decode_in_turns(sides, arguments.block))
        limits.append(bandwidth(parts))
        print(f"run {i} of {arguments.repeats}", file=sys.stderr)
    speeds = [[speed for run in side for speed in run.tokens_per_second] for side in zip(*runs, strict=True)]
    last = arguments.positions - 1
    result: dict[str, Any] = {
        "parameters": backbone.count_params(),
        "weight_bytes": weight_bytes,
        "threads": THREADS,
        "reference_tokens_per_second": speeds[0],
        "bytes_per_second": limits,
        "limit_tokens_per_second": max(limits) / weight_bytes,
        "by_position": cost_by_position(backbone, [min(10, last), min(2000, last)], 40),
    }
    if peer is not None:
        import torch
        import transformers

        ratios = [ours / theirs for ours, theirs in zip(*speeds, strict=True)]
        result |= {
            "peer": f"transformers {transformers.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads",
            "peer_tokens_per_second": speeds[1],
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "agreement": agreement(*runs[0]),
        }
    return result


def report(result: dict[str, Any]) -> None:
    speeds = result["reference_tokens_per_second"]
    speed = statistics.median(speeds)
    print(f"model         {result['parameters']:,} parameters, {result['weight_bytes'] / 1e6:,.0f} MB read for each token")
    print(f"machine       {result['threads']} threads read {max(result['bytes_per_second']) / 1e9:.1f} GB/s at best")
    limit = result["limit_tokens_per_second"]
    print(f"limit         {limit:6.1f} tokens/s, if a token costs no more than reading the weights")
    print(f"reference     {speed:6.1f} tokens/s, median of {_spread(speeds)}; {speed / limit:.0%} of it")
    if "peer" in result:
        speeds = result["peer_tokens_per_second"]
        print(f"peer          {statistics.median(speeds):6.1f} tokens/s, median of {_spread(speeds)} ({result['peer']})")
        print(f"ratio         {result['ratio']:6.2f}, median of {_spread(result['ratios'], 2)}")
        print(f"agreement     {result['agreement']}")
    for row in result["by_position"]:
        print(f"position {row['position']:<4} attention {row['attention_ms']:6.2f} ms, the rest {row['rest_ms']:6.2f} ms")


def _spread(values: list[float], digits: int = 1) -> str:
    return f"{len(values)} blocks from {min(values):.{digits}f} to {max(values):.{digits}f}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Decoding speed of the NumPy reference beside Transformers (float32).")
    for name, default, what in (
        ("layers", 12, "decoder layers"),
        ("heads", 12, "attention heads"),
        ("hidden", 768, "hidden size"),
        ("intermediate", 0, "size inside the feed-forward layers (default: 4 times the hidden size)"),
        ("vocabulary", 50272, "vocabulary size"),
        ("positions", 2048, "size of the table of positions"),
        ("prompt", 32, "tokens of the prompt"),
        ("new", 64, "tokens to decode"),
        ("block", 7, "tokens that one side decodes before it is the other's turn"),
        ("repeats", 5, "runs"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: {default})")
    parser.add_argument("--no-peer", action="store_true", help="leave Transformers out")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    try:
        result = measure(arguments)
    except ImportError as error:
        print(f"decode_speed: error: {error}; pip install 'refmodels[peers]', or use --no-peer", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"decode_speed: error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        report(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
