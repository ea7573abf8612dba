"""One system with one model, in a process of its own: `peers.py` starts it and asks by JSON lines, one answer for each.

It runs in the Python of that system's environment, so it imports nothing of this project but for the system `refmodels`, and
what a system needs is imported in its class. Every system generates greedily, and nothing stops before the last token.
"""

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

Generated = tuple[list[list[int]], float, float]
"""The new tokens of every row, the seconds to the first of them, and the seconds from there to the last."""


class System:
    """A library that runs the models: `prepare` once (in a process that ends with it), then `load`, then `generate`."""

    packages: tuple[str, ...] = ()
    """Distributions that a user installs; `installed_bytes` counts them and what they need."""

    model: Any

    def __init__(self, job: dict[str, Any]) -> None:
        """`job`: family (t5, opt, bloom), dtype, threads, hf and keras (directories of the model), place (own directory)."""
        self.job, self.t5, self.dtype = job, job["family"] == "t5", job["dtype"]
        self.place = Path(job["place"])

    def prepare(self) -> None:
        """Convert the model into `self.place`, if this system needs that."""

    def load(self) -> None:
        """Make ready to generate."""
        raise NotImplementedError

    def generate(self, ids: list[list[int]], new_tokens: int) -> Generated:
        """Continue these rows, which are of one length, greedily."""
        raise NotImplementedError


class Refmodels(System):
    """This project; job: accelerator."""

    packages = ("refmodels",)

    def prepare(self) -> None:
        if self.dtype.startswith("int"):
            from refmodels import Backbone

            backbone = Backbone.from_preset(self.job["hf"])
            backbone.quantize(self.dtype)
            backbone.save_to_preset(self.place)

    def load(self) -> None:
        from refmodels import Backbone
        from refmodels.accelerator import find, installed

        name = self.job["accelerator"]
        quantised = self.dtype.startswith("int")
        self.model = Backbone.from_preset(
            str(self.place) if quantised else self.job["hf"],
            accelerator=find(name),  # OMP_NUM_THREADS is set, which every accelerator respects
            dtype="float32" if quantised else self.dtype,
        )
        distribution = getattr(installed().get(name), "dist", None)
        self.packages = ("refmodels", *([distribution.name] if distribution else []))

    def generate(self, ids: list[list[int]], new_tokens: int) -> Generated:
        import numpy as np

        from refmodels.generate import Sampling, decode

        model, batch, clock = self.model, len(ids), [time.perf_counter()]
        if self.t5:
            array, prompts = np.array(ids), [[0]] * batch
            with model.running():
                inputs = model.on_device(array), model.on_device(np.ones(array.shape, bool))
                cache = model.new_cache(*inputs, 1 + new_tokens)
        else:
            prompts = ids
            with model.running():
                cache = model.new_cache(batch, len(ids[0]) + new_tokens - 1)
        steps = []
        for step in decode(model, cache, prompts, [new_tokens] * batch, frozenset(), [Sampling()] * batch):
            steps.append(step)
            clock.append(time.perf_counter())
        return [list(row) for row in zip(*steps, strict=True)], clock[1] - clock[0], clock[-1] - clock[1]


class Transformers(System):
    """Eager PyTorch; int8 is torch's dynamic quantisation of the linear layers."""

    packages = ("torch", "transformers")

    def load(self) -> None:
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        torch.set_num_threads(self.job["threads"])
        auto = transformers.AutoModelForSeq2SeqLM if self.t5 else transformers.AutoModelForCausalLM
        kind = torch.bfloat16 if self.dtype == "bfloat16" else torch.float32
        self.model = auto.from_pretrained(self.job["hf"], dtype=kind).eval()
        if self.dtype == "int8":
            self.model = torch.ao.quantization.quantize_dynamic(self.model, {torch.nn.Linear}, dtype=torch.qint8)

    def generate(self, ids: list[list[int]], new_tokens: int) -> Generated:
        return hugging_face_generate(self.model, ids, new_tokens, skip=1 if self.t5 else len(ids[0]))


