"""Candidates to verify: our own small models with strong weights, run with a fault that is planted into one of their calls."""

import numpy as np

import refmodels
from refmodels.op import watching
from refmodels.trace import trace
from refmodels.verification.candidate import Candidate

SIZES = {
    "opt": (refmodels.OPTBackbone, (13, 2, 2, 8, 12), {"max_sequence_length": 20}),
    "t5": (refmodels.T5Backbone, (13, 2, 2, 8, 12), {}),
    "bloom": (refmodels.BloomBackbone, (13, 2, 2, 8, 12), {}),
}


def small_model(family, seed=0, dtype="float32"):
    """Weights of about 0.5, gains about 1 and biases, so that every step counts."""
    kind, sizes, more = SIZES[family]
    model = kind(*sizes, **more, dtype=dtype, seed=seed)
    generator = np.random.default_rng(seed)

    def strengthen(tree):
        for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
            if isinstance(child, dict | list):
                strengthen(child)
            else:
                mean = 1.0 if key in ("gamma", "scale") else 0.0
                child[...] = generator.normal(mean, 0.5, child.shape).astype(child.dtype)

    strengthen(model.params)
    return model


class Faulty(Candidate):
    """Our model in which `change(op, name, result)` is what a call gives; `keep` says which steps it lets out."""

    def __init__(self, model, change=lambda op, name, result: result, *, keep=lambda name: True, name="port", extra=()):
        self.model, self.change, self.keep = model, change, keep
        self.name, self.dtype, self.extra = name, model.compute_dtype, dict(extra)

    def run(self, inputs, inject=None):
        from refmodels.trace import Namer

        namer = Namer(self.model.params)

        def planted(op, args, kwargs, proceed):
            with namer.call(op, args, kwargs) as name:
                result = proceed()
            return self.change(op, name, result) if isinstance(result, np.ndarray) else result

        with trace(self.model, only=self.keep) as steps, watching(planted):
            hidden = self.model(inputs)
            self.model.logits(hidden["decoder_sequence_output"] if isinstance(hidden, dict) else hidden)
        return {**steps, **self.extra}

    def facts(self):
        return {"package": "port 1.0"}


def times(wanted, factor):
    """The fault: the step `wanted` gives this many times what it should."""
    return lambda op, name, result: result * result.dtype.type(factor) if name == wanted else result
