"""Loading: from a preset's directory to a backbone or a task. Everything is checked before any weight is converted."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from refmodels.backbone import Backbone
from refmodels.files import CheckpointError, MissingFileError, read_json
from refmodels.op import Array, Params
from refmodels.ops.precision import numpy_dtype
from refmodels.parameters import Parameter, build_tree
from refmodels.presets import MODELS, TASKS, construct, locate
from refmodels.task import Task
from refmodels.tokenizer_files import load_tokenizer
from refmodels.tokenizers import Tokenizer
from refmodels.weights import huggingface, keras_config, keras_h5, safetensors, torch_bin
from refmodels.weights.shards import INDEX_SUFFIX
from refmodels.weights.tensor import Tensor

B = TypeVar("B", bound=Backbone)
T = TypeVar("T", bound=Task)

FLOATS = ("float16", "bfloat16", "float32", "float64")


def preset_directory(preset: str | Path) -> Path:
    """The local directory of a preset, after a download if need be. Errors as for `locate` and `Located.fetch`."""
    return locate(preset).fetch()


def load_preset_tokenizer(preset: str | Path) -> Tokenizer:
    """The tokenizer of a preset. Errors as for `preset_directory` and `tokenizers.load_tokenizer`."""
    return load_tokenizer(preset_directory(preset))


def load_backbone(cls: type[B], preset: str | Path, load_weights: bool = True, **kwargs: Any) -> B:
    """Build the backbone of a preset.

    `cls` is a model's class, or `Backbone` to take the class from the preset. `kwargs` override the preset's
    constructor arguments. The dtype is the one in `kwargs`, else the one saved with the preset, else float32,
    whatever the type in the weight file. With `load_weights=False` no weight file is opened, and a built-in name
    needs no download.

    Everything is checked before any weight is converted. ValueError names the file and the field or tensor, what was
    found and what was wanted; FileNotFoundError a missing file; ImportError a missing package.
    """
    located = locate(preset)
    if located.info is not None and not load_weights:
        model, source = _model(cls, located.info["class"], located.preset), f"preset {located.preset}"
        arguments = keras_config.arguments(located.info["config"], model.family, source)
        return cast(B, construct(model, arguments, kwargs, source))
    directory = located.fetch()
    source = str(directory / "config.json")
    if (directory / "adapter_config.json").exists() and not (directory / "config.json").exists():
        raise CheckpointError(f"{directory / 'adapter_config.json'}: LoRA adapters are not supported, load the base model")
    config = read_json(directory, "config.json")
    if "registered_name" in config:
        load = _load_keras
    elif "model_type" in config:
        load = _load_huggingface
    else:
        raise CheckpointError(f"{source}: field 'registered_name' (KerasHub) or 'model_type' (Hugging Face) is missing")
    return cast(B, load(cls, directory, config, load_weights, kwargs))


def load_task(cls: type[T], preset: str | Path, load_weights: bool = True, **kwargs: Any) -> T:
    """Build the task of a preset: its backbone (for `kwargs` and errors see `load_backbone`) and its tokenizer.

    `cls` is a task's class, or one above it to take the class from the preset. The tokenizer is None if the preset's directory
    has no tokenizer files, and for a built-in name with `load_weights=False` that would have to be downloaded.
    """
    located, above = locate(preset), cast(Any, Backbone)
    directory = located.fetch() if located.info is None else None
    model: type[Backbone] = type(load_backbone(above, directory or preset, load_weights=False, **kwargs))
    task = next(task for task in TASKS if task.backbone_class is model)
    if not issubclass(task, cls) and not issubclass(cls, task):
        call = f"call {task.__name__}.from_preset"
        raise ValueError(f"{preset} holds a {model.__name__}, which {cls.__name__} cannot run: {call}")
    if load_weights and directory is None:
        directory = located.fetch()
    backbone = load_backbone(model, directory or preset, load_weights=load_weights, **kwargs)
    files = [] if directory is None else [directory / name for name in ("tokenizer.json", "vocab.json", "spiece.model")]
    tokenizer = load_tokenizer(directory) if directory is not None and any(file.exists() for file in files) else None
    return (task if issubclass(task, cls) else cls)(backbone, tokenizer)


def _load_keras(
    cls: type[Backbone], directory: Path, config: dict[str, Any], load_weights: bool, kwargs: dict[str, Any]
) -> Backbone:
    source = str(directory / "config.json")
    model = _model(cls, keras_config.class_name(config, source), source)
    backbone = construct(model, keras_config.arguments(config.get("config"), model.family, source), kwargs, source)
    if load_weights:
        name = _weight_file(directory, "model.weights.h5", "model.weights.json")
        with keras_h5.open_tensors(directory, name) as tensors:
            if any(tensor.startswith("lora/") for tensor in tensors):
                raise CheckpointError(f"{directory / name}: LoRA adapters are not supported, load the base model")
            backbone.params = _assemble(
                backbone,
                tensors,
                directory / name,
                names=lambda parameter: keras_h5.spellings(parameter.keras),
                stored_shape=lambda parameter: parameter.keras_shape,
                ignorable=lambda name: False,
                convert=lambda values, parameter: values,
            )
    return backbone


def _load_huggingface(
    cls: type[Backbone], directory: Path, config: dict[str, Any], load_weights: bool, kwargs: dict[str, Any]
) -> Backbone:
    source = str(directory / "config.json")
    arguments = huggingface.arguments(config, source)
    model = _model(cls, huggingface.CLASSES[config["model_type"]], source)
    backbone = construct(model, arguments, kwargs, source)
    if load_weights:
        forms = {"model.safetensors": safetensors, "pytorch_model.bin": torch_bin}
        name = _weight_file(directory, *(form + end for form in forms for end in ("", INDEX_SUFFIX)))
        with forms[name.removesuffix(INDEX_SUFFIX)].open_tensors(directory, name) as tensors:
            huggingface.check_head(tensors, model.family, arguments, str(directory / name))
            start = huggingface.prefix(tensors, model.family)
            backbone.params = _assemble(
                backbone,
                tensors,
                directory / name,
                names=lambda parameter: huggingface.names(parameter, start),
                stored_shape=huggingface.stored_shape,
                ignorable=lambda name: huggingface.ignorable(name, model.family, start),
                convert=huggingface.convert,
            )
    return backbone


def _weight_file(directory: Path, *names: str) -> str:
    """The first of these names that is there."""
    for name in names:
        if (directory / name).exists():
            return name
    raise MissingFileError(f"{directory}: no weight file, wanted {' or '.join(names)}")


def _model(cls: type[Backbone], name: str, source: str) -> type[Backbone]:
    """The class to build: `cls` if it is the preset's class or derived from it, the preset's class if `cls` is above
    it."""
    model = MODELS[name]
    if issubclass(model, cls):
        return model
    if issubclass(cls, model):
        return cls
    raise ValueError(f"{source} holds {name}, not {cls.__name__}: call {name}.from_preset or Backbone.from_preset")


def _assemble(
    backbone: Backbone,
    tensors: Mapping[str, Tensor],
    file: Path,
    *,
    names: Callable[[Parameter], tuple[str, ...]],
    stored_shape: Callable[[Parameter], tuple[int, ...]],
    ignorable: Callable[[str], bool],
    convert: Callable[[Array, Parameter], Array],
) -> Params:
    """The tree of this backbone's parameters from the tensors of a file: all are checked first, then read one by
    one."""
    parameters = backbone.parameters()
    found: dict[str, Tensor] = {}
    problems: list[str] = []
    for parameter in parameters:
        candidates = names(parameter)
        name = next((name for name in candidates if name in tensors), None)
        if name is None:
            problems.append(f"tensor {candidates[0]!r} of shape {stored_shape(parameter)} is missing")
            continue
        tensor = found[parameter.path] = tensors[name]
        if tensor.shape != stored_shape(parameter):
            problems.append(f"tensor {name!r} has shape {tensor.shape}, wanted {stored_shape(parameter)}")
        elif tensor.dtype.name not in FLOATS:
            problems.append(f"tensor {name!r} has dtype {tensor.dtype}, wanted one of {', '.join(FLOATS)}")
    used = {tensor.name for tensor in found.values()}
    problems += [f"tensor {name!r} is surplus" for name in tensors if name not in used and not ignorable(name)]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{file} does not fit this {type(backbone).__name__}: {'; '.join(problems[:8])}{more}")
    target = numpy_dtype(backbone.variable_dtype)

    def leaf(parameter: Parameter) -> Array:
        values = convert(found[parameter.path].read(), parameter).reshape(parameter.shape)
        with np.errstate(over="ignore"):  # beyond the type's range is an infinity, as the type defines it
            return np.array(values, dtype=target, order="C")

    return build_tree(parameters, leaf)