def hugging_face_generate(model: Any, ids: list[list[int]], new_tokens: int, skip: int) -> Generated:
    """`generate` of Transformers, timed token by token; the first `skip` tokens of a row are not new."""
    import torch
    import transformers

    clock = []

    class Clock(transformers.StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            clock.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    model.generation_config.eos_token_id = None
    inputs = torch.tensor(ids)
    began = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=transformers.StoppingCriteriaList([Clock()]),
        )
    return out[:, skip:].tolist(), clock[0] - began, clock[-1] - clock[0]


class OpenVINO(System):
    """Through optimum-intel; int8 and int4 are weights."""

    packages = ("optimum-intel", "openvino", "openvino-tokenizers", "nncf")

    @property
    def model_class(self) -> Any:
        from optimum.intel import OVModelForCausalLM, OVModelForSeq2SeqLM

        return OVModelForSeq2SeqLM if self.t5 else OVModelForCausalLM

    def prepare(self) -> None:
        from optimum.intel import OVWeightQuantizationConfig

        bits = {"int8": 8, "int4": 4}.get(self.dtype)
        how = {"load_in_8bit": False} if bits is None else {"quantization_config": OVWeightQuantizationConfig(bits=bits)}
        self.model_class.from_pretrained(self.job["hf"], export=True, compile=False, **how).save_pretrained(self.place)

    def load(self) -> None:
        import openvino

        if self.dtype == "bfloat16":
            able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
            if "BF16" not in able:
                raise RuntimeError("this processor has no bfloat16 for OpenVINO")
        precision = "bf16" if self.dtype == "bfloat16" else "f32"
        settings = {"INFERENCE_NUM_THREADS": str(self.job["threads"]), "INFERENCE_PRECISION_HINT": precision}
        if self.dtype == "float32":
            settings["KV_CACHE_PRECISION"] = "f32"  # by default 8 bits
        self.model = self.model_class.from_pretrained(self.place, ov_config=settings)
        self.model.compile()

    def generate(self, ids: list[list[int]], new_tokens: int) -> Generated:
        return hugging_face_generate(self.model, ids, new_tokens, skip=1 if self.t5 else len(ids[0]))


class StandInTokenizer:
    """What CTranslate2's converter asks of a tokenizer: a name for each id."""

    pad_token, bos_token, eos_token, unk_token = "0", "2", "1", "3"
    special_tokens_map: dict[str, str] = {}

    def __init__(self, size: int) -> None:
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(self.size)}

    def convert_ids_to_tokens(self, id: int) -> str:
        return str(id)


class CTranslate2(System):
    """Converted once, int8 with quantised inputs."""

    packages = ("ctranslate2",)

    def prepare(self) -> None:
        from ctranslate2.converters import TransformersConverter

        class Converter(TransformersConverter):
            def load_tokenizer(self, tokenizer_class: Any, directory: str, **kwargs: Any) -> StandInTokenizer:
                config = json.loads(Path(directory, "config.json").read_text())
                return StandInTokenizer(config["vocab_size"])

        Converter(self.job["hf"]).convert(str(self.place), quantization=self.dtype, force=True)

    def load(self) -> None:
        import ctranslate2

        kind = ctranslate2.Translator if self.t5 else ctranslate2.Generator
        options = {"inter_threads": 1, "intra_threads": self.job["threads"], "compute_type": self.dtype}
        self.model = kind(str(self.place), device="cpu", **options)

    def generate(self, ids: list[list[int]], new_tokens: int) -> Generated:
        tokens, clock = [[str(i) for i in row] for row in ids], []

        def callback(result: Any) -> bool:
            clock.append((result.step, time.perf_counter()))
            return False

        began = time.perf_counter()
        if self.t5:
            lengths = {"max_decoding_length": new_tokens, "min_decoding_length": new_tokens}
            found = self.model.translate_batch(tokens, beam_size=1, callback=callback, max_input_length=0, **lengths)
            rows = [[int(token) for token in result.hypotheses[0]] for result in found]
        else:
            lengths = {"max_length": new_tokens, "min_length": new_tokens}
            found = self.model.generate_batch(tokens, beam_size=1, callback=callback, include_prompt_in_result=False, **lengths)
            rows = [result.sequences_ids[0] for result in found]
        first = min(seconds for _, seconds in clock)
        return rows, first - began, max(seconds for _, seconds in clock) - first


