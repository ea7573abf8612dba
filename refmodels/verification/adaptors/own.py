"""Our own models as candidates: to verify an accelerator layer by layer, and to see what a fault would do.

verify(OwnCandidate(model, "numba"), model)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

import refmodels.accelerator
from refmodels.accelerator import Accelerator
from refmodels.backbone import Backbone
from refmodels.generate import Sampling, decode
from refmodels.op import Array, Op, executing, watching
from refmodels.trace import QUIET, Namer
from refmodels.verification.candidate import Candidate

Observer = Callable[[Op[..., Any], tuple[Any, ...], dict[str, Any], Callable[[], Any]], Any]


class OwnCandidate(Candidate):
    """A model of ours on an accelerator; without one on its own or on the reference.

    Steps inside a kernel that does a whole layer are not seen. `observer` is called in place of every op, as by
    `refmodels.op.watching`, and may change what it gives: so a fault is planted.
    No step is injected unless it is asked for: what the errors of the steps add up to is what they add up to in use. Any step
    may be.
    """

    def __init__(
        self, model: Backbone, accelerator: Accelerator | str | None = None, *, observer: Observer | None = None
    ) -> None:
        self.model = model
        self.accelerator = refmodels.accelerator.find(accelerator) or model.accelerator
        self.observer = observer
        self.name = f"{model.name} on {self.accelerator.name}" if self.accelerator else model.name
        self.dtype = model.compute_dtype

    def run(self, inputs: Mapping[str, Array], inject: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        model, found, given = self.model, dict[str, Array](), inject or {}
        with self._running():
            namer = Namer(model.device_params)

            def recorded(op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Callable[[], Any]) -> Any:
                with namer.call(op, args, kwargs) as name:
                    result = proceed()
                if op.name in QUIET or isinstance(result, dict | list | tuple | int | float):
                    return result
                found[name] = np.array(model.on_host(result))
                return model.on_device(given[name].astype(found[name].dtype)) if name in given else result

            arrays = {name: model.on_device(array) for name, array in model.checked(inputs).items()}
            with watching(recorded), self._observed():
                hidden = model.forward(arrays, None)
                model.logits(hidden["decoder_sequence_output"] if isinstance(hidden, dict) else hidden)
        return found

    def chunked(self, inputs: Mapping[str, Array], sizes: Sequence[int]) -> Array | None:
        model, arrays, side = self.model, self.model.checked(inputs), self._side
        ids, mask = arrays[f"{side}token_ids"], arrays[f"{side}padding_mask"]
        (rows, length), begin, parts = ids.shape, 0, []
        if sum(sizes) != length or min(sizes, default=1) < 1:
            raise ValueError(f"sizes {list(sizes)} of the chunks must be positive and add up to the length {length}")
        with self._running(), self._observed():
            cache = self._cache(arrays, rows, length)
            for size in sizes:
                place, start = slice(begin, begin + size), np.full(rows, begin)
                new = [model.on_device(array) for array in (ids[:, place], mask[:, place], start)]
                hidden = model.hidden_states(*new, cache)
                parts.append(np.array(model.on_host(model.logits(hidden))))
                begin += size
        return np.concatenate(parts, 1)

    def generate(self, inputs: Mapping[str, Array], count: int) -> Array | None:
        model, arrays, side = self.model, self.model.checked(inputs), self._side
        ids, mask = arrays[f"{side}token_ids"], arrays[f"{side}padding_mask"]
        prompts = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
        with self._running(), self._observed():
            cache = self._cache(arrays, len(ids), max(map(len, prompts)) + count)
            rows = [Sampling(sampler="greedy")] * len(prompts)
            steps = list(decode(model, cache, prompts, [count] * len(prompts), frozenset(), rows))
        return np.array(steps, np.int64).reshape(count, len(prompts)).T

    @property
    def _side(self) -> str:
        return "decoder_" if self.model.family == "t5" else ""

    def _cache(self, arrays: Mapping[str, Array], rows: int, capacity: int) -> Any:
        if self.model.family == "t5":
            before = [self.model.on_device(arrays[name]) for name in ("encoder_token_ids", "encoder_padding_mask")]
            return self.model.new_cache(*before, capacity)
        return self.model.new_cache(rows, capacity)

    @contextmanager
    def _running(self) -> Iterator[None]:
        if self.accelerator is None:
            yield
        else:
            with executing(self.accelerator):
                yield

    @contextmanager
    def _observed(self) -> Iterator[None]:
        if self.observer is None:
            yield
        else:
            with watching(self.observer):
                yield
