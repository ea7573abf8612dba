"""Traces: the arrays that a run makes on its way, by name and in order, in memory or in a safetensors file.

    with trace(model) as steps:
        model(inputs)
    steps["layers.0.self_attention.query:linear"]

A name says whose parameters the call uses and which op it is: `layers.0.self_attention.query:linear`. A call without parameters
takes the place of the call around it: `layers.0:add`, and the second of them `layers.0:add.2`. So no model carries names of
steps, and the names are those of the parameter tree. The file is described in `spec/traces.md`.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from refmodels.files import CheckpointError, replacing
from refmodels.op import Array, Op, Params, executing, watching
from refmodels.weights.npy import open_npy, open_npz
from refmodels.weights.safetensors import open_tensors, read_metadata, write_file
from refmodels.weights.tensor import Tensor

FORMAT = "refmodels.trace"
VERSION = 1
ENDINGS = (".safetensors", ".npy", ".npz")

MAX_STEP_BYTES = 4 * 2**30
"""A step in a file above this is refused unread: the scores of 8 rows of 2048 tokens and 32 heads have that many."""

MAX_FILES = 20_000
"""Files of a directory that are read as one trace."""

QUIET = frozenset({"dropout", "token_positions", "cache_append", "cache_allocate", "key_value_cache"})
"""Ops whose calls are no steps of their own: nothing happens in them that somebody could get wrong here."""


class HasParams(Protocol):
    """What a trace asks of a model."""

    @property
    def params(self) -> Params:
        """The tree of parameters."""
        ...


class Namer:
    """Names for the calls of ops, by the parameters that they are given. One for each run."""

    def __init__(self, params: Params) -> None:
        self._paths = dict(_identities(params, ""))
        self._places: list[str] = []
        self._counts: Counter[str] = Counter()

    @contextmanager
    def call(self, op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[str]:
        """The name of this call; calls inside the block are inside it."""
        place = self._place(op, args, kwargs)
        key = f"{place}:{op.name}" if place != op.name else place
        self._counts[key] += 1
        count = self._counts[key]
        self._places.append(place)
        try:
            yield key if count == 1 else f"{key}.{count}"
        finally:
            self._places.pop()

    def _place(self, op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        for value in (*args, *kwargs.values()):
            found = self._paths.get(id(value))
            if found is not None:  # the whole tree is the place of a stack, which is named by its op
                return found or op.name
        return self._places[-1] if self._places else op.name


def _identities(tree: Any, path: str) -> Iterator[tuple[int, str]]:
    """(identity, place) of every part of a tree: the place of a leaf is the dictionary it is in."""
    yield id(tree), path
    for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(child, dict | list):
            yield from _identities(child, f"{path}.{key}" if path else str(key))
        else:
            yield id(child), path


class Trace(Mapping[str, Array]):
    """Arrays by the names of their steps, in the order in which the steps ended. `inputs` and `facts` say of what run."""

    def __init__(
        self,
        steps: Mapping[str, Array] | None = None,
        inputs: Mapping[str, Array] | None = None,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        self.steps = dict(steps or {})
        self.inputs = dict(inputs or {})
        self.facts = dict(facts or {})

    def __getitem__(self, name: str) -> Array:
        try:
            return self.steps[name]
        except KeyError:
            raise KeyError(f"the trace has no step {name!r}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def save(self, path: str | Path) -> None:
        """Write the file that `open_trace` reads: complete or not there."""
        tensors = {**{f"in.{name}": array for name, array in self.inputs.items()}, **self.steps}
        metadata = {"format": FORMAT, "version": str(VERSION), "order": json.dumps(list(self.steps)), **self.facts}
        with replacing(Path(path)) as beside:
            write_file(beside, [_stored(Path(path), name, array) for name, array in tensors.items()], metadata=metadata)


def _stored(path: Path, name: str, array: Array) -> Tensor:
    return Tensor(path, name, array.shape, array.dtype, lambda: array)


@contextmanager
def trace(model: HasParams, only: Callable[[str], bool] = lambda name: True) -> Iterator[Trace]:
    """Record every step of the calls inside the block whose name `only` admits; a name that comes again replaces the first.

    Steps inside a kernel that does a whole layer are not seen: run on the reference to see them.
    """
    found = Trace()
    namer = Namer(model.params)

    def observer(op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Callable[[], Any]) -> Any:
        with namer.call(op, args, kwargs) as name:
            result = proceed()
        if isinstance(result, np.ndarray) and op.name not in QUIET and only(name):
            found.steps[name] = result.copy() if op.mutates or result.base is not None else result
        return result

    with watching(observer):
        yield found


class Runs(HasParams, Protocol):
    """A model that can be run from its inputs to its logits."""

    def __call__(self, inputs: Mapping[str, Any]) -> Any:
        """Hidden states, or a dictionary with those of the decoder."""

    def logits(self, hidden: Array) -> Array:
        """The scores of the next token."""
        ...


def traced(model: Runs, inputs: Mapping[str, Any], only: Callable[[str], bool] = lambda name: True) -> Trace:
    """The steps of one run on the reference, the head included, whose names `only` admits."""
    with executing(None), trace(model, only) as steps:
        hidden = model(inputs)
        model.logits(hidden["decoder_sequence_output"] if isinstance(hidden, dict) else hidden)
    return steps


class StoredTrace(Mapping[str, Array]):
    """A trace in a file: an array is read when it is asked for. Made by `open_trace`."""

    def __init__(self, tensors: Mapping[str, Tensor], order: list[str], facts: dict[str, str]) -> None:
        self._tensors, self._order, self.facts = tensors, dict.fromkeys(order), facts

    @property
    def inputs(self) -> dict[str, Array]:
        """The inputs of the run, where the file has them."""
        return {name[3:]: _read(tensor) for name, tensor in self._tensors.items() if name.startswith("in.")}

    def __getitem__(self, name: str) -> Array:
        if name not in self._order:
            raise KeyError(f"the trace has no step {name!r}")
        return _read(self._tensors[name])

    def __contains__(self, name: object) -> bool:
        return name in self._order

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a step, without reading it."""
        return self._tensors[name].shape