class KerasHub(System):
    """On JAX; KERAS_BACKEND chooses another. The whole of `generate` is one call, so decoding is the difference of two."""

    packages = ("keras-hub", "jax")

    def load(self) -> None:
        os.environ.setdefault("KERAS_BACKEND", "jax")
        import keras_hub

        name = {"t5": "T5Seq2SeqLM", "opt": "OPTCausalLM", "bloom": "BloomCausalLM"}[self.job["family"]]
        self.model = getattr(keras_hub.models, name).from_preset(self.job["keras"], preprocessor=None, dtype=self.dtype)
        self.model.compile(sampler="greedy")

    def generate(self, ids: list[list[int]], new_tokens: int) -> Generated:
        _, first = self.run(ids, 1)
        if new_tokens == 1:
            return [], first, 0.0
        rows, whole = self.run(ids, new_tokens)
        return rows, first, whole - first

    def run(self, ids: list[list[int]], new_tokens: int) -> tuple[list[list[int]], float]:
        """The new tokens, and the seconds of all."""
        import numpy as np

        def padded(rows: list[list[int]], length: int) -> tuple[Any, Any]:
            array, mask = np.zeros((len(rows), length), "int32"), np.zeros((len(rows), length), "int32")
            array[:, : len(rows[0])], mask[:, : len(rows[0])] = rows, 1
            return array, mask

        start = 1 if self.t5 else len(ids[0])
        if self.t5:
            encoder, decoder = padded(ids, len(ids[0])), padded([[0]] * len(ids), 1 + new_tokens)
            inputs = {"encoder_token_ids": encoder[0], "encoder_padding_mask": encoder[1]}
            inputs |= {"decoder_token_ids": decoder[0], "decoder_padding_mask": decoder[1]}
        else:
            inputs = dict(zip(("token_ids", "padding_mask"), padded(ids, start + new_tokens), strict=True))
        began = time.perf_counter()
        out = self.model.generate(inputs, stop_token_ids=None)
        seconds = time.perf_counter() - began
        tokens = out["decoder_token_ids" if self.t5 else "token_ids"]
        return np.asarray(tokens)[:, start:].tolist(), seconds


SYSTEMS: dict[str, type[System]] = {
    "refmodels": Refmodels,
    "transformers": Transformers,
    "kerashub": KerasHub,
    "ctranslate2": CTranslate2,
    "openvino": OpenVINO,
}


# -- about this process ----------------------------------------------------------------------------------------------------


def peak_memory() -> int | None:
    """The most bytes that this process has had in memory; None where the system does not say."""
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024


def distributions(names: Iterable[str]) -> dict[str, metadata.Distribution]:
    """The distributions of these names and all that they need, by name."""
    from pip._vendor.packaging.requirements import Requirement

    found: dict[str, metadata.Distribution] = {}
    left = list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        for line in found[name].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(requirement.name)
    return found


def installed_bytes(names: Iterable[str]) -> int:
    """Bytes on disk of these distributions and all that they need."""
    files = {file.locate() for found in distributions(names).values() for file in found.files or ()}
    return sum(Path(file).stat().st_size for file in files if Path(file).is_file())


def versions(names: Iterable[str]) -> dict[str, str]:
    """The versions of these distributions."""
    return {name: found.version for name, found in distributions(names).items() if name in names}


# -- the conversation ------------------------------------------------------------------------------------------------------


def answer(system: System, request: dict[str, Any]) -> dict[str, Any]:
    """What `peers.py` is told about this request."""
    kind = request["do"]
    if kind == "prepare":
        system.prepare()
        return {}
    if kind == "load":
        system.load()
        return {}
    if kind == "generate":
        rows, first, rest = system.generate(request["ids"], request["new_tokens"])
        return {"tokens": rows, "first": first, "rest": rest}
    return {
        "peak_memory": peak_memory(),
        "installed": installed_bytes(system.packages),
        "versions": versions(system.packages),
    }


def main() -> None:
    """Answer requests until there are no more. The job comes first."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    job = json.loads(sys.stdin.readline())
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["threads"]])
    system = SYSTEMS[job["system"]](job)
    for line in sys.stdin:
        try:
            reply = answer(system, json.loads(line))
        except Exception as error:
            traceback.print_exc()
            reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        print(json.dumps(reply), file=out, flush=True)


if __name__ == "__main__":
    main()
