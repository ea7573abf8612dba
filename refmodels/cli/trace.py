"""`refmodels trace`: the steps of a run, as one file (`spec/traces.md`)."""

import argparse
import platform
from fnmatch import fnmatchcase

import numpy as np

from refmodels import __version__
from refmodels.backbone import Backbone
from refmodels.cli.streams import stdout_aside
from refmodels.op import Array
from refmodels.preprocessors import CausalLMPreprocessor, T5Seq2SeqLMPreprocessor
from refmodels.printing import progress
from refmodels.trace import traced
from refmodels.verification.forms import read_inputs
from refmodels.verification.verify import cases


def run(arguments: argparse.Namespace) -> None:
    """`refmodels trace`."""
    with stdout_aside():
        progress(f"loading {arguments.preset}")
        model = Backbone.from_preset(arguments.preset, dtype=arguments.dtype)  # on the reference: a kernel would hide steps
        inputs = trace_inputs(arguments, model)
        t = traced(model, inputs, lambda name: not arguments.only or any(fnmatchcase(name, only) for only in arguments.only))
    if not t.steps:
        raise ValueError(f"--only {arguments.only[0]}: no step has such a name: without it, every step is written")
    t.inputs = inputs
    t.facts = {
        "source": "refmodels",
        "refmodels": __version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "preset": str(arguments.preset),
        "family": model.family,
        "dtype": str(model.config.dtype),
    }
    t.save(arguments.output)
    print(f"{arguments.output}: {len(t)} steps", flush=True)


def trace_inputs(arguments: argparse.Namespace, model: Backbone) -> dict[str, Array]:
    """The inputs of a trace: of a text, of a file, or of one of our own cases."""
    if arguments.text is not None and arguments.inputs is not None:
        raise ValueError("--text and --inputs are two ways to say one thing: give one of them")
    if arguments.target is not None and (arguments.text is None or model.family != "t5"):
        raise ValueError("--target is what T5 is to answer to --text")
    if arguments.inputs is not None:
        return read_inputs(arguments.inputs, model)
    if arguments.text is None:
        return dict(cases(model, arguments.seed)[0].inputs)
    return text_inputs(arguments.preset, model, arguments.text, arguments.target)


def text_inputs(preset: str, model: Backbone, text: str, target: str | None) -> dict[str, Array]:
    """One row of tokens: of a text, and for T5 of its answer so far."""
    longest = getattr(model.config, "max_sequence_length", None) or 4096
    if model.family == "t5":
        preprocessor = T5Seq2SeqLMPreprocessor.from_preset(preset)
        both = {"encoder_text": [text], "decoder_text": [target or ""]}
        found = preprocessor.generate_preprocess(both, sequence_length=longest)
    else:
        found = CausalLMPreprocessor.from_preset(preset).generate_preprocess([text], sequence_length=longest)
    inputs = {}
    for token, (mask, *_) in model.inputs.items():
        real = np.asarray(found[mask], bool)
        length = max(1, int(real.sum()))
        inputs[token], inputs[mask] = np.asarray(found[token])[:, :length], real[:, :length]
    return inputs
