"""From a preset in either form to a directory in KerasHub's or in Hugging Face's."""

from dataclasses import dataclass
from pathlib import Path

from refmodels.backbone import Backbone
from refmodels.loading import open_weights
from refmodels.ops.precision import FLOATS, variable_dtype
from refmodels.presets import locate
from refmodels.saving import Progress, shard_bytes, write_hugging_face, write_preset
from refmodels.staging import checked_target, partial_prefix, staged
from refmodels.task import Task

FORMS = {"keras": 10.0, "hf": 5.0}
"""Form of the files -> size in GiB above which the weights go into shards, as each side's own default is."""

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Converted:
    """What was written: where, in which form, the type of the parameters, how many tensors of how many bytes."""

    directory: str
    format: str
    dtype: str
    tensors: int
    bytes: int


def convert(
    source: str | Path,
    target: str | Path,
    form: str,
    *,
    dtype: str | None = None,
    max_shard_size: float | None = None,
    force: bool = False,
    dequantize: bool = False,
    progress: Progress = lambda done, total: None,
) -> Converted:
    """Write the preset `source`, its tokenizer included, to the directory `target`.

    form            of `FORMS`
    dtype           of `DTYPES`; by default the type the weights are stored in
    max_shard_size  GiB
    force           replace a directory that is there, as a whole, when the new one is complete
    dequantize      turn integers into the numbers that they stand for; Hugging Face's form holds no others

    The target appears when it is complete. FileExistsError for a target with files in it and ValueError for one that lies in
    the source or around it come before weights are read; for the rest see `loading`, `save_to_preset` and `save_to_hf`.
    """
    if form not in FORMS:
        raise ValueError(f"the form must be one of {', '.join(FORMS)}, got {form!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    size = FORMS[form] if max_shard_size is None else max_shard_size
    shard_bytes(size)
    located = locate(source)
    check_apart(located.directory, Path(target))
    check_target(target, force)
    directory = located.fetch()
    with staged(target, replace=True) as place:
        task = Task.from_preset(directory, dtype=dtype or stored_policy(directory))
        if dequantize and task.backbone.quantization is not None:
            task.backbone.dequantize()
        if form == "keras":
            tensors = write_preset(task, place, size, progress)
        else:
            tensors = write_hugging_face(task, place, size, progress=progress)
        check_target(target, force)  # it may have come while this was written
    total = sum(tensor.nbytes for tensor in tensors)
    return Converted(str(target), form, task.backbone.variable_dtype, len(tensors), total)


def check_target(target: str | Path, force: bool) -> None:
    """Errors as for `checked_target`; FileExistsError for a directory with files in it that is not to be replaced: without
    `force` any, with it one that is no preset."""
    place = checked_target(target)
    hidden = partial_prefix(place)
    if not place.is_dir() or all(path.name.startswith(hidden) for path in place.iterdir()):
        return
    if not force:
        raise FileExistsError(f"{target} is there and has files in it: --force replaces it")
    if not (place / "config.json").is_file():
        raise FileExistsError(f"{target} is there and is no preset (it has no config.json): even --force does not replace it")


def check_apart(source: Path | None, target: Path) -> None:
    """ValueError if one of the directories is the other or lies in it. A source that is downloaded, None, is in a cache."""
    if source is None:
        return
    one, other = source.resolve(), target.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise ValueError(f"the target {target} and the source {source} must lie apart")


def stored_policy(directory: Path) -> str | None:
    """The dtype policy that changes no stored value: the preset's own, or where that is not of the type of the tensors, the
    narrowest that holds them all. None for quantised weights, whose types are their own."""
    own = Backbone.from_preset(directory, load_weights=False).get_config()["dtype"]
    if not isinstance(own, str):
        return None
    with open_weights(directory) as tensors:
        types = {tensor.dtype.name for tensor in tensors.values()} & set(FLOATS)
    stored = types.pop() if len(types) == 1 else "float64" if "float64" in types else "float32"
    return own if variable_dtype(own) == stored else stored
