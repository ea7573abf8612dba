"""Faults of what is before the layers and behind them: embeddings, positions, the head."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from refmodels.backbone import Backbone
from refmodels.ops.precision import narrow, wide
from refmodels.verification.signatures.fault import (
    Change,
    Compared,
    Fault,
    Scene,
    Symptom,
    Variant,
    changing,
    fault,
    instead,
    place_of,
    replaced,
)


def _is_tokens(name: str) -> bool:
    return place_of(name) == "token_embedding"


def _is_positions(name: str) -> bool:
    return place_of(name) == "position_embedding"


def _rows(shift: int, first: str = "") -> Change:
    """Rows of a table further down; what would be before the first row is the first row again, or zero."""

    def change(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
        ids = arguments["ids"] + shift
        table = arguments["embeddings"]
        found = run(**{**arguments, "ids": np.clip(ids, 0, len(table) - 1)})
        return np.where((ids < 0)[..., None], found.dtype.type(0), found) if first == "zero" else found

    return change


def _shifted_rows(scene: Scene, compared: Compared) -> Symptom | None:
    """Seen where the rows are looked up or added: the two rows that only their table has can be left out of account there."""
    theirs, truth = compared.theirs, compared.truth
    if scene.step not in ("position_embedding:embedding", "opt_backbone:add") or scene.inputs.get("position_ids") is not None:
        return None
    if theirs.shape != truth.shape or truth.shape[1] < 4:
        return None
    table = scene.model.params["position_embedding"]["embeddings"].astype(np.float64)[: truth.shape[1]]
    wanted = truth[:, 2:] + table[:-2] - table[2:]
    selected = True if compared.selected is None else np.broadcast_to(compared.selected, truth.shape)[:, 2:]
    error, size = np.abs(np.where(selected, theirs[:, 2:] - wanted, 0.0)), np.abs(wanted).max()
    return Symptom("position 2 has the row of position 0") if error.max() <= 4 * scene.arithmetic.u * size else None


def _counted(model: Backbone, inputs: Mapping[str, Any]) -> Iterator[Variant]:
    if inputs.get("padding_mask") is not None:
        mask = np.asarray(inputs["padding_mask"]).astype(bool)
        real = np.maximum(np.cumsum(mask, -1) - 1, 0)
        yield Variant(changing(["embedding"], replaced(ids=lambda a: real), _is_positions))


def _from_left(model: Backbone, inputs: Mapping[str, Any]) -> Iterator[Variant]:
    if inputs.get("position_ids") is not None:
        change = replaced(ids=lambda a: np.broadcast_to(np.arange(a["ids"].shape[1]), a["ids"].shape))
        yield Variant(changing(["embedding"], change, _is_positions))


def _scaled_rows(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
    found = run(**arguments)
    return narrow(wide(found) * wide(found).dtype.type(found.shape[-1] ** 0.5), found.dtype)


def _shifted_right(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
    ids = arguments["ids"]
    return run(**{**arguments, "ids": np.concatenate([np.zeros_like(ids[:, :1]), ids[:, :-1]], 1)})


EMBEDDING_FAULTS = [
    fault(
        "embeddings-scaled",
        "The token embeddings are multiplied by sqrt(n): take the rows as they are.",
        "embedding",
        _scaled_rows,
        where=_is_tokens,
    ),
    fault(
        "token-ids-shifted",
        "The rows of other token ids are taken.",
        "embedding",
        ("the id after", _rows(1)),
        ("the id before", _rows(-1)),
        where=_is_tokens,
    ),
    fault(
        "decoder-inputs-shifted",
        "The decoder's token ids are shifted right by the implementation: they are given as they are to be used.",
        "embedding",
        _shifted_right,
        families="t5",
        where=lambda name: name == "token_embedding:embedding.2",
    ),
    Fault(
        "embeddings-from-head-table",
        "Token embeddings are taken from the head's table: this checkpoint has one of its own.",
        ops=frozenset({"embedding"}),
        variants=lambda model, inputs: _tables(model, "reverse_embeddings", "embedding"),
    ),
    fault(
        "positions-missing",
        "The position embeddings are not added.",
        "embedding",
        lambda a, run: np.zeros_like(run(**a)),
        families="opt",
        where=_is_positions,
    ),
    Fault(
        "position-offset-missing",
        "Positions lack the offset of 2: position p has row p + 2 of the checkpoint's table.",
        ("opt",),
        frozenset({"embedding"}),
        lambda model, inputs: [
            Variant(changing(["embedding"], _rows(-2), _is_positions), "the first rows are the first row of ours"),
            Variant(changing(["embedding"], _rows(-2, "zero"), _is_positions), "the first two rows are zero"),
        ],
        _shifted_rows,
    ),
    fault(
        "position-offset-twice",
        "Positions have the offset of 2 twice, perhaps because the table was cut already: position p has row p + 2 of ours.",
        "embedding",
        _rows(2),
        families="opt",
        where=_is_positions,
    ),
    fault(
        "position-off-by-one",
        "Positions are off by one.",
        "embedding",
        ("each has the row of the one after", _rows(1)),
        ("each has the row of the one before, the first its own", _rows(-1)),
        ("each has the row of the one before, the first none", _rows(-1, "zero")),
        families="opt",
        where=_is_positions,
    ),
    Fault(
        "positions-skip-padding",
        "Positions count real tokens alone: they count from the left end, padding included, or are given as position_ids.",
        ("opt",),
        frozenset({"embedding"}),
        _counted,
    ),
    Fault(
        "positions-from-left",
        "Positions count from the left end, padding included, in place of the position_ids that were given.",
        ("opt",),
        frozenset({"embedding"}),
        _from_left,
    ),
]

# -- the head ---------------------------------------------------------------------------------------------------------------


def _tables(model: Backbone, table: str, op_name: str) -> Iterator[Variant]:
    p = model.params["token_embedding"]
    if "reverse_embeddings" not in p or "embeddings_scale" in p or "embeddings_zero" in p:
        return
    key, other = ("embeddings", p[table].T) if op_name == "embedding" else ("kernel", p[table].T)
    yield Variant(changing([op_name], replaced(**{key: lambda a: other.astype(a[key].dtype)}), _is_tokens))


def _head_scale(model: Backbone, inputs: Mapping[str, Any]) -> Iterator[Variant]:
    factor = float(model.params["token_embedding"]["embeddings"].shape[-1]) ** -0.5
    change = replaced(scale=lambda a: factor if a.get("scale", 1.0) == 1.0 else a["scale"])
    yield Variant(changing(["token_scores"], change))


HEAD_FAULTS = [
    fault(
        "logits-not-scaled",
        "The logits are not multiplied by n**-0.5, as those of a tied head of T5 are.",
        "token_scores",
        instead(scale=1.0),
        families="t5",
    ),
    fault(
        "logits-scaled-twice",
        "The logits are divided by n: the factor n**-0.5 is applied twice, perhaps to the hidden state and to the logits.",
        "token_scores",
        replaced(scale=lambda a: a.get("scale", 1.0) ** 2),
        families="t5",
    ),
    Fault(
        "logits-scaled",
        "The logits are multiplied by n**-0.5, which this head is not.",
        ops=frozenset({"token_scores"}),
        variants=_head_scale,
    ),
    Fault(
        "head-from-other-table",
        "The logits are products with the token embeddings: this checkpoint's head has a table of its own.",
        ops=frozenset({"linear"}),
        variants=lambda model, inputs: _tables(model, "embeddings", "linear"),
    ),
]

FAULTS: list[Fault] = [*EMBEDDING_FAULTS, *HEAD_FAULTS]
