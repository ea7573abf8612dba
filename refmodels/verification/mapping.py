"""Mapping files, in TOML: what others call the steps of a model, and how they lay out the arrays (`spec/verification.md`).

    "lm_head"               = "opt_logits"
    "h.{i}.attn.out"        = "layers.{i}.self_attention.output:linear"
    "hidden_states.{i}"     = "layers.{i-1}:opt_decoder_layer"
    "h.{i}.attn.q"          = { step = "layers.{i}.self_attention:split_heads", axes = [0, 2, 1, 3] }
    "h.{i}.attn.qkv"        = [
        { step = "layers.{i}.self_attention.query:linear", part = "query", layout = "interleaved", heads = 12 },
        { step = "layers.{i}.self_attention.key:linear", part = "key", layout = "interleaved", heads = 12 },
    ]

The key is their name. What is done to their array is done in the order in which it is written.
"""

import difflib
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refmodels.files import CheckpointError, read_bytes
from refmodels.op import Array
from refmodels.verification.candidate import OUTPUTS, CandidateError

PARTS = ("query", "key", "value")
LAYOUTS = ("interleaved", "blocked")

MAX_ENTRIES = 10_000

MOVES = ("part", "axes", "reshape", "heads", "scale", "shift")
"""What an entry may do to their array, beside `layout`, which belongs to `part`."""

_PLACEHOLDER = re.compile(r"\{(\w+)([+-]\d{1,4})?\}")


class MappingError(CandidateError, CheckpointError):
    """A mapping file that is not one, or that does not fit what it is for; the message names the entry."""


@dataclass(frozen=True)
class Entry:
    """One of their names, or a pattern for several, and what it is: `step` is ours, or a pattern too, `moves` how their array
    becomes it, `label` where this stands."""

    theirs: str
    step: str
    moves: tuple[tuple[str, Any], ...]
    label: str

    @property
    def is_pattern(self) -> bool:
        """Whether it stands for several names."""
        return _PLACEHOLDER.search(self.theirs) is not None

    def matched(self, name: str) -> str | None:
        """Our step for this name of theirs; None if the entry is not for it."""
        if not self.is_pattern:
            return self.step if name == self.theirs else None
        found = _expression(self.theirs).fullmatch(name)
        if found is None:
            return None
        numbers = {key: int(digits) for key, digits in found.groupdict().items()}
        ours = {match[0]: numbers[match[1]] + int(match[2] or 0) for match in _PLACEHOLDER.finditer(self.step)}
        if any(number < 0 for number in ours.values()):
            return None
        return _PLACEHOLDER.sub(lambda match: str(ours[match[0]]), self.step)

    def moved(self, array: Array, shape: Callable[[], tuple[int, ...]]) -> Array:
        """Their array in our layout; `shape` gives that of our step. MappingError if the entry does not fit it."""
        given = array.shape
        try:
            for move, value in self.moves:
                array = _move(array, move, value, shape)
        except ValueError as error:
            raise MappingError(f"{self.label}: their array of shape {given}: {error}") from None
        return array


def _expression(pattern: str) -> re.Pattern[str]:
    """A pattern as a regular expression: every placeholder is one number, the same wherever it has one name."""
    parts, end, seen = [], 0, set()
    for match in _PLACEHOLDER.finditer(pattern):
        parts.append(re.escape(pattern[end : match.start()]))
        parts.append(f"(?P={match[1]})" if match[1] in seen else f"(?P<{match[1]}>0|[1-9][0-9]{{0,5}})")
        seen.add(match[1])
        end = match.end()
    return re.compile("".join([*parts, re.escape(pattern[end:])]))


