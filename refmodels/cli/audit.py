"""`refmodels audit`: where a checkpoint overflows or loses precision in a low type, and what to keep in float32."""

import argparse
import math
import random
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from refmodels.backbone import Backbone
from refmodels.files import read_bytes
from refmodels.printing import print_json, print_rows, progress
from refmodels.task import Task
from refmodels.verification.audit import LARGEST, Audit, audit

REACHED, NOT_REACHED = 0, 1
SHOWN = 12
"""Kinds of steps in the table: those with the largest shares."""


def run(arguments: argparse.Namespace) -> int:
    """Audit, print; the exit status."""
    preset, dtype, text, tokens = arguments.preset, arguments.dtype, arguments.text, arguments.tokens
    if dtype not in LARGEST:
        raise ValueError(f"--dtype must be one of {', '.join(LARGEST)}, got {dtype!r}")
    content = None if text is None else _text(Path(text))
    with redirect_stdout(sys.stderr):  # downloads report their progress on either stream
        if content is None:
            model = Backbone.from_preset(preset, dtype="float32")
            ids = _random_ids(model, tokens)
        else:
            model, ids = _text_ids(preset, content, tokens)
    inputs = model_inputs(model, ids)
    found = audit(model, inputs, dtype, target=arguments.target, progress=lambda kind: progress(f"rounding {kind}"))
    what = f"{len(ids)} tokens of {text}" if text is not None else f"{len(ids)} random tokens"
    if arguments.json:
        print_json({"preset": preset, "tokens": len(ids), "text": text, **record(found)})
    else:
        _print(preset, what, found)
    return REACHED if found.reached else NOT_REACHED


def model_inputs(model: Backbone, ids: list[int]) -> dict[str, Any]:
    """One row of these tokens; T5's decoder is given the same, behind the token it starts with."""
    if model.family != "t5":
        return {"token_ids": [ids], "padding_mask": [[True] * len(ids)]}
    target = [0, *ids[: max(len(ids) // 2, 1)]]
    return {
        "encoder_token_ids": [ids],
        "encoder_padding_mask": [[True] * len(ids)],
        "decoder_token_ids": [target],
        "decoder_padding_mask": [[True] * len(target)],
    }


def _text(path: Path) -> str:
    try:
        return read_bytes(path.parent, path.name).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid UTF-8, at byte {error.start}") from None


def _random_ids(model: Backbone, tokens: int) -> list[int]:
    count = min(tokens, getattr(model.config, "max_sequence_length", None) or tokens)
    size, generator = model.config.vocabulary_size, random.Random(0)
    return [generator.randrange(min(3, size - 1), size) for _ in range(count)]


def _text_ids(preset: str, text: str, tokens: int) -> tuple[Backbone, list[int]]:
    task = Task.from_preset(preset, dtype="float32")
    if task.tokenizer is None:
        raise ValueError(f"preset {preset} has no tokenizer files: leave --text out for random tokens")
    count = min(tokens, getattr(task.backbone.config, "max_sequence_length", None) or tokens)
    ids = [int(token) for token in task.tokenizer.tokenize(text)][:count]
    if not ids:
        raise ValueError("--text has no tokens")
    return task.backbone, ids


def record(found: Audit) -> dict[str, Any]:
    """The audit as JSON holds it: no infinities, which are null."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    first = found.first_overflow
    return {
        "dtype": found.dtype,
        "target": found.target,
        "reached": found.reached,
        "error": {"plain": number(found.plain), "weights": number(found.weights), "kept": number(found.kept)},
        "agreement": {"plain": found.agreement[0], "kept": found.agreement[1]},
        "keep": list(found.keep),
        "first_overflow": None if first is None else first.name,
        "kinds": [{**vars(share), "error": number(share.error)} for share in found.shares],
        "layers": [{**vars(layer), "plain": number(layer.plain), "kept": number(layer.kept)} for layer in found.layers],
        "steps": [{"name": s.name, "largest": s.largest, "headroom": number(s.headroom)} for s in found.steps],
    }


def _print(preset: str, what: str, found: Audit) -> None:
    print(f"{preset} in {found.dtype}, {what}")
    first = found.first_overflow
    if first is not None:
        print(f"overflows first at {first.name}: values of {first.largest:.4g}")
    print("\nWhat rounding one kind of step does to the logits")
    rows = [("STEP", "LARGEST", "OVERFLOWS IN", "ERROR", "")]
    for share in found.shares[:SHOWN]:
        over = f"{share.overflowing} of {share.steps}" if share.overflowing else ""
        rows.append((share.kind, f"{share.largest:.4g}", over, _size(share.error), "keep" if share.kind in found.keep else ""))
    print_rows(rows, right=(1, 2, 3))
    print("\nHow far the residual stream drifts")
    drifts = [("LAYER", "LARGEST", "ALL ROUNDED", "KEPT")]
    drifts += [(layer.name, f"{layer.largest:.4g}", _size(layer.plain), _size(layer.kept)) for layer in found.layers]
    print_rows(drifts, right=(1, 2, 3))
    print("\nThe logits")
    sums = [("", "ERROR", "SAME TOKEN"), ("parameters rounded", _size(found.weights), "")]
    sums += [("all rounded", _size(found.plain), f"{found.agreement[0]:.1%}")]
    sums += [("kept", _size(found.kept), f"{found.agreement[1]:.1%}")]
    print_rows(sums, right=(1, 2))
    said = "nothing need be kept" if not found.keep else f"keep in float32: {', '.join(found.keep)}"
    print(f"\n{said if found.reached else 'no set of steps is enough'} (target {found.target:.3g})", flush=True)


def _size(error: float) -> str:
    return f"{error:.2g}" if math.isfinite(error) else "overflow"
