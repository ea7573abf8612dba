"""A mapping file proposed from shapes and values: which of their arrays is which step of ours, and how it is laid out.

Their arrays are held beside those of our own run, however their axes may have been ordered, heads split or merged, and queries,
keys and values fused. What is found is text to be read, corrected and then given as `--mapping`; nothing is applied.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refmodels.backbone import Backbone
from refmodels.op import Array
from refmodels.trace import traced
from refmodels.verification.mapping import LAYOUTS, PARTS, Entry, MappingError, NameMap, entry_of, output_step

NEAR = 0.05
"""Largest error, relative to the largest magnitude, at which an array is taken to be a step."""

APART = 10.0
"""How many times worse the second guess must be for the first to be the only one."""

SHOWN = 4
"""Guesses that are listed where none is the only one."""

MOST_AXES = 5


@dataclass(frozen=True)
class Guess:
    """That an array of theirs is this step, moved so. `same` are steps of ours with the same values."""

    step: str
    moves: tuple[tuple[str, Any], ...]
    error: float
    same: tuple[str, ...] = ()

    @property
    def part(self) -> str:
        """`query`, `key` or `value` of an array that holds all three, else empty."""
        return str(dict(self.moves).get("part", ""))

    @property
    def table(self) -> str:
        """The entry in TOML."""
        if not self.moves:
            return _quoted(self.step)
        pairs = [("step", self.step), *self.moves]
        return "{ " + ", ".join(f"{key} = {_toml(value)}" for key, value in pairs) + " }"


def telling_inputs(model: Backbone, seed: int = 0) -> dict[str, Array]:
    """Inputs without padding whose sizes are those of nothing else in the model."""
    generator, config = np.random.default_rng(seed), model.config
    taken = {1, config.num_heads, config.head_dim, config.hidden_dim, config.intermediate_dim, config.vocabulary_size}
    longest = getattr(config, "max_sequence_length", None) or 97
    sizes = [size for size in (3, 2, 5, 7, 11, 13, 17, 19, 23) if size not in taken]
    rows, *lengths = sizes[0], *(size for size in sizes[1:] if 5 <= size <= longest)
    return {
        token: generator.integers(3, config.vocabulary_size, (rows, length))
        for token, length in zip(model.inputs, lengths or [longest] * 2, strict=False)
    }


def proposed(raw: Mapping[str, Array], model: Backbone, inputs: Mapping[str, Array], name: str) -> str:
    """The text of a mapping file for what a candidate of this name gave on these inputs."""
    ours = traced(model, inputs)
    counting = {step: _counting(step, array.shape, model, inputs, ours) for step, array in ours.items()}
    chosen: dict[str, list[Guess]] = {}
    remarks: list[str] = []
    taken: dict[str, str] = {}
    for theirs in raw:
        if theirs in ours or output_step(theirs, model.family) in ours:
            continue
        array = np.asarray(raw[theirs])
        guesses = _guesses(array, ours, counting, model.config.num_heads)
        best, remark = _settled(theirs, array.shape, guesses)
        doubled = next((guess.step for guess in best if guess.step in taken), None)
        if doubled is not None:
            remark = [f"# {_quoted(theirs)} is {_quoted(doubled)} as well, like {_quoted(taken[doubled])}"]
            best = []
        taken |= {guess.step: theirs for guess in best}
        if best:
            chosen[theirs] = best
        remarks += ["", *remark] if remark else []
    head = [
        f"# Proposed from shapes and values for {_quoted(name)}.",
        "# Read it before it is used: an array that is wrong may look like another step.",
        "# error: the largest difference from our own run, over the largest magnitude in that.",
        "",
    ]
    folded = _text(head, _folded(chosen, raw), remarks)
    try:
        NameMap.parse(folded.encode(), "the proposal").applied(raw, model.family, lambda step: ours[step].shape)
    except MappingError:  # patterns that get in each other's way
        return _text(head, chosen, remarks)
    return folded


def _text(head: Sequence[str], entries: Mapping[str, list[Guess]], remarks: Sequence[str]) -> str:
    lines = list(head)
    for theirs, guesses in entries.items():
        same = f"; the same values as {', '.join(guesses[0].same)}" if len(guesses) == 1 and guesses[0].same else ""
        said = f"  # error {max(guess.error for guess in guesses):.2g}{same}"
        if len(guesses) == 1:
            lines.append(f"{_quoted(theirs)} = {guesses[0].table}{said}")
        else:
            lines += [f"{_quoted(theirs)} = [{said}", *(f"    {guess.table}," for guess in guesses), "]"]
    return "\n".join([*lines, *remarks]) + "\n"


def _settled(theirs: str, shape: tuple[int, ...], guesses: list[Guess]) -> tuple[list[Guess], list[str]]:
    """The guesses that are taken, or else what is said in a comment."""
    if not guesses:
        return [], [f"# no step has the shape of {_quoted(theirs)}: {shape}"]
    near = [guess for guess in guesses if guess.error <= NEAR]
    listed = [f"# {_quoted(theirs)} = {guess.table}  # error {guess.error:.2g}" for guess in guesses[:SHOWN]]
    if not near:
        return [], [f"# {_quoted(theirs)} {shape} is near no step; by its shape it could be", *listed]
    parts = {guess.part for guess in near}
    best = []
    for part in sorted(parts, key=("", *PARTS).index):
        first, *others = [guess for guess in near if guess.part == part]
        if others and others[0].error <= APART * first.error + 1e-6:
            return [], [f"# {_quoted(theirs)} {shape} could be any of these", *listed]
        best.append(first)
    if "" in parts and len(parts) > 1:
        return [], [f"# {_quoted(theirs)} {shape} could be any of these", *listed]
    return best, []


# -- guesses ----------------------------------------------------------------------------------------------------------------


def _guesses(array: Array, ours: Mapping[str, Array], counting: Mapping[str, Array | None], heads: int) -> list[Guess]:
    """Every step that the array could be by its shape, the nearest first; steps with the same values are one."""
    found: list[Guess] = []
    is_float = array.dtype.kind not in "iub"
    for step, wanted in ours.items():
        if (wanted.dtype.kind not in "iub") != is_float or wanted.size == 0:
            continue
        for moves in _ways(array.shape, wanted.shape, heads):
            entry = entry_of("", "", {"step": step, **dict(moves)})
            got = entry.moved(array, lambda wanted=wanted: wanted.shape)  # type: ignore[misc]
            found.append(Guess(step, moves, _error(got, wanted, counting[step])))
    # Of equals the one with the fewest moves comes first, of those the first step.
    found.sort(key=lambda guess: (np.isnan(guess.error), guess.error, len(guess.moves)))
    kept: list[Guess] = []
    for guess in found:
        twin = next((i for i, other in enumerate(kept) if _are_twins(guess, other, ours)), None)
        if twin is None:
            kept.append(guess)
        elif guess.step not in (kept[twin].step, *kept[twin].same):
            kept[twin] = replace(kept[twin], same=(*kept[twin].same, guess.step))
    return kept


def _are_twins(guess: Guess, other: Guess, ours: Mapping[str, Array]) -> bool:
    """Whether both say the same: two names for one array, whose heads may be split, or two ways to it."""
    if guess.error != other.error or guess.part != other.part:
        return False
    one, two = ours[guess.step], ours[other.step]
    return guess.step == other.step or (one.size == two.size and np.array_equal(one.ravel(), two.ravel()))


def _ways(theirs: tuple[int, ...], ours: tuple[int, ...], heads: int) -> Iterator[tuple[tuple[str, Any], ...]]:
    """What could make one shape of the other, the simplest first."""
    if len(theirs) > MOST_AXES:
        return
    for axes in itertools.permutations(range(len(theirs))):
        turned = tuple(theirs[axis] for axis in axes)
        turning = () if axes == tuple(range(len(theirs))) else (("axes", list(axes)),)
        if turned == ours:
            yield turning
        if len(turned) == len(ours) + 1 and turned[:-2] == ours[:-1] and turned[-2] * turned[-1] == ours[-1]:
            yield (*turning, ("reshape", [*[0] * (len(ours) - 1), -1]))
        if (
            len(turned) + 1 == len(ours)
            and turned[:-1] == ours[:-2]
            and ours[-2] == heads
            and turned[-1] == ours[-2] * ours[-1]
        ):
            yield (*turning, ("heads", heads))
        if len(turned) == len(ours) == 3 and turned == (*ours[:-1], 3 * ours[-1]) and ours[-1] % heads == 0:
            for part, layout in itertools.product(PARTS, reversed(LAYOUTS)):
                how = (("heads", heads),) if layout == "interleaved" else ()
                if heads > 1 or not how:
                    yield (*turning, ("part", part), ("layout", layout), *how)
    squeezed = [tuple(extent for extent in shape if extent != 1) for shape in (theirs, ours)]
    merged = len(ours) == 4 and len(theirs) == 3 and theirs == (ours[0] * ours[1], *ours[2:])
    if merged or (squeezed[0] == squeezed[1] and theirs != ours):
        yield (("reshape", "step"),)


def _error(got: Array, wanted: Array, counting: Array | None) -> float:
    """The largest difference where it counts, over the largest magnitude there."""
    if wanted.dtype.kind in "iub":
        return float((got != wanted).mean())
    selected = np.ones(wanted.shape, bool) if counting is None else np.broadcast_to(counting, wanted.shape)
    with np.errstate(all="ignore"):
        one, two = got[selected].astype(np.float64), wanted[selected].astype(np.float64)
        largest = np.abs(two).max(initial=0.0)
        return float(np.abs(one - two).max(initial=0.0) / largest) if largest > 0 else float(np.abs(one).max(initial=0.0))


def _counting(
    step: str, shape: tuple[int, ...], model: Backbone, inputs: Mapping[str, Array], ours: Mapping[str, Array]
) -> Array | None:
    """Which values of a step count, to be broadcast to its shape: those of real tokens, and scores of permitted keys."""
    if model.family != "t5":
        real, mask = inputs["padding_mask"], "causal_mask"
    else:
        cross = "cross_attention." in step and (".key" in step or ".value" in step)
        encoder = step.startswith(("encoder", "t5_encoder")) or cross
        real = inputs["encoder_padding_mask" if encoder else "decoder_padding_mask"]
        mask = "t5_encoder:key_mask" if encoder else "t5_decoder:key_mask" if "cross_attention" in step else "causal_mask"
    permitted = next((array for name, array in ours.items() if name.endswith(mask)), None)
    if step.rpartition(":")[2] in ("attention_scores", "masked_softmax"):
        rows = real[:, None, :, None] if shape[2] == real.shape[1] else np.ones((1, 1, 1, 1), bool)
        return rows if permitted is None else np.asarray(permitted & rows)
    return real.reshape(*real.shape, *[1] * (len(shape) - 2)) if shape[:2] == real.shape else None


# -- text -------------------------------------------------------------------------------------------------------------------


def _folded(chosen: Mapping[str, list[Guess]], raw: Mapping[str, Array]) -> dict[str, list[Guess]]:
    """Entries that differ in the number of a layer alone are one pattern, if it is for nothing else."""
    groups: dict[tuple[str, tuple[Any, ...]], list[str]] = {}
    for theirs, guesses in chosen.items():
        for match in re.finditer(r"\d+", theirs):
            number = int(match[0])
            layers = {int(found) for guess in guesses for found in re.findall(r"\blayers\.(\d+)", guess.step)}
            if str(number) != match[0] or len(layers) != 1 or "{" in theirs:
                continue
            offset = layers.pop() - number
            hole = f"{{i{offset:+d}}}" if offset else "{i}"
            steps = tuple((re.sub(r"\blayers\.\d+", f"layers.{hole}", guess.step), _toml(guess.moves)) for guess in guesses)
            groups.setdefault((f"{theirs[: match.start()]}{{i}}{theirs[match.end() :]}", steps), []).append(theirs)
    patterns: dict[str, tuple[str, tuple[Any, ...]]] = {}
    for (pattern, steps), names in sorted(groups.items(), key=lambda item: -len(item[1])):
        fits = [name for name in raw if Entry(pattern, "", (), "").matched(name) is not None]
        if len(names) > 1 and not patterns.keys() & names and all(name in chosen for name in fits):
            patterns |= dict.fromkeys(names, (pattern, steps))
    found: dict[str, list[Guess]] = {}
    for theirs, guesses in chosen.items():
        if theirs not in patterns:
            found[theirs] = guesses
            continue
        pattern, steps = patterns[theirs]
        before = found.get(pattern)
        errors = [max(g.error, b.error) for g, b in zip(guesses, before or guesses, strict=True)]
        found[pattern] = [
            Guess(step, guess.moves, error) for (step, _), guess, error in zip(steps, guesses, errors, strict=True)
        ]
    return found


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml(value: Any) -> str:
    return _quoted(value) if isinstance(value, str) else json.dumps(value)
