"""The step of decoding as one captured graph for each cache, and several steps that are played one after the other.

What changes from step to step stands on the device: the tokens that come in, their positions, how many keys each row has, which
step of several it is. A graph reads and writes them, so that nothing is allocated between two steps and nobody is waited for.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from refmodels.bloom import bloom_decode_step
from refmodels.op import Params
from refmodels.ops.precision import compute_dtype
from refmodels.opt import opt_decode_step
from refmodels.t5 import t5_decode_step
from refmodels_cupy import bloom, opt, t5
from refmodels_cupy.blocks import Block, Places, refused
from refmodels_cupy.cache import enter, filled
from refmodels_cupy.device import Device, Launch
from refmodels_cupy.linear import MOST
from refmodels_cupy.recorder import Recorder
from refmodels_cupy.sampling import greedy, sample, scratch

if TYPE_CHECKING:
    from refmodels_cupy.accelerator import Cupy

AHEAD = 16
"""Tokens that may be chosen before the host looks at them."""

SETTINGS = {"temperature": np.float64, "top_k": np.int64, "top_p": np.float64, "min_p": np.float64}
"""What a draw is told of each row, in the types that the kernels read."""

FORMS = [("advance.cu", "advance")]

THREADS = (128, 1, 1)

Scores = Callable[[Block, Any, Any, Params, Any, Params, Places], Any]
"""Of a family: the scores [b, v] after one token of each row, from its block, ids and positions (int32), parameters,
configuration, cache and places."""


class Graph:
    """One step of one cache, captured. `choice`: names of what chooses the next tokens; None: the scores are the result.

    ids, positions   int32 (b,), of the tokens that come in
    real             (b,), whether they are; without choice
    step             int32 (1,), counts the steps that choose, up to AHEAD
    remaining        int32 (b,), steps after which a row stays where it is
    uniform          float64 (AHEAD, b), a number for each draw; settings (b,) as in SETTINGS
    scores, tokens   results: (b, v), and int64 (b, AHEAD)
    """

    def __init__(
        self, device: Device, scores: Scores, params: Params, cache: Params, config: Any, choice: tuple[str, ...] | None
    ) -> None:
        self.read = (params, *_arrays(cache))
        mask = cache["padding_mask"]
        batch, capacity = mask.shape
        recorder = Recorder(device)
        self.ids, self.positions, lengths = (device.empty((batch,), np.int32) for _ in range(3))
        self.real: Any = device.empty((batch,), np.bool_) if choice is None else None
        enter(recorder, self.real, self.positions, mask, lengths)
        how = {"causal": True, "key_mask": mask, "positions": self.positions[:, None], "lengths": lengths}
        block, places = Block(recorder, compute_dtype(config.dtype), batch, 1), Places(capacity, how, self.positions)
        self.scores = scores(block, self.ids, self.positions, params, config, cache, places)
        if choice is not None:
            self._choose(recorder, choice, batch)
        self.play = device.captured(recorder.launches)

    def _choose(self, recorder: Recorder, choice: tuple[str, ...], batch: int) -> None:
        """The next tokens by the scores, which come in at the next step."""
        chosen, self.tokens = (recorder.empty(shape, np.int64) for shape in ((batch,), (batch, AHEAD)))
        self.step, self.remaining = recorder.empty((1,), np.int32), recorder.empty((batch,), np.int32)
        if choice:
            self.uniform = recorder.empty((AHEAD, batch), np.float64)
            self.settings = {name: recorder.empty((batch,), SETTINGS[name]) for name in choice if name in SETTINGS}
            temperature, top_k, top_p, min_p = (self.settings.get(name) for name in SETTINGS)
            memory = scratch(recorder, *self.scores.shape)
            sample(recorder, self.scores, self.uniform, self.step, temperature, top_k, top_p, min_p, chosen, memory)
        else:
            greedy(recorder, self.scores, chosen)
        arguments = (chosen, self.ids, self.positions, self.remaining, self.step, self.tokens, np.int32(batch), np.int32(AHEAD))
        recorder.launch(Launch("advance.cu", "advance", (1, 1, 1), THREADS, arguments))


class Decoding:
    """The decode step of one family on one device."""

    def __init__(self, device: Device, scores: Scores) -> None:
        self.device, self._scores = device, scores

    def fits(self, token_ids: Any, padding_mask: Any, positions: Any, params: Params, cache: Params, config: Any) -> bool | str:
        """up to 64 rows, loaded parameters, no adapters, not float64"""
        rows = len(token_ids)
        if rows > MOST:
            return f"{rows} rows: more than one graph is for"
        if rows != len(cache["padding_mask"]):
            return f"{rows} rows for a cache of {len(cache['padding_mask'])}"
        return refused(params, config, (rows, 1), caches=[*cache["layers"], *cache.get("encoded", ())]) or True

    def step(self, token_ids: Any, padding_mask: Any, positions: Any, params: Params, cache: Params, config: Any) -> Any:
        """The scores (b, v) of what comes after the tokens (b, 1) at positions (b,)."""
        filled(self.device, positions, 1, cache["padding_mask"].shape[1])
        graph = self._graph(params, cache, config, None)
        graph.ids[...], graph.positions[...], graph.real[...] = token_ids[:, 0], positions, padding_mask[:, 0]
        graph.play()
        return graph.scores.copy()  # the next step writes there

    def tokens(
        self,
        token_ids: Any,
        positions: Any,
        remaining: Any,
        params: Params,
        cache: Params,
        config: Any,
        *,
        count: int,
        uniform: Any = None,
        **settings: Any,
    ) -> Any:
        """`Accelerator.decode_tokens`: (b, count), as the device has them when it comes to it. None where `fits` declines."""
        if count > AHEAD or self.fits(token_ids, None, positions, params, cache, config) is not True:
            return None
        given = {name: value for name, value in settings.items() if value is not None}
        last = positions + self.device.xp.minimum(remaining, count - 1)
        filled(self.device, last, 1, cache["padding_mask"].shape[1])
        choice = () if uniform is None else ("uniform", *given)
        graph = self._graph(params, cache, config, choice)
        graph.ids[...], graph.positions[...], graph.remaining[...], graph.step[...] = token_ids, positions, remaining, 0
        if uniform is not None:
            graph.uniform[:count] = uniform
            for name, value in given.items():
                graph.settings[name][...] = value
        for _ in range(count):
            graph.play()
        return graph.tokens[:, :count].copy()

    def _graph(self, params: Params, cache: Params, config: Any, choice: tuple[str, ...] | None) -> Graph:
        """The graph of this cache: kept in it, so that it goes with it, and made anew for other parameters or arrays."""
        graphs = cache.setdefault("_graphs", {})
        graph, read = graphs.get(choice), (params, *_arrays(cache))
        if graph is None or len(graph.read) != len(read) or any(a is not b for a, b in zip(graph.read, read, strict=True)):
            graph = graphs[choice] = Graph(self.device, self._scores, params, cache, config, choice)
        return graph


def _arrays(cache: Params) -> Iterator[Any]:
    """Every array of a cache, in one order."""
    for name, part in cache.items():
        if name.startswith("_"):
            continue
        if isinstance(part, list):
            for layer in part:
                yield from layer.values()
        else:
            yield part


def register(accelerator: "Cupy", device: Device) -> None:
    """Kernels for the decode steps of the three families."""
    for step, scores in ((opt_decode_step, opt.scores), (bloom_decode_step, bloom.scores), (t5_decode_step, t5.scores)):
        decoding = accelerator.decoding[step] = Decoding(device, scores)
        accelerator.kernel(step, when=decoding.fits)(decoding.step)
