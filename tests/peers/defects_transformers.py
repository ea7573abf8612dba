"""Transformers as it is released, in the settings in which it has a defect, for `refmodels verify` (spec/defects/).

cd tests/peers
python -m refmodels verify defects_transformers:bloom_slow_but_exact --like bloom_tiny_stdlib
"""

from pathlib import Path

from refmodels.verification.adaptors.transformers import TransformersCandidate


def loaded(kind, checkpoint, model, **options):
    """The class of Transformers with these files, in this model's type."""
    import torch
    import transformers

    options = {"attn_implementation": "eager", "dtype": getattr(torch, model.compute_dtype)} | options
    return TransformersCandidate(getattr(transformers, kind).from_pretrained(checkpoint, **options).eval())


def bloom_slow_but_exact(checkpoint, model):
    """BLOOM with its products in the slices of tensor parallelism, as its configuration may ask."""
    return loaded("BloomForCausalLM", checkpoint, model, slow_but_exact=True, pretraining_tp=2)


def opt_sdpa(checkpoint, model):
    """OPT with fused attention, which has not the defect of the eager one."""
    return loaded("OPTForCausalLM", checkpoint, model, attn_implementation="sdpa")


def t5_without_shared(checkpoint, model):
    """T5 with a head of its own, and with its embedding stored as the decoder's alone, as madlad400 has it."""
    from safetensors.numpy import load_file, save_file

    weights = Path(checkpoint) / "model.safetensors"
    tensors = load_file(weights)
    tensors["decoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    save_file(tensors, weights, {"format": "pt"})
    return loaded("T5ForConditionalGeneration", checkpoint, model)
