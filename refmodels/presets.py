"""Presets: find one by name, handle or directory; check all of it; build the backbone and fill in its weights.

The data lies in `presets/`: one JSON file for each preset that is downloaded, one directory for each that ships its
weights.
"""

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from refmodels.backbone import Backbone
from refmodels.bloom import BloomCausalLM
from refmodels.files import CheckpointError, MissingFileError, field, read_json
from refmodels.op import Array, Params
from refmodels.ops.precision import numpy_dtype
from refmodels.opt import OPTCausalLM
from refmodels.parameters import Parameter, build_tree
from refmodels.t5 import T5Seq2SeqLM
from refmodels.task import Task
from refmodels.tokenizer_files import load_tokenizer
from refmodels.tokenizers import Tokenizer
from refmodels.weights import huggingface, keras_h5, safetensors, torch_bin
from refmodels.weights.shards import INDEX_SUFFIX
from refmodels.weights.tensor import Tensor

B = TypeVar("B", bound=Backbone)
T = TypeVar("T", bound=Task)

TASKS: tuple[type[Task], ...] = (T5Seq2SeqLM, OPTCausalLM, BloomCausalLM)

MODELS = {task.backbone_class.__name__: task.backbone_class for task in TASKS}

FLOATS = ("float16", "bfloat16", "float32", "float64")

_SIZES = {
    "vocabulary_size": "size",
    "num_layers": "layers",
    "num_heads": "size",
    "hidden_dim": "size",
    "intermediate_dim": "size",
}
_OPTIONAL = {"dropout": "fraction", "name": "text", "trainable": "flag"}
_OF_FAMILY = {
    "t5": {
        "key_value_dim": "size",
        "use_gated_activation": "flag",
        "layer_norm_epsilon": "fraction",
        "tie_embedding_weights": "flag",
    },
    "opt": {"max_sequence_length": "size"},
    "bloom": {"layer_norm_epsilon": "fraction"},
}
_HANDLES = (
    "a name that `refmodels presets` lists, a local directory, kaggle://org/model/keras/variant[/version] or hf://org/name"
)


def data_directory() -> Path:
    """The directory of preset data: beside this module when installed, else the checkout's `presets/`."""
    installed = Path(__file__).with_name("presets")
    return installed if installed.is_dir() else Path(__file__).parent.with_name("presets")


def preset_names() -> list[str]:
    """Every built-in preset, in alphabetical order."""
    entries = data_directory().iterdir()
    return sorted(
        entry.stem if entry.suffix == ".json" else entry.name
        for entry in entries
        if entry.suffix == ".json" or (entry / "config.json").is_file()
    )


def preset_info(name: str) -> dict[str, Any]:
    """What is known about a built-in preset, without opening a weight file.

    Keys: name; class, the name of the backbone's class; config, its constructor arguments; parameter_count;
    description; kaggle_handle and huggingface_repo (None if the weights ship with the package); weights_dtype, the
    type in the weight file (None if not recorded). ValueError for an unknown name, with near ones.
    """
    if name not in preset_names():
        raise ValueError(_unknown(name))
    directory = data_directory() / name
    if not directory.is_dir():
        return read_json(data_directory(), f"{name}.json")
    config = read_json(directory, "config.json")
    metadata = read_json(directory, "metadata.json") if (directory / "metadata.json").is_file() else {}
    source = str(directory / "config.json")
    class_name = _keras_class_name(config, source)
    arguments = _keras_arguments(config.get("config"), MODELS[class_name].family, source)
    return {
        "name": name,
        "class": class_name,
        "config": arguments,
        "parameter_count": _construct(MODELS[class_name], arguments, {}, source).count_params(),
        "description": metadata.get("description", ""),
        "kaggle_handle": None,
        "huggingface_repo": None,
        "weights_dtype": metadata.get("weights_dtype"),
    }


def class_presets(cls: type[Backbone]) -> dict[str, dict[str, Any]]:
    """The built-in presets that `cls` or a subclass of it can load: name -> `metadata` (description, params, path) and
    `kaggle_handle` (None for those that ship with the package), as KerasHub's `presets` property gives them."""
    infos = (preset_info(name) for name in preset_names())
    return {
        info["name"]: {
            "metadata": {
                "description": info["description"],
                "params": info["parameter_count"],
                "path": MODELS[info["class"]].family,
            },
            "kaggle_handle": info["kaggle_handle"],
        }
        for info in infos
        if issubclass(MODELS[info["class"]], cls)
    }


