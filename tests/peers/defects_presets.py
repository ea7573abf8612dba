"""Presets that pages in spec/defects/ need, of those not shipped: `python defects_presets.py t5_untied DIRECTORY`."""

import sys

import numpy as np

from refmodels import Backbone, BloomBackbone
from refmodels.parameters import build_tree
from refmodels.verification.vectors import small_model


def t5_untied():
    """A small gated T5 with a head of its own."""
    return small_model("t5")


def opt_low_scores():
    """The shipped OPT with biases that take about 20 from every score, which no softmax should see."""
    model = Backbone.from_preset("opt_tiny_stdlib")
    size = model.config.hidden_dim // model.config.num_heads
    shift = (20 / size**0.5) ** 0.5

    def leaf(parameter):
        ending = ".".join(parameter.path.split(".")[-2:])
        array = model.array(parameter.path)
        return {"query.bias": 0 * array + shift, "key.bias": 0 * array - shift}.get(ending, array).astype("float32")

    model.params = build_tree(model.plain_parameters(), leaf)
    return model


def bloom_12_heads():
    """A small BLOOM of 12 heads, whose slopes are no powers of two."""
    sizes = {"vocabulary_size": 31, "num_layers": 1, "num_heads": 12, "hidden_dim": 48, "intermediate_dim": 192}
    model = BloomBackbone(**sizes)
    generator = np.random.default_rng(0)

    def leaf(parameter):
        return (generator.standard_normal(parameter.shape) * 0.3 + parameter.path.endswith("gamma")).astype("float32")

    model.params = build_tree(model.plain_parameters(), leaf)
    return model


PRESETS = {function.__name__: function for function in (t5_untied, opt_low_scores, bloom_12_heads)}

if __name__ == "__main__":
    PRESETS[sys.argv[1]]().save_to_preset(sys.argv[2])
