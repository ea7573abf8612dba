"""refmodels: the numerical reference for T5, OPT and BLOOM.

    from refmodels import T5Seq2SeqLM
    T5Seq2SeqLM.from_preset("t5_tiny_numbers").generate("spell: 4207")

Every layer is a readable NumPy function that acts as the specification. Importing this package needs NumPy alone; weights,
tokenizers and accelerators are imported when used.
"""

from refmodels import samplers
from refmodels.accelerator import Accelerator, AcceleratorError, use
from refmodels.backbone import Backbone
from refmodels.bloom import BloomBackbone, BloomCausalLM
from refmodels.causal_lm import CausalLM
from refmodels.files import CheckpointError
from refmodels.op import OPS, Op, ShapeError, op, watching
from refmodels.opt import OPTBackbone, OPTCausalLM
from refmodels.preprocessors import (
    BloomCausalLMPreprocessor,
    CausalLMPreprocessor,
    OPTCausalLMPreprocessor,
    Preprocessor,
    Seq2SeqLMPreprocessor,
    T5Preprocessor,
    T5Seq2SeqLMPreprocessor,
)
from refmodels.seq_2_seq_lm import Seq2SeqLM
from refmodels.t5 import T5Backbone, T5Seq2SeqLM
from refmodels.task import Task
from refmodels.tokenizers import BloomTokenizer, OPTTokenizer, T5Tokenizer, Tokenizer

__version__ = "0.1.0"

__all__ = [
    "OPS",
    "Accelerator",
    "AcceleratorError",
    "Backbone",
    "BloomBackbone",
    "BloomCausalLM",
    "BloomCausalLMPreprocessor",
    "BloomTokenizer",
    "CausalLM",
    "CausalLMPreprocessor",
    "CheckpointError",
    "OPTBackbone",
    "OPTCausalLM",
    "OPTCausalLMPreprocessor",
    "OPTTokenizer",
    "Op",
    "Preprocessor",
    "Seq2SeqLM",
    "Seq2SeqLMPreprocessor",
    "ShapeError",
    "T5Backbone",
    "T5Preprocessor",
    "T5Seq2SeqLM",
    "T5Seq2SeqLMPreprocessor",
    "T5Tokenizer",
    "Task",
    "Tokenizer",
    "op",
    "samplers",
    "use",
    "watching",
]
