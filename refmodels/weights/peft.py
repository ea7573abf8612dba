"""PEFT adapters: `adapter_config.json` and the names of the tensors in `adapter_model.safetensors` or `.bin`.

Only small functions of plain values, like `huggingface` for checkpoints. A *module* is a layer by its Hugging Face name in the
model that was adapted: `model.decoder.layers.0.self_attn.q_proj`.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmodels.files import CheckpointError, field
from refmodels.parameters import Parameter

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
WRAPPER = "base_model.model."
"""What PEFT puts in front of every name."""

_REFUSED = {
    "use_dora": "DoRA adapters",
    "modules_to_save": "whole modules beside the adapters",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "adapters of bare parameters",
    "layer_replication": "replicated layers",
    "lora_bias": "a bias inside an adapter",
    "use_qalora": "QALoRA adapters",
    "use_bdlora": "block-diagonal adapters",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "monteclora_config": "MonteCLoRA adapters",
    "kasa_config": "KaSA adapters",
}
"""Field that must be absent, null, false or empty -> what it asks for."""

_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` beside true and false that leave the weights of the base model as they are."""


@dataclass(frozen=True)
class PeftConfig:
    """What an `adapter_config.json` says, checked.

    ranks       the ranks that an adapter may have
    alpha       the usual alpha; `alphas` for modules whose name a pattern matches, of which the first counts
    root        whether the scale is alpha / sqrt(rank), not alpha / rank
    targets     ends of the names of the modules that have adapters, `("",)` for all; None if they are given by a pattern, which
                is not run: it is a stranger's, and can be made to take for ever
    excluded    ends of the names of modules that have none
    layers      numbers of the layers that have adapters, None for all, and the name in front of the number, "" for any
    base        the name of the base model, as it was given
    """

    ranks: frozenset[int]
    alpha: float
    alphas: tuple[tuple[re.Pattern[str], float], ...]
    root: bool
    targets: tuple[str, ...] | None
    excluded: tuple[str, ...]
    layers: tuple[frozenset[int], str] | None
    base: str

    def scale(self, module: str, rank: int) -> float:
        """What the product with this module's adapter is multiplied by."""
        alpha = next((value for pattern, value in self.alphas if pattern.match(module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.root else rank)

    def selects(self, module: str) -> bool:
        """Whether this module must have an adapter; False for all if `targets` is None."""
        if self.targets is None or not f".{module}".endswith(self.targets) or f".{module}".endswith(self.excluded):
            return False
        if self.layers is None:
            return True
        numbers, name = self.layers
        found = re.search(rf"(?:^|\.){name or '[^.]+'}\.(\d+)\.", module)
        return found is not None and int(found[1]) in numbers


def parse(config: Mapping[str, Any], source: str) -> PeftConfig:
    """The config in the file `source`. ValueError names the field that is missing, absurd or asks for what is not supported."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{source}: field 'peft_type' is {str(kind)[:100]!r}, wanted 'LORA'")
    for name, what in _REFUSED.items():
        if config.get(name):
            raise CheckpointError(f"{source}: field {name!r} is set: {what} are not supported")
    bias = config.get("bias") or "none"
    if bias != "none":
        raise CheckpointError(f"{source}: field 'bias' is {str(bias)[:100]!r}, wanted 'none': trained biases are not supported")
    start = config.get("init_lora_weights")
    if not isinstance(start, bool | None) and start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{source}: field 'init_lora_weights' is {str(start)[:100]!r}, which changes the base model's weights: convert the "
            "adapter when PEFT saves it (path_initial_model_for_weight_conversion)"
        )
    alphas = _object(config, source, "alpha_pattern")
    ranks = _object(config, source, "rank_pattern")
    return PeftConfig(
        ranks=frozenset([_rank(config, source, "r"), *(_rank(ranks, f"{source}: rank_pattern", key) for key in ranks)]),
        alpha=_number(config, source, "lora_alpha", 8.0),
        alphas=tuple((_pattern(key, source), _number(alphas, f"{source}: alpha_pattern", key)) for key in alphas),
        root=field(config, source, "use_rslora", "flag", False),
        targets=_targets(config, source),
        excluded=_ends(config.get("exclude_modules") or [], source, "exclude_modules"),
        layers=_layers(config, source),
        base=str(config.get("base_model_name_or_path") or "")[:300],
    )


def _object(config: Mapping[str, Any], source: str, name: str) -> dict[str, Any]:
    found = config.get(name) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{source}: field {name!r} is {str(found)[:100]!r}, wanted an object: pattern to number")
    return found


def _rank(config: Mapping[str, Any], source: str, name: str) -> int:
    rank: int = field(config, source, name, "size")
    return rank


def _number(config: Mapping[str, Any], source: str, name: str, default: float | None = None) -> float:
    value: Any = default if config.get(name) is None else config[name]
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise CheckpointError(f"{source}: field {name[:100]!r} is {str(value)[:100]!r}, wanted a number")
    return float(value)


def _pattern(key: str, source: str) -> re.Pattern[str]:
    """The rule by which PEFT finds a module in `alpha_pattern`, for a key that is a plain name or the end of one."""
    if re.fullmatch(r"\^?(\w|\.|\\\.){1,300}", key) is None:
        raise CheckpointError(f"{source}: field 'alpha_pattern' has the key {key[:100]!r}, wanted the end of a module's name")
    return re.compile(rf"(.*\.)?({key})$")


def _targets(config: Mapping[str, Any], source: str) -> tuple[str, ...] | None:
    found = config.get("target_modules")
    if isinstance(found, str):
        return ("",) if found == "all-linear" else None
    return _ends(found, source, "target_modules")


def _ends(found: Any, source: str, name: str) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise CheckpointError(f"{source}: field {name!r} is {str(found)[:100]!r}, wanted a list of names of modules")
    return tuple(f".{entry}" for entry in found)


def _layers(config: Mapping[str, Any], source: str) -> tuple[frozenset[int], str] | None:
    found, name = config.get("layers_to_transform"), config.get("layers_pattern") or ""
    numbers = [found] if type(found) is int else found or []
    if not (isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)):
        raise CheckpointError(f"{source}: field 'layers_to_transform' is {str(found)[:100]!r}, wanted numbers of layers")
    name = name[0] if isinstance(name, list) and len(name) == 1 else name
    if not (isinstance(name, str) and re.fullmatch(r"\w{0,100}", name)):
        raise CheckpointError(f"{source}: field 'layers_pattern' is {str(name)[:100]!r}, wanted a name")
    return (frozenset(numbers), name) if numbers else None


def document(
    family: str, ranks: Mapping[str, int], scales: Mapping[str, float], modules: Iterable[str], base: str | None
) -> dict[str, Any]:
    """The `adapter_config.json` for adapters of these ranks and scales, by module, among all `modules` of the model."""
    rank = max(ranks.values())
    alphas = {module: _alpha(scales[module], ranks[module]) for module in ranks}
    alpha = next(iter(alphas.values()))
    ends = {module.rpartition(".")[2] for module in ranks}
    whole = {module for module in modules if module.rpartition(".")[2] in ends} == set(ranks)
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(ends if whole else ranks),
        "rank_pattern": {re.escape(module): value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(module): value for module, value in alphas.items() if value != alpha},
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }


def _alpha(scale: float, rank: int) -> float:
    """The whole number that gives this scale, which may have been rounded to float32; else the exact product."""
    nearest = round(scale * rank)
    return nearest if scale in (nearest / rank, float(np.float32(nearest / rank))) else scale * rank


def modules(kernels: Iterable[Parameter], start: str) -> dict[str, list[Parameter]]:
    """Module -> the kernels that it holds, in a model whose names begin with `start`: BLOOM's has three in one."""
    found: dict[str, list[Parameter]] = {}
    for kernel in kernels:
        found.setdefault(start + kernel.huggingface[0].removesuffix(".weight"), []).append(kernel)
    return found