def _move(array: Array, move: str, value: Any, shape: Callable[[], tuple[int, ...]]) -> Array:
    if move == "part":
        return fused_part(array, *value)
    if move == "axes":
        if sorted(value) != list(range(array.ndim)):
            raise ValueError(f"axes = {list(value)} is no order of its {array.ndim} axes")
        return array.transpose(value)
    if move == "reshape":
        return _reshaped(array, value, shape)
    if move == "heads":
        if array.ndim < 1 or array.shape[-1] % value:
            raise ValueError(f"heads = {value} does not divide the last axis of {array.shape}")
        return array.reshape(*array.shape[:-1], value, array.shape[-1] // value)
    wide = array.astype(np.float64)
    return wide * value if move == "scale" else wide + value


def fused_part(array: Array, part: str, layout: str, heads: int) -> Array:
    """The query, key or value of a last axis that holds all three: one after the other (`blocked`), or head by head
    (`interleaved`)."""
    size = array.shape[-1] if array.ndim else 0
    if size == 0 or size % (3 * heads):
        raise ValueError(f"part = {part!r}: the last axis is not 3 x {heads} heads long")
    places = (heads, 3, -1) if layout == "interleaved" else (1, 3, -1)
    found = array.reshape(*array.shape[:-1], *places)[..., PARTS.index(part), :]
    return found.reshape(*array.shape[:-1], size // 3)


def _reshaped(array: Array, value: Any, shape: Callable[[], tuple[int, ...]]) -> Array:
    wanted: Sequence[int]
    if value == "step":
        wanted = shape()
    else:
        if any(extent == 0 and place >= array.ndim for place, extent in enumerate(value)):
            raise ValueError(f"reshape = {list(value)}: 0 keeps an axis, and there are but {array.ndim}: {array.shape}")
        wanted = [extent or array.shape[place] for place, extent in enumerate(value)]
    try:
        return array.reshape(wanted)
    except ValueError:
        raise ValueError(f"reshape = {value}: {array.shape} does not fill {tuple(wanted)}") from None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name[:200]) for name in names) or "none at all"


# -- the file ---------------------------------------------------------------------------------------------------------------


class NameMap:
    """The entries of a mapping file; without any it lets through names of ours and those of `OUTPUTS`."""

    def __init__(self, entries: Sequence[Entry] = ()) -> None:
        self.entries = tuple(entries)
        self._exact = {entry.theirs: [e for e in self.entries if e.theirs == entry.theirs] for entry in self.entries}

    @classmethod
    def read(cls, path: str | Path) -> "NameMap":
        """The map in this file. MappingError says which entry is wrong; FileNotFoundError if there is no such file."""
        path = Path(path).resolve()
        return cls.parse(read_bytes(path.parent, path.name), str(path.name))

    @classmethod
    def parse(cls, content: bytes, source: str) -> "NameMap":
        """The map in this text."""
        try:
            table = tomllib.loads(content.decode())
        except (ValueError, RecursionError) as error:  # no UTF-8, no TOML, a number of thousands of digits
            raise MappingError(f"{source}: not valid TOML: {str(error)[:300]}") from None
        if len(table) > MAX_ENTRIES:
            raise MappingError(f"{source}: {len(table)} entries, wanted at most {MAX_ENTRIES}")
        return cls([entry for theirs, value in table.items() for entry in _entries(source, theirs, value)])

    def applied(self, raw: Mapping[str, Array], family: str, shape: Callable[[str], tuple[int, ...] | None]) -> "Renamed":
        """Their arrays by the names of our steps. `shape` gives that of our step, or None if there is no such step.

        MappingError for an entry that names nothing of theirs, and for two arrays that would be one step.
        """
        sources: dict[str, tuple[str, Entry | None]] = {}
        used: set[int] = set()
        for name in raw:
            for step, entry in self._steps(name, family):
                if step in sources:
                    before, other = sources[step]
                    label = next((found.label for found in (entry, other) if found is not None), repr(name))
                    raise MappingError(f"{label}: {before!r} and {name!r} of theirs would both be step {step!r}")
                sources[step] = name, entry
                used.add(id(entry))
        idle = next((entry for entry in self.entries if id(entry) not in used), None)
        if idle is not None:
            near = difflib.get_close_matches(idle.theirs, raw, 3, 0.0)
            raise MappingError(f"{idle.label}: names nothing of theirs; near are {_listed(near)}")
        return Renamed(raw, sources, shape)

    def _steps(self, name: str, family: str) -> Iterator[tuple[str, Entry | None]]:
        """The steps that one of their names is; an entry for this very name goes before patterns."""
        exact = [entry for entry in self._exact.get(name, ()) if not entry.is_pattern]
        if exact:
            yield from ((entry.step, entry) for entry in exact)
            return
        found = [(step, entry) for entry in self.entries if entry.is_pattern and (step := entry.matched(name)) is not None]
        patterns = {entry.theirs for _, entry in found}
        if len(patterns) > 1:
            raise MappingError(f"{found[0][1].label}: {name!r} fits {' and '.join(map(repr, sorted(patterns)))}")
        if found:
            yield from found
            return
        yield output_step(name, family) or name, None


def output_step(name: str, family: str) -> str | None:
    """Our step for the name of an output, such as `logits`."""
    return next((step for step in OUTPUTS.get(name, ()) if step.startswith(f"{family}_")), None)


