"""Weights in several files: the index file that says which tensor lies in which shard."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from refmodels.files import CheckpointError, read_json
from refmodels.weights.tensor import Tensor

INDEX_SUFFIX = ".index.json"

OpenFile = Callable[[ExitStack, Path, str], dict[str, Tensor]]
"""(what closes it again, directory, name) -> the tensors of one file, not read yet."""


def read_index(directory: Path, name: str) -> dict[str, tuple[str, ...]]:
    """The field `weight_map` of an index: name of a tensor or of a group -> the files that hold it, at least one."""
    places = read_json(directory, name).get("weight_map")
    if isinstance(places, dict):
        files = {key: (value,) if isinstance(value, str) else value for key, value in places.items()}
        if all(
            isinstance(value, list | tuple) and value and all(isinstance(v, str) for v in value) for value in files.values()
        ):
            return {key: tuple(value) for key, value in files.items()}
    raise CheckpointError(f"{directory / name}: field 'weight_map' must map names to names of files")


def open_checkpoint(stack: ExitStack, directory: Path, name: str, open_file: OpenFile) -> dict[str, Tensor]:
    """The tensors of a Hugging Face checkpoint, whose index names every tensor of every shard: of all shards if the
    name ends in `.index.json`, else of the one file. `open_file` opens a file; errors are its own, and ValueError if
    the index and the shards differ."""
    if not name.endswith(INDEX_SUFFIX):
        return open_file(stack, directory, name)
    index, promised = directory / name, read_index(directory, name)
    if several := next((tensor for tensor, files in promised.items() if len(files) > 1), None):
        raise CheckpointError(f"{index}: field 'weight_map' names several files for tensor {several[:300]!r}, wanted one")
    of_shard: dict[str, set[str]] = {}
    for tensor, (shard,) in promised.items():
        of_shard.setdefault(shard, set()).add(tensor)
    tensors: dict[str, Tensor] = {}
    for shard, wanted in sorted(of_shard.items()):
        found = open_file(stack, directory, shard)
        if difference := sorted(wanted ^ found.keys()):
            where = "the index alone" if difference[0] in wanted else "the shard alone"
            raise CheckpointError(f"{index}: tensor {difference[0][:300]!r} of shard {shard} is in {where}")
        tensors |= found
    return tensors


def partition(tensors: Iterable[Tensor], limit: int) -> list[list[Tensor]]:
    """The tensors in their order, cut into files of at most `limit` bytes of values; a larger one is alone in its file."""
    parts: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if parts[-1] and size + tensor.nbytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.nbytes
    return parts
