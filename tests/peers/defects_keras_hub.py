"""Defects of KerasHub as they are released, each as a function that shows it: what the pages in spec/defects/ say.

KERAS_BACKEND=tensorflow python tests/peers/defects_keras_hub.py t5_float16
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

from refmodels import Backbone, BloomBackbone
from refmodels.parameters import build_tree
from refmodels.verification.vectors import small_inputs, small_model
from refmodels.verification.verify import Case, verify


def verified(model, directory, case, dtype="float32"):
    import keras_hub

    from refmodels.verification.adaptors.keras_hub import KerasHubCandidate

    backbone = keras_hub.models.Backbone.from_preset(str(directory), dtype=dtype)
    return verify(KerasHubCandidate(backbone, model), model, [case])


def t5_1_1_gelu(directory):
    """A gated T5 as Google published it, its activation named as KerasHub's t5_1.1 presets name it."""
    model = small_model("t5")  # gelu_approximate: what `gated-gelu` means in the checkpoints
    model.save_to_preset(directory)
    config = json.loads((directory / "config.json").read_text())
    config["config"]["activation"] = "gelu"
    (directory / "config.json").write_text(json.dumps(config))
    return verified(model, directory, Case("padded", small_inputs(model)))


def t5_float16(directory):
    """T5 in float16 on JAX or TensorFlow."""
    small_model("t5").save_to_preset(directory)
    model = Backbone.from_preset(directory, dtype="float16")
    return verified(model, directory, Case("padded", small_inputs(model)), "float16")


def alibi_bfloat16(directory):
    """BLOOM in bfloat16 on 600 tokens."""
    model = BloomBackbone(vocabulary_size=31, num_layers=1, num_heads=16, hidden_dim=32, intermediate_dim=128, dtype="bfloat16")
    generator = np.random.default_rng(0)

    def leaf(parameter):
        values = generator.standard_normal(parameter.shape) * 0.3 + parameter.path.endswith("gamma")
        return values.astype(np.float32).astype(model.array(parameter.path).dtype)

    model.params = build_tree(model.plain_parameters(), leaf)
    model.save_to_preset(directory)
    ids = np.random.default_rng(1).integers(3, 31, (1, 600))
    return verified(model, directory, Case("600 tokens", {"token_ids": ids, "padding_mask": ids > 0}), "bfloat16")


DEFECTS = {function.__name__: function for function in (t5_1_1_gelu, t5_float16, alibi_bfloat16)}


def said(result):
    """A verification in a few lines."""
    report = result.cases[0].report
    lines = [", ".join(f"{name} {value}" for name, value in result.facts.items())]
    lines += [step.local.reason for step in report.wrong]
    return [*lines, f"{len(report.wrong)} of {len(report.steps)} steps are wrong, first {report.first and report.first.name}"]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        print("\n".join(said(DEFECTS[sys.argv[1]](Path(place)))))