class Renamed(Mapping[str, Array]):
    """Their arrays by our names and in our layout, each read and moved when it is asked for."""

    def __init__(
        self,
        raw: Mapping[str, Array],
        sources: Mapping[str, tuple[str, Entry | None]],
        shape: Callable[[str], tuple[int, ...] | None],
    ) -> None:
        self._raw, self._sources, self._shape = raw, sources, shape

    def __getitem__(self, step: str) -> Array:
        name, entry = self._sources[step]
        array = np.asarray(self._raw[name])
        return array if entry is None else entry.moved(array, lambda: self._target(step, entry))

    def __contains__(self, step: object) -> bool:
        return step in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def unmoved(self, step: str) -> str | None:
        """What they call this step, if theirs is taken as it is; None if its layout is changed, or if they do not give it."""
        name, entry = self._sources.get(step, (None, None))
        return None if entry is not None and entry.moves else name

    def label(self, step: str) -> str | None:
        """Where it is said that something of theirs is this step; None if it has that name itself."""
        entry = self._sources[step][1]
        return None if entry is None else entry.label

    def _target(self, step: str, entry: Entry) -> tuple[int, ...]:
        found = self._shape(step)
        if found is None:
            raise CandidateError(f"{entry.label}: the model has no step {step!r}")
        return found


def _entries(source: str, theirs: str, value: Any) -> Iterator[Entry]:
    label = f"{source}: entry {theirs[:200]!r}"
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, str):
            one = {"step": one}
        if not isinstance(one, dict):
            raise MappingError(f"{label}: wanted a step or a table, found {str(one)[:100]}")
        if "step" not in one:
            hint = (
                " (a name with dots in it must be in quotes)" if any(isinstance(child, dict) for child in one.values()) else ""
            )
            raise MappingError(f"{label}: says no `step`{hint}")
        yield entry_of(label, theirs, one)


def entry_of(label: str, theirs: str, table: dict[str, Any]) -> Entry:
    """The checked entry that a table says."""
    step = table["step"]
    if not isinstance(step, str) or not step:
        raise MappingError(f"{label}: step is {str(step)[:100]!r}, wanted the name of one of our steps")
    known = {match[1] for match in _PLACEHOLDER.finditer(theirs)}
    for match in _PLACEHOLDER.finditer(theirs):
        if match[2] or match[1][0].isdigit():
            raise MappingError(f"{label}: {match[0]} cannot stand in a name of theirs, wanted a plain {{i}}")
    for match in _PLACEHOLDER.finditer(step):
        if match[1] not in known:
            raise MappingError(f"{label}: step {step!r} has {match[0]}, which is not in the name of theirs")
    unknown = [key for key in table if key not in (*MOVES, "step", "layout")]
    if unknown:
        raise MappingError(f"{label}: {unknown[0][:100]!r} is none of {', '.join(MOVES)}, layout")
    if ("layout" in table) != ("part" in table):
        raise MappingError(f"{label}: `part` and `layout` go together")
    moves = [(key, _value(label, key, table)) for key in table if key in MOVES and not (key == "heads" and "part" in table)]
    return Entry(theirs, step, tuple(moves), label)


def _value(label: str, key: str, table: dict[str, Any]) -> Any:
    """The checked value of one move."""
    value = table[key]

    def wanted(good: bool, words: str) -> None:
        if not good:
            raise MappingError(f"{label}: {key} is {str(value)[:100]}, wanted {words}")

    def whole(number: Any, least: int) -> bool:
        return type(number) is int and least <= number <= 10**9

    if key == "part":
        wanted(value in PARTS, f"one of {', '.join(PARTS)}")
        layout, heads = table["layout"], table.get("heads", 1)
        if layout not in LAYOUTS:
            raise MappingError(f"{label}: layout is {str(layout)[:100]!r}, wanted one of {', '.join(LAYOUTS)}")
        if not whole(heads, 1) or (layout == "interleaved" and "heads" not in table):
            raise MappingError(f"{label}: {layout} parts need `heads`, their number")
        return value, layout, heads if layout == "interleaved" else 1
    if key == "axes":
        wanted(isinstance(value, list) and len(value) <= 8 and all(whole(axis, 0) for axis in value), "a list of axes")
        return tuple(value)
    if key == "reshape":
        if value == "step":
            return value
        sizes = isinstance(value, list) and len(value) <= 8 and all(whole(extent, -1) for extent in value)
        wanted(sizes and value.count(-1) <= 1, 'sizes (0 keeps an axis, one -1 takes the rest), or "step"')
        return tuple(value)
    if key == "heads":
        wanted(whole(value, 1), "the number of heads")
        return value
    wanted(type(value) in (int, float) and np.isfinite(value), "a number")
    return float(value)