def _read(tensor: Tensor) -> Array:
    if tensor.nbytes > MAX_STEP_BYTES:
        raise CheckpointError(
            f"{tensor.file}: {tensor.name[:300]!r} has {tensor.nbytes} bytes, wanted at most {MAX_STEP_BYTES}"
        )
    return tensor.read()


@contextmanager
def open_trace(path: str | Path) -> Iterator[StoredTrace]:
    """The trace in this file, or of every safetensors, npy and npz file in this directory, to be read inside the block.

    Any such file will do: without the metadata that `save` writes, the order is that of the names. ValueError for a file that
    is none or that is damaged, FileNotFoundError if it is not there.
    """
    path = Path(path)
    directory, names = path.parent, [path.name]
    if path.is_dir():
        directory, names = path, sorted(file.name for file in path.iterdir() if file.suffix in ENDINGS)
    if not names:
        raise FileNotFoundError(f"{path}: no file {', '.join(f'*{ending}' for ending in ENDINGS)} in this directory")
    if len(names) > MAX_FILES:
        raise CheckpointError(f"{path}: {len(names)} files, wanted at most {MAX_FILES}")
    with ExitStack() as stack:
        tensors: dict[str, Tensor] = {}
        order: list[str] = []
        facts: dict[str, str] = {}
        for name in names:
            found, metadata = _opened(stack, directory, name)
            doubled = next((tensor for tensor in found if tensor in tensors), None)
            if doubled is not None:
                raise CheckpointError(f"{directory / name}: step {doubled[:300]!r} is in another file too")
            tensors |= found
            order += _order(directory / name, metadata, found)
            facts |= {key: value for key, value in metadata.items() if key not in ("format", "version", "order")}
        yield StoredTrace(tensors, order, facts)


def _opened(stack: ExitStack, directory: Path, name: str) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    if name.endswith(".npy"):
        return open_npy(stack, directory, name), {}
    if name.endswith(".npz"):
        return open_npz(stack, directory, name), {}
    return stack.enter_context(open_tensors(directory, name)), read_metadata(directory, name)


def _order(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[str]:
    steps = [name for name in tensors if not name.startswith("in.")]
    if "order" not in metadata:
        return sorted(steps)
    if metadata.get("version", str(VERSION)) != str(VERSION):
        raise CheckpointError(f"{path}: a trace of version {metadata['version'][:20]!r}, wanted {VERSION}")
    try:
        order = json.loads(metadata["order"])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its order of steps is not valid JSON: {error}") from None
    if not isinstance(order, list) or sorted(map(str, order)) != sorted(steps):
        raise CheckpointError(f"{path}: its order of steps does not name its {len(steps)} tensors, each once")
    return [str(name) for name in order]
