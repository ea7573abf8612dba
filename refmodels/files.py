"""Files that a stranger wrote: no link out of the directory, no unbounded size, no field unchecked. And files that we write:
complete or not there."""

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final


class CheckpointError(ValueError):
    """A preset, checkpoint, adapter or tokenizer on disk that is not what it should be; the message names the file."""


class MissingFileError(CheckpointError, FileNotFoundError):
    """A file of a preset or checkpoint that is not there."""


MAX_FILE_BYTES = 64 * 2**20
"""A file other than weights above this is refused unread; the largest in use, a tokenizer's, has 15 MB."""

REQUIRED: Final = object()
"""As the default of `field`: the field must be there."""

KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "size": ("a whole number from 1 to 10 million", lambda value: type(value) is int and 1 <= value <= 10_000_000),
    "layers": ("a whole number from 1 to 10 thousand", lambda value: type(value) is int and 1 <= value <= 10_000),
    "fraction": ("a number from 0 to below 1", lambda value: type(value) in (int, float) and 0 <= value < 1),
    "flag": ("true or false", lambda value: type(value) is bool),
    "object": ("an object", lambda value: type(value) is dict),
    "text": ("a string of at most 1000 characters", lambda value: type(value) is str and len(value) <= 1000),
}
"""Kind of a field -> (what it must be, in words; whether a value is that)."""


def inside(directory: Path, *names: str) -> Path:
    """The resolved path of the file below `directory` that these names, one for each level, lead to.

    A link may lead elsewhere in the directory, but not out of it; the one exception is the Hugging Face cache, where
    the files of `snapshots/<revision>` are links into `blobs` beside `snapshots`. ValueError for a name with a
    directory in it and for a link that leads out; FileNotFoundError if there is no such regular file.
    """
    for name in names:
        if name in {"", ".", ".."} or len(name) > 255 or any(character in name for character in "/\\\0"):
            raise CheckpointError(f"{directory}: {name[:300]!r} is not a plain file name")
    shown = directory.joinpath(*names)
    root = directory.resolve()
    try:
        path = root.joinpath(*names).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links; a name that the file system cannot hold
        raise CheckpointError(f"{shown}: cannot be opened: {error}") from None
    allowed = [root] + ([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])
    if not any(path.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{shown}: a link that leads out of the directory, to {path}")
    if not path.is_file():
        raise MissingFileError(f"{shown}: no such file")
    return path


def parse_json(content: bytes, source: str) -> dict[str, Any]:
    """The JSON object in `content`. ValueError that starts with `source` if it is not one."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: not valid JSON: {error}") from None
    if type(value) is not dict:
        raise CheckpointError(f"{source}: wanted a JSON object, found {type(value).__name__}")
    return value


def read_bytes(directory: Path, *names: str) -> bytes:
    """What is in this file; errors as for `inside`, or a size above `MAX_FILE_BYTES`."""
    path = inside(directory, *names)
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise CheckpointError(f"{directory.joinpath(*names)}: {size} bytes, wanted at most {MAX_FILE_BYTES}")
    return path.read_bytes()


def read_json(directory: Path, *names: str) -> dict[str, Any]:
    """The JSON object in this file; errors as for `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(directory, *names), str(directory.joinpath(*names)))


def field(values: Mapping[str, Any], source: str, names: str | tuple[str, ...], kind: str, default: Any = REQUIRED) -> Any:
    """The value of the one of `names` that is there and not null, checked to be of this kind (`KINDS`), else the default.

    ValueError says the file (`source`), the field, what was found and what was wanted: for a value that is not of this kind,
    and for two that contradict each other, of which one reader takes the one and another the other.
    """
    names = (names,) if isinstance(names, str) else names
    given = [name for name in names if values.get(name) is not None]
    words, holds = KINDS[kind]
    if not given:
        if default is REQUIRED:
            raise CheckpointError(f"{source}: field {names[0]!r} is missing or null, wanted {words}")
        return default
    name, *others = given
    if not holds(values[name]):
        raise CheckpointError(f"{source}: field {name!r} is {str(values[name])[:100]!r}, wanted {words}")
    for other in others:
        if values[other] != values[name]:
            found = f"field {name!r} is {values[name]!r}, but {other!r} is {str(values[other])[:100]!r}"
            raise CheckpointError(f"{source}: {found}, wanted one value for both")
    return values[name]


def keras_object(module: str, class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The form in which KerasHub writes an object of one of its classes to JSON."""
    return {
        "module": module,
        "class_name": class_name,
        "config": dict(config),
        "registered_name": f"keras_hub>{class_name}",
    }


def keras_policy(name: str) -> dict[str, Any]:
    """The form in which Keras writes a dtype policy to JSON."""
    return {"module": "keras", "class_name": "DTypePolicy", "config": {"name": name}, "registered_name": None}


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """An OSError from the block that names no file, such as a full disk, names this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: what is written takes the place of `path` if the block ends well, and goes if not."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with naming(path):
            yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is there complete or not at all: beside its place first, then renamed."""
    with replacing(path) as beside:
        beside.write_bytes(content)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file as Keras does, indented by 4; errors and care as for `write_bytes`."""
    write_bytes(path, (json.dumps(value, indent=4) + "\n").encode())
