"""One system that `refmodels bench --peers` measures, in a process of its own: refmodels on an accelerator, or Transformers.

Each holds a model with random weights, of the same shape for all, and answers how many seconds a piece of work took. A process
that fails takes nobody with it, and no library's settings reach another.
"""

import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import numpy as np

from refmodels.accelerator import Accelerator, find
from refmodels.backbone import Backbone
from refmodels.bench import generation_seconds
from refmodels.op import Array, Params
from refmodels.ops.precision import numpy_dtype
from refmodels.parameters import Initializer, Parameter, build_tree, normal
from refmodels.weights.huggingface import TOKEN_IDS, configuration

BLOCK = 2**22
"""Random numbers that are drawn; all weights are repetitions of them."""

INTEGERS = normal(20.0)
"""How int8 weights are drawn: far from the ends of their range."""


class Work(NamedTuple):
    """What is timed: `generate` takes in prompts and gives so many new tokens, `encode` runs T5's encoder alone."""

    kind: str
    batch: int
    length: int
    new_tokens: int = 0


class System(Protocol):
    """What a process answers for."""

    def seconds(self, work: Work) -> float: ...
    def limits(self) -> tuple[float, float]: ...
    def about(self) -> dict[str, str]: ...


@dataclass(frozen=True)
class Job:
    """A system in one type, with the shape of a preset.

    system   `refmodels`, `transformers` (eager) or `transformers, compiled` (static cache, torch.compile)
    preset   a built-in name or a directory; no weight of it is read
    dtype    `bfloat16`, or of refmodels `int8_from_bfloat16`
    where    refmodels' accelerator, or torch's device
    """

    system: str
    preset: str
    dtype: str
    where: str

    def made(self) -> System:
        """The system, its weights on the device."""
        shape: Backbone = Backbone.from_preset(self.preset, load_weights=False, dtype=self.dtype)
        if self.system == "refmodels":
            return Refmodels(shape, find(self.where))
        return Transformers(shape, self.where, compiled=self.system.endswith("compiled"))


# -- refmodels ---------------------------------------------------------------------------------------------------------------


class Refmodels:
    """This project's model of this shape, on an accelerator."""

    def __init__(self, shape: Backbone, accelerator: Accelerator | None) -> None:
        self.model = type(shape).from_config(shape.get_config() | {"accelerator": accelerator})
        self.model.adopt(drawn_quickly(shape))

    def seconds(self, work: Work) -> float:
        """Until the last token is on the host, or the encoder's output on the device."""
        if work.kind == "generate":
            return sum(generation_seconds(self.model, work.batch, work.length, work.new_tokens))
        from refmodels.t5 import t5_encoder

        model = self.model
        with model.running():
            ids = model.on_device(np.full((work.batch, work.length), 7))
            mask = model.on_device(np.ones((work.batch, work.length), bool))
            began = time.perf_counter()
            encoded = t5_encoder(ids, mask, model.device_params, model.config)
            model.on_host(encoded[:1, -1:])  # a few numbers, which are there when all are
            return time.perf_counter() - began

    def limits(self) -> tuple[float, float]:
        """Of the accelerator's hardware, in the middle of the run."""
        found = None if self.model.accelerator is None else self.model.accelerator.limits()
        if found is None:
            raise RuntimeError("the reference runs on no hardware of its own")
        return found

    def about(self) -> dict[str, str]:
        """The hardware, and versions."""
        accelerator = self.model.accelerator
        return versions("refmodels", "numpy") | ((accelerator and accelerator.hardware()) or {})


