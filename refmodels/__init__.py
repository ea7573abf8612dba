"""refmodels: the numerical reference for T5, OPT and BLOOM.

    from refmodels import T5Seq2SeqLM
    T5Seq2SeqLM.from_preset("t5_tiny_numbers").generate("spell: 4207")

Every layer is a readable NumPy function that acts as the specification. Importing this package needs NumPy alone; weights,
tokenizers and accelerators are imported when used.
"""

from refmodels.accelerator import Accelerator, AcceleratorError, use
from refmodels.backbone import Backbone
from refmodels.bloom import BloomBackbone, BloomCausalLM
from refmodels.op import OPS, Op, ShapeError, op, watching
from refmodels.opt import OPTBackbone, OPTCausalLM
from refmodels.t5 import T5Backbone, T5Seq2SeqLM
from refmodels.task import CausalLM, Seq2SeqLM

__version__ = "0.1.0"

__all__ = [
    "OPS",
    "Accelerator",
    "AcceleratorError",
    "Backbone",
    "BloomBackbone",
    "BloomCausalLM",
    "CausalLM",
    "OPTBackbone",
    "OPTCausalLM",
    "Op",
    "Seq2SeqLM",
    "ShapeError",
    "T5Backbone",
    "T5Seq2SeqLM",
    "op",
    "use",
    "watching",
]
