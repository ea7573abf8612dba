"""Faults of the feed-forward layer: activations and gates."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from refmodels.backbone import Backbone
from refmodels.op import OPS
from refmodels.ops.precision import narrow, wide
from refmodels.verification.signatures.fault import (
    Fault,
    Variant,
    as_it_was,
    by,
    changing,
    fault,
    replaced,
)

GELUS = "gelu gelu_approximate"


def _logistic_gelu(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
    x = wide(arguments["x"])
    with np.errstate(over="ignore"):
        return narrow(x / (1 + np.exp(-1.702 * x)), arguments["x"].dtype)


ACTIVATION_FAULTS = [
    fault(
        "gelu-erf-for-tanh",
        "The gelu is the erf form where the checkpoint means the tanh form.",
        "gelu_approximate",
        by(OPS["gelu"]),
        families="t5 bloom",
    ),
    fault(
        "gelu-tanh-for-erf",
        "The gelu is the tanh form where the erf form is meant.",
        "gelu",
        by(OPS["gelu_approximate"]),
        families="t5",
    ),
    fault(
        "gelu-logistic",
        "The gelu is x times the logistic function of 1.702 x, a rougher form.",
        GELUS,
        _logistic_gelu,
        families="t5 bloom",
    ),
    fault("relu-for-gelu", "The activation is relu in place of gelu.", GELUS, by(OPS["relu"]), families="t5 bloom"),
    fault("silu-for-gelu", "The activation is silu in place of gelu.", GELUS, by(OPS["silu"]), families="t5 bloom"),
    fault(
        "gelu-for-relu",
        "The activation is gelu in place of relu.",
        "relu",
        ("the erf form", by(OPS["gelu"])),
        ("the tanh form", by(OPS["gelu_approximate"])),
        families="t5 opt",
    ),
    fault("silu-for-relu", "The activation is silu in place of relu.", "relu", by(OPS["silu"]), families="t5 opt"),
    fault(
        "gelu-for-silu",
        "The activation is gelu in place of silu.",
        "silu",
        ("the erf form", by(OPS["gelu"])),
        ("the tanh form", by(OPS["gelu_approximate"])),
        families="t5",
    ),
    fault(
        "activation-missing",
        "There is no activation between the two products of the feed-forward layer.",
        f"{GELUS} relu silu",
        as_it_was,
    ),
]

# -- gate -------------------------------------------------------------------------------------------------------------------


def _gates_swapped(arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
    p = arguments["p"]
    if "gate_projector" not in p:
        return run(**arguments)
    return run(**{**arguments, "p": {**p, "input_projector": p["gate_projector"], "gate_projector": p["input_projector"]}})


def _activated(model: Backbone, inputs: Mapping[str, Any]) -> Iterator[Variant]:
    activation = OPS.get({"linear": "linear_activation"}.get(model.config.activation, model.config.activation))
    if activation is not None:
        yield Variant(changing(["multiply"], replaced(y=lambda a: activation.reference(a["y"]))))


GATE_FAULTS = [
    fault(
        "gate-swapped",
        "The two products of the gated feed-forward layer are exchanged: the activation belongs to wi_0 (input_projector).",
        "t5_feedforward",
        _gates_swapped,
        families="t5",
    ),
    Fault(
        "gate-activated",
        "Both products of the gated feed-forward layer are activated: the gate wi_1 is not.",
        ("t5",),
        frozenset({"multiply"}),
        _activated,
    ),
    fault(
        "gate-missing",
        "The gate of the feed-forward layer is left out.",
        "multiply",
        as_it_was,
        families="t5",
    ),
]

FAULTS: list[Fault] = [*ACTIVATION_FAULTS, *GATE_FAULTS]