def drawn_quickly(shape: Backbone) -> Params:
    """Random parameters for a model of billions, in seconds: one block of numbers over and over, the same in every layer.

    Layers share arrays, which are read-only for that. On a device each has memory of its own.
    """
    noise = np.random.default_rng(0).standard_normal(BLOCK, np.float32)

    @cache
    def drawn(dims: tuple[int, ...], target: np.dtype[Any], initializer: Initializer) -> Array:
        if initializer.kind in ("zeros", "ones"):
            values = initializer.draw(dims, np.random.default_rng()).astype(target)
        else:
            values = np.resize((noise * np.float32(initializer.scale)).astype(target), dims)
        values.flags.writeable = False
        return values

    def leaf(parameter: Parameter) -> Array:
        initializer, target = parameter.initializer, numpy_dtype(parameter.dtype or shape.variable_dtype)
        if target == np.int8:
            initializer = INTEGERS
        if parameter.path.endswith("_scale"):  # an integer stands for itself over this: weights like those of the other types
            return np.full(parameter.shape, 2000, target)
        return drawn(parameter.shape, target, initializer)

    return build_tree(shape.parameters(), leaf)


# -- Transformers ------------------------------------------------------------------------------------------------------------


class Transformers:
    """Transformers' model of this shape: eager, or decoding with a static cache, and T5's encoder, through torch.compile."""

    def __init__(self, shape: Backbone, device: str, *, compiled: bool) -> None:
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        self.torch, self.device, self.compiled = torch, device, compiled
        family = shape.family
        config = configuration(family, shape.get_config(), shape.compute_dtype, TOKEN_IDS[family])
        auto = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForCausalLM
        torch.manual_seed(0)
        with torch.device(device):  # drawn there, where billions take seconds
            made = transformers.AutoConfig.for_model(**config)
            self.model = auto.from_config(made, dtype=getattr(torch, shape.compute_dtype)).eval()
        settings = self.model.generation_config
        settings.eos_token_id = None
        settings.do_sample = False
        settings.disable_compile = not compiled
        if compiled:
            settings.cache_implementation = "static"
            settings.compile_config = transformers.CompileConfig()
            settings.compile_config._compile_all_devices = True  # by itself it compiles for GPUs alone
        self.encoder: Callable[..., Any] | None = self.model.get_encoder() if family == "t5" else None
        if compiled and self.encoder is not None:
            self.encoder = torch.compile(self.encoder, mode="reduce-overhead")

    def seconds(self, work: Work) -> float:
        """Until all work on the device is done."""
        torch = self.torch
        ids = torch.full((work.batch, work.length), 7, device=self.device)
        mask = torch.ones_like(ids)
        self._wait()
        began = time.perf_counter()
        with torch.no_grad():  # its static caches cannot be made in inference mode
            if work.kind == "encode":
                assert self.encoder is not None
                self.encoder(input_ids=ids, attention_mask=mask)
            else:
                self.model.generate(ids, attention_mask=mask, max_new_tokens=work.new_tokens)
        self._wait()
        seconds = time.perf_counter() - began
        if self.compiled and work.kind == "generate" and work.new_tokens > 1 and not hasattr(self.model, "_compiled_call"):
            raise RuntimeError("Transformers has compiled nothing")
        return seconds

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            self.torch.cuda.synchronize()

    def limits(self) -> tuple[float, float]:
        """Not this one's to say."""
        raise NotImplementedError

    def about(self) -> dict[str, str]:
        """Versions."""
        return versions("torch", "transformers", "triton")


def versions(*names: str) -> dict[str, str]:
    """The versions of these distributions, of those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# -- the process -------------------------------------------------------------------------------------------------------------


def serve(connection: Connection, job: Job) -> None:
    """Make the system and tell about it; then answer each (method, arguments) by ("done", result) or ("failed", reason)."""
    os.dup2(2, 1)  # what libraries print is no result of the command
    system: System | None = None
    request: tuple[str, tuple[Any, ...]] | None = ("about", ())
    while request is not None:
        method, arguments = request
        try:
            system = system or job.made()
            connection.send(("done", getattr(system, method)(*arguments)))
        except Exception as error:
            if os.environ.get("REFMODELS_DEBUG") == "1":
                traceback.print_exc()
            connection.send(("failed", " ".join(f"{type(error).__name__}: {error}".split())))
        try:
            request = connection.recv()
        except EOFError:
            return
