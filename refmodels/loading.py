"""Loading: from a preset's directory to a backbone or a task. Everything is checked before any weight is converted."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from refmodels.arguments import policy_name
from refmodels.backbone import Backbone
from refmodels.files import CheckpointError, MissingFileError, read_json
from refmodels.op import Array
from refmodels.ops.precision import FLOATS, numpy_dtype
from refmodels.parameters import Parameter
from refmodels.preprocessor_files import saved_settings, task_settings
from refmodels.preprocessors import PREPROCESSORS, Preprocessor
from refmodels.presets import MODELS, TASKS, construct, locate
from refmodels.quantization import fault, read_policy
from refmodels.task import Task
from refmodels.tokenizer_files import has_tokenizer, load_tokenizer
from refmodels.tokenizers import Tokenizer
from refmodels.weights import huggingface, keras_config, keras_h5, safetensors, torch_bin
from refmodels.weights.shards import INDEX_SUFFIX
from refmodels.weights.tensor import Misfits, Tensor

B = TypeVar("B", bound=Backbone)
T = TypeVar("T", bound=Task)
P = TypeVar("P", bound=Preprocessor)
K = TypeVar("K", bound=Tokenizer)

KERAS_FILES = {"model.weights.h5": keras_h5, "model.weights.json": keras_h5}
HUGGINGFACE_FILES = {
    name + end: form
    for name, form in (("model.safetensors", safetensors), ("pytorch_model.bin", torch_bin))
    for end in ("", INDEX_SUFFIX)
}
"""Weight file -> the module that opens it, in the order of preference."""


def preset_directory(preset: str | Path) -> Path:
    """The local directory of a preset, after a download, without weights, if need be. Errors as for `locate` and
    `Located.fetch`."""
    return locate(preset).fetch(weights=False)


def load_preset_tokenizer(preset: str | Path, cls: type[K] | None = None, **options: Any) -> K:
    """The tokenizer of a preset, of class `cls` or one below it. Errors as for `preset_directory` and `load_tokenizer`."""
    wanted: type[Tokenizer] = cls or Tokenizer
    tokenizer = load_tokenizer(preset_directory(preset), **options)
    if not isinstance(tokenizer, wanted):
        found = type(tokenizer).__name__
        raise ValueError(f"{preset} holds {found}, not {wanted.__name__}: call {found}.from_preset or Tokenizer.from_preset")
    return cast(K, tokenizer)


def load_preprocessor(cls: type[P], preset: str | Path, **kwargs: Any) -> P:
    """The preprocessor of a preset, for `cls` or, above it, of the class that fits the preset.

    Its settings are those of preprocessor.json if that is there and of this class, else the defaults; `kwargs` replace them.
    Errors as for `load_preset_tokenizer`.
    """
    if cls is cast(Any, Preprocessor):
        raise ValueError("Preprocessor.from_preset does not say for what: call CausalLMPreprocessor.from_preset or the like")
    directory = preset_directory(preset)
    tokenizer = kwargs.pop("tokenizer", None) or load_tokenizer(directory)
    known = next((kind for kind in PREPROCESSORS if kind.family == tokenizer.family and _related(kind, cls)), None)
    if known is None:
        raise ValueError(f"{preset} holds {type(tokenizer).__name__}, which {cls.__name__} does not take")
    kind: Any = cls if issubclass(cls, known) else known
    return cast(P, kind(tokenizer, **(saved_settings(directory, known) | kwargs)))


def _related(kind: type, cls: type) -> bool:
    return issubclass(kind, cls) or issubclass(cls, kind)


def load_backbone(cls: type[B], preset: str | Path, load_weights: bool = True, **kwargs: Any) -> B:
    """Build the backbone of a preset.

    `cls` is a model's class, or `Backbone` to take the class from the preset. `kwargs` override the preset's
    constructor arguments. The dtype is the one in `kwargs`, else the one saved with the preset, else float32,
    whatever the type in the weight file; a quantised preset stays quantised under another dtype. With
    `load_weights=False` no weight file is opened or downloaded, and a built-in name needs no download at all.

    Everything is checked before any weight is converted. ValueError names the file and the field or tensor, what was
    found and what was wanted; FileNotFoundError a missing file; ImportError a missing package.
    """
    located = locate(preset)
    if located.info is not None and not load_weights:
        model, source = _model(cls, located.info["class"], located.preset), f"preset {located.preset}"
        arguments = keras_config.arguments(located.info["config"], model.family, source)
        return cast(B, construct(model, arguments, kwargs, source))
    directory = located.fetch(weights=False)
    if load_weights and located.directory is None:  # what can be refused is, before gigabytes are fetched
        load_backbone(cls, directory, load_weights=False, **kwargs)
        directory = located.fetch()
    source = str(directory / "config.json")
    if (directory / "adapter_config.json").exists() and not (directory / "config.json").exists():
        base = read_json(directory, "adapter_config.json").get("base_model_name_or_path")
        of = "another model" if base is None else repr(str(base)[:300])
        raise CheckpointError(
            f"{directory / 'adapter_config.json'}: an adapter of {of}, not a model: load that model with "
            f"from_preset, then call its load_peft_adapter({str(directory)!r})"
        )
    config = read_json(directory, "config.json")
    if "registered_name" in config:
        load = _load_keras
    elif "model_type" in config:
        load = _load_huggingface
    else:
        raise CheckpointError(f"{source}: field 'registered_name' (KerasHub) or 'model_type' (Hugging Face) is missing")
    return cast(B, load(cls, directory, config, load_weights, kwargs))


def load_task(cls: type[T], preset: str | Path, load_weights: bool = True, **kwargs: Any) -> T:
    """Build the task of a preset: its backbone (for `kwargs` and errors see `load_backbone`) and its preprocessor.

    `cls` is a task's class, or one above it to take the class from the preset. `preprocessor=` replaces the preset's, which has
    the settings of task.json, else of preprocessor.json, else the defaults. It is None if the directory has no tokenizer
    files, and for a built-in name with `load_weights=False` that would have to be downloaded.
    """
    located, above = locate(preset), cast(Any, Backbone)
    directory = located.fetch(weights=False) if located.info is None else None
    given = "preprocessor" in kwargs
    preprocessor = kwargs.pop("preprocessor", None)
    model: type[Backbone] = type(load_backbone(above, directory or preset, load_weights=False, **kwargs))
    task = next(task for task in TASKS if task.backbone_class is model)
    if not issubclass(task, cls) and not issubclass(cls, task):
        call = f"call {task.__name__}.from_preset"
        raise ValueError(f"{preset} holds a {model.__name__}, which {cls.__name__} cannot run: {call}")
    if load_weights:
        directory = located.fetch()
    if not given and directory is not None:
        preprocessor = _task_preprocessor(directory, task)
    backbone = load_backbone(model, directory or preset, load_weights=load_weights, **kwargs)
    return (task if issubclass(task, cls) else cls)(backbone, preprocessor)


def _task_preprocessor(directory: Path, task: type[Task]) -> Preprocessor | None:
    """What a preset's directory says about the task's preprocessor; None if it says that there is none."""
    kind: Any = task.preprocessor_class
    settings = task_settings(directory, task.__name__, kind)
    if settings is None or not has_tokenizer(directory):
        return None
    preprocessor: Preprocessor = kind(load_tokenizer(directory, kind.family), **settings)
    return preprocessor


def _load_keras(
    cls: type[Backbone], directory: Path, config: dict[str, Any], load_weights: bool, kwargs: dict[str, Any]
) -> Backbone:
    source = str(directory / "config.json")
    model = _model(cls, keras_config.class_name(config, source), source)
    arguments = keras_config.arguments(config.get("config"), model.family, source)
    backbone = construct(model, arguments, _still_quantised(arguments["dtype"], kwargs, source), source)
    if load_weights:
        name = _weight_file(directory, *KERAS_FILES)
        with keras_h5.open_tensors(directory, name) as tensors:
            if any(tensor.startswith("lora/") for tensor in tensors):
                raise CheckpointError(
                    f"{directory / name}: it holds adapters (lora/), not a model's weights: load the base model, then call its "
                    "load_lora_weights"
                )
            _assemble(
                backbone,
                tensors,
                directory / name,
                names=lambda parameter: keras_h5.spellings(parameter.keras),
                stored_shape=lambda parameter: parameter.keras_shape,
                ignorable=lambda name: False,
                convert=lambda values, parameter: values,
            )
    return backbone


def _still_quantised(saved: Any, kwargs: dict[str, Any], source: str) -> dict[str, Any]:
    """`kwargs` with the dtype in it, if any, as the one that a quantised model computes in: it stays quantised."""
    if kwargs.get("dtype") is None:
        return kwargs
    try:
        _, mode, _ = read_policy(saved, lambda plain: "")
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    policy, given, _ = read_policy(kwargs["dtype"], policy_name)
    return kwargs if mode is None or given is not None else kwargs | {"dtype": f"{mode}_from_{policy}"}


def _load_huggingface(
    cls: type[Backbone], directory: Path, config: dict[str, Any], load_weights: bool, kwargs: dict[str, Any]
) -> Backbone:
    source = str(directory / "config.json")
    arguments = huggingface.arguments(config, source)
    model = _model(cls, huggingface.CLASSES[config["model_type"]], source)
    if not load_weights:
        return construct(model, arguments, kwargs, source)
    name = _weight_file(directory, *HUGGINGFACE_FILES)
    with HUGGINGFACE_FILES[name].open_tensors(directory, name) as tensors:
        return _of_huggingface(model, arguments, config, tensors, directory / name, kwargs)


def huggingface_backbone(config: Mapping[str, Any], tensors: Mapping[str, Tensor], file: Path, **kwargs: Any) -> Backbone:
    """The backbone with these tensors, which `file` is said to hold (a live model's, for one), and this config.json. Errors
    as for `load_backbone`."""
    arguments = huggingface.arguments(config, str(file))
    model = _model(cast(Any, Backbone), huggingface.CLASSES[config["model_type"]], str(file))
    return _of_huggingface(model, arguments, config, tensors, file, kwargs)


def _of_huggingface(
    model: type[Backbone],
    arguments: dict[str, Any],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    file: Path,
    kwargs: dict[str, Any],
) -> Backbone:
    if "tie_embedding_weights" not in kwargs:
        arguments["tie_embedding_weights"] = huggingface.tied(tensors, config, str(file))
    backbone = construct(model, arguments, kwargs, str(file.parent / "config.json"))
    start = huggingface.prefix(tensors, model.family)
    _assemble(
        backbone,
        tensors,
        file,
        names=lambda parameter: huggingface.names(parameter, start),
        stored_shape=huggingface.stored_shape,
        ignorable=lambda name: huggingface.ignorable(name, model.family, start),
        convert=huggingface.convert,
    )
    return backbone


@contextmanager
def open_weights(directory: Path) -> Iterator[Mapping[str, Tensor]]:
    """The tensors of a preset's directory of either form, not read yet. Errors as for `keras_h5.open_tensors`."""
    forms = KERAS_FILES if "registered_name" in read_json(directory, "config.json") else HUGGINGFACE_FILES
    name = _weight_file(directory, *forms)
    with forms[name].open_tensors(directory, name) as tensors:
        yield tensors


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
) -> None:
    """This backbone's parameters from the tensors of a file: all are checked first, then read one by one."""
    parameters, how = backbone.parameters(), backbone.quantization
    if how is not None and all(tensor.dtype.name in FLOATS for tensor in tensors.values()):
        raise CheckpointError(f"{file} holds plain weights: load it with a plain dtype, then call quantize({how.mode!r})")
    misfits = Misfits(file, type(backbone).__name__)
    found: dict[str, Tensor] = {}
    for parameter in parameters:
        dtypes = ("int8",) if parameter.dtype == "int8" else FLOATS
        found[parameter.path] = misfits.tensor(tensors, names(parameter), stored_shape(parameter), dtypes)
    misfits.surplus(name for name in tensors if not ignorable(name))
    misfits.check()
    variable_dtype = backbone.variable_dtype

    def leaf(parameter: Parameter) -> Array:
        values = convert(found[parameter.path].read(), parameter).reshape(parameter.shape)
        if how is not None and (problem := fault(parameter, values, how)):
            raise CheckpointError(f"{file}: tensor {found[parameter.path].name!r} {problem}")
        target = numpy_dtype(parameter.dtype or variable_dtype)
        with np.errstate(over="ignore"):  # beyond the type's range is an infinity, as the type defines it
            return np.array(values, dtype=target, order="C")

    backbone.read(leaf)