@dataclass(frozen=True)
class Located:
    """Where a preset is: in `directory`, or at `handle` (kaggle:// or hf://) from which `fetch()` downloads it.
    `info` is the record of `preset_info` if the preset is a built-in one that is downloaded."""

    preset: str
    directory: Path | None = None
    handle: str | None = None
    info: dict[str, Any] | None = None

    def fetch(self) -> Path:
        """The local directory, after a download if need be. ImportError if that needs a package that is not
        installed."""
        if self.directory is not None:
            return self.directory
        scheme, _, rest = str(self.handle).partition("://")
        try:
            if scheme == "kaggle":
                import kagglehub  # type: ignore[import-not-found,import-untyped,unused-ignore]

                return Path(kagglehub.model_download(rest))
            import huggingface_hub

            return Path(huggingface_hub.snapshot_download(rest))
        except ImportError:
            package = {"kaggle": "kagglehub", "hf": "huggingface_hub"}[scheme]
            raise ImportError(
                f"downloading {self.preset!r} from {self.handle} needs {package}: pip install {package}; "
                "a local directory with the preset's files works without"
            ) from None


def locate(preset: str | Path) -> Located:
    """Where `preset` is: a built-in name, a local directory, `kaggle://org/model/keras/variant[/version]` or
    `hf://org/name`.

    Nothing is downloaded or opened. ValueError for anything else, with near names.
    """
    if isinstance(preset, Path):
        if not preset.is_dir():
            raise FileNotFoundError(f"{preset}: no such directory")
        return Located(str(preset), directory=preset)
    if not isinstance(preset, str):
        raise ValueError(f"preset is {preset!r} of type {type(preset).__name__}, wanted {_HANDLES}")
    if preset in preset_names():
        shipped = data_directory() / preset
        if shipped.is_dir():
            return Located(preset, directory=shipped)
        info = preset_info(preset)
        return Located(preset, handle=info["kaggle_handle"], info=info)
    part = r"[A-Za-z0-9][\w.-]*"
    for scheme, pattern, form in (
        ("kaggle", rf"{part}/{part}/keras/{part}(/\d+)?", "kaggle://org/model/keras/variant[/version]"),
        ("hf", rf"{part}/{part}", "hf://org/name"),
    ):
        if preset.startswith(f"{scheme}://"):
            if not re.fullmatch(pattern, preset.removeprefix(f"{scheme}://")):
                raise ValueError(f"handle {preset!r} is not of the form {form}")
            return Located(preset, handle=preset)
    if os.path.isdir(preset):
        return Located(preset, directory=Path(preset))
    raise ValueError(_unknown(preset))


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name[:300], preset_names(), n=3)
    hint = f"; near names: {', '.join(near)}" if near else ""
    return f"unknown preset {name[:300]!r}{hint}; a preset is {_HANDLES}"


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
        arguments = _keras_arguments(located.info["config"], model.family, source)
        return cast(B, _construct(model, arguments, kwargs, source))
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
    model = _model(cls, _keras_class_name(config, source), source)
    backbone = _construct(model, _keras_arguments(config.get("config"), model.family, source), kwargs, source)
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
    backbone = _construct(model, arguments, kwargs, source)
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


def _keras_class_name(config: Mapping[str, Any], source: str) -> str:
    registered: str = field(config, source, "registered_name", "text")
    package, _, name = registered.rpartition(">")
    if package not in {"keras_hub", "keras_nlp"} or name not in MODELS:
        wanted = ", ".join(f"keras_hub>{known}" for known in MODELS)
        raise CheckpointError(f"{source}: field 'registered_name' is {registered!r}, wanted one of {wanted}")
    return name


def _keras_arguments(config: Any, family: str, source: str) -> dict[str, Any]:
    """The constructor arguments in a KerasHub config, each checked."""
    if type(config) is not dict:
        raise CheckpointError(f"{source}: field 'config' is {type(config).__name__}, wanted an object of constructor arguments")
    arguments = {name: field(config, source, name, kind) for name, kind in _SIZES.items()}
    optional = _OPTIONAL | _OF_FAMILY[family]
    for name, value in config.items():
        if name in optional:
            nullable = name == "key_value_dim" and value is None
            arguments[name] = None if nullable else field(config, source, name, optional[name])
        elif name == "activation" and family == "t5":
            if value is not None and not isinstance(value, str | dict):
                raise CheckpointError(
                    f"{source}: field 'activation' is {str(value)[:100]!r}, wanted a name or a function object"
                )
            arguments[name] = value
        elif name not in _SIZES and name != "dtype":
            wanted = ", ".join((*_SIZES, *optional, "dtype", *(["activation"] if family == "t5" else [])))
            raise CheckpointError(f"{source}: field {name!r} is unknown, wanted {wanted}")
    return arguments | {"dtype": config.get("dtype")}  # like activation, the class reads every form of it


def _model(cls: type[Backbone], name: str, source: str) -> type[Backbone]:
    """The class to build: `cls` if it is the preset's class or derived from it, the preset's class if `cls` is above
    it."""
    model = MODELS[name]
    if issubclass(model, cls):
        return model
    if issubclass(cls, model):
        return cls
    raise ValueError(f"{source} holds {name}, not {cls.__name__}: call {name}.from_preset or Backbone.from_preset")


def _construct(model: type[Backbone], arguments: dict[str, Any], kwargs: dict[str, Any], source: str) -> Backbone:
    given = {name: value for name, value in kwargs.items() if name != "dtype" or value is not None}
    try:
        return model(**(arguments | given))
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error


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
