"""The settings of a preprocessor in KerasHub's preprocessor.json and task.json, each checked.

The tokenizer inside these files is not read: tokenizer.json says the same.
"""

from pathlib import Path
from typing import Any

from refmodels.files import CheckpointError, field, read_json
from refmodels.preprocessors import PREPROCESSORS, Preprocessor

_OF_KERAS = {"name", "trainable", "dtype", "tokenizer", "config_file"}


def saved_settings(directory: Path, kind: type[Preprocessor]) -> dict[str, Any]:
    """Arguments for the constructor of `kind` in preprocessor.json.

    Empty without that file, and for one that describes another preprocessor of this family: then the defaults hold, as in
    KerasHub. CheckpointError for anything else.
    """
    if not (directory / "preprocessor.json").exists():
        return {}
    return _settings(read_json(directory, "preprocessor.json"), str(directory / "preprocessor.json"), kind)


def task_settings(directory: Path, task: str, kind: type[Preprocessor]) -> dict[str, Any] | None:
    """The same for the task of this name: from task.json if that is there, and None if it was saved without a preprocessor."""
    source = str(directory / "task.json")
    if not (directory / "task.json").exists():
        return saved_settings(directory, kind)
    saved = read_json(directory, "task.json")
    if (stated := field(saved, source, "class_name", "text")) != task:
        raise CheckpointError(f"{source}: field 'class_name' is {stated[:100]!r}, wanted {task!r}")
    config = field(saved, source, "config", "object")
    found = field(config, source, "preprocessor", "object", None)
    return None if found is None else _settings(found, f"{source}: preprocessor", kind)


def _settings(found: dict[str, Any], source: str, kind: type[Preprocessor]) -> dict[str, Any]:
    stated: str = field(found, source, "class_name", "text")
    known = {preprocessor.__name__: preprocessor for preprocessor in PREPROCESSORS}
    if stated not in known or known[stated].family != kind.family:
        raise CheckpointError(f"{source}: field 'class_name' is {stated[:100]!r}, wanted {kind.__name__!r}")
    if not issubclass(kind, known[stated]):
        return {}
    config = field(found, source, "config", "object")
    if surplus := sorted(config.keys() - kind.settings.keys() - _OF_KERAS):
        raise CheckpointError(f"{source}: field {surplus[0][:100]!r} is unknown, wanted {', '.join(kind.settings)}")
    kinds = {**kind.settings, "name": "text"}
    return {name: field(config, source, name, kinds[name]) for name in kinds if config.get(name) is not None}
