"""Small models whose every parameter matters, and runs of them with a fault in one step: what the tests of replays share."""

import numpy as np

from refmodels.bloom import BloomBackbone
from refmodels.op import watching
from refmodels.ops.precision import numpy_dtype
from refmodels.opt import OPTBackbone
from refmodels.parameters import build_tree
from refmodels.t5 import T5Backbone
from refmodels.trace import Namer, trace

CLASSES = {"opt": OPTBackbone, "bloom": BloomBackbone, "t5": T5Backbone}
FAMILIES = tuple(CLASSES)


def small(family, dtype="float32", *, layers=2, **config):
    """17, 3, 12, 20: sizes that cannot be taken for one another."""
    if family == "opt":
        config = {"max_sequence_length": 32} | config
    config = {"vocabulary_size": 17, "num_layers": layers, "num_heads": 3, "hidden_dim": 12, "intermediate_dim": 20} | config
    model = CLASSES[family](**config, dtype=dtype)
    rng = np.random.default_rng(5)

    def leaf(parameter):
        values = 0.4 * rng.standard_normal(parameter.shape)
        if parameter.path.endswith(("gamma", "weight")):
            values += 1.0
        return values.astype(numpy_dtype(model.variable_dtype))

    model.params = build_tree(model.plain_parameters(), leaf)
    return model


def inputs_of(family, rows=2, length=7, lengths=None, seed=1):
    """Token ids, and masks with padding on the right where `lengths` says so."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 17, (rows, length))
    mask = np.arange(length) < np.array(lengths or [length] * rows)[:, None]
    if family != "t5":
        return {"token_ids": ids, "padding_mask": mask}
    target = rng.integers(0, 17, (rows, 5))
    return {
        "encoder_token_ids": ids,
        "encoder_padding_mask": mask,
        "decoder_token_ids": target,
        "decoder_padding_mask": np.ones(target.shape, bool),
    }


def run_of(model, inputs, change=None):
    """The steps of a run; `change(name, result)` is what a step gives in it, and what the steps after it go on with."""
    namer = Namer(model.params)

    def planted(op, args, kwargs, proceed):
        with namer.call(op, args, kwargs) as name:
            result = proceed()
        return change(name, result) if change is not None and isinstance(result, np.ndarray) else result

    with trace(model) as steps, watching(planted):
        hidden = model(inputs)
        model.logits(hidden["decoder_sequence_output"] if isinstance(hidden, dict) else hidden)
    return steps
