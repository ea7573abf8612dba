"""Presets: the built-in ones, and where any preset is: a name, a directory or a handle.

The data lies in `presets/`: one JSON file for each preset that is downloaded, one directory for each that ships its
weights.
"""

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refmodels import hub
from refmodels.backbone import Backbone
from refmodels.bloom import BloomCausalLM
from refmodels.files import CheckpointError, read_json
from refmodels.opt import OPTCausalLM
from refmodels.t5 import T5Seq2SeqLM
from refmodels.task import Task
from refmodels.weights import keras_config

TASKS: tuple[type[Task], ...] = (T5Seq2SeqLM, OPTCausalLM, BloomCausalLM)

MODELS = {task.backbone_class.__name__: task.backbone_class for task in TASKS}

_HANDLES = (
    "a name that `refmodels presets` lists, a local directory, kaggle://org/model/keras/variant[/version] "
    "or hf://org/name[@revision]"
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
    class_name = keras_config.class_name(config, source)
    arguments = keras_config.arguments(config.get("config"), MODELS[class_name].family, source)
    return {
        "name": name,
        "class": class_name,
        "config": arguments,
        "parameter_count": construct(MODELS[class_name], arguments, {}, source).count_params(),
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

    def fetch(self, weights: bool = True) -> Path:
        """The local directory, after a download (without weights, if none are wanted) if need be. Errors as for `hub.fetch`."""
        if self.directory is not None:
            return self.directory
        try:
            return hub.fetch(str(self.handle), weights)
        except ImportError as error:
            if self.info is None or not self.info["huggingface_repo"]:
                raise
            raise ImportError(f"{error}; hf://{self.info['huggingface_repo']} is where the model comes from") from None


def locate(preset: str | Path) -> Located:
    """Where `preset` is: a built-in name, a local directory, `kaggle://org/model/keras/variant[/version]` or
    `hf://org/name[@revision]` (or `hf://name`, for the names from before there were organisations, which the site redirects).

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
        ("hf", rf"({part}/)?{part}(@{part}(/{part})*)?", "hf://org/name[@revision]"),
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


def construct(model: type[Backbone], arguments: dict[str, Any], kwargs: dict[str, Any], source: str) -> Backbone:
    """A backbone of this class; `arguments` come from the file `source`, `kwargs` from the caller.

    CheckpointError names the file if it is wrong; else, if the caller's arguments are, the constructor's own error.
    """
    given = {name: value for name, value in kwargs.items() if name != "dtype" or value is not None}
    try:
        return model(**(arguments | given))
    except ValueError as error:
        if given and _holds(model, arguments):
            raise
        raise CheckpointError(f"{source}: {error}") from error


def _holds(model: type[Backbone], arguments: dict[str, Any]) -> bool:
    try:
        model(**arguments)
    except ValueError:
        return False
    return True
