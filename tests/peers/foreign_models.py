"""Small models of Transformers with weights that make every step count: none of them small, no bias or gain as it is drawn."""

import copy

SIZE = {"vocab_size": 64}
OPT = {
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "pad_token_id": 1,
}
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}

VARIANTS = {
    "opt": ("OPT", OPT),
    "opt_350m": ("OPT", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "opt_untied": ("OPT", OPT | {"tie_word_embeddings": False}),
    "bloom": ("Bloom", BLOOM),
    "bloom_12_heads": ("Bloom", BLOOM | {"hidden_size": 48, "n_head": 12}),
    "t5": ("T5", T5 | {"feed_forward_proj": "relu"}),
    "t5_gated": ("T5", T5 | {"feed_forward_proj": "gated-gelu", "scale_decoder_outputs": False, "d_kv": 6}),
    "t5_silu": ("T5", T5 | {"feed_forward_proj": "gated-silu"}),
}
CLASSES = {"OPT": "OPTForCausalLM", "Bloom": "BloomForCausalLM", "T5": "T5ForConditionalGeneration"}


def foreign_model(variant, dtype="float32", attention="eager", **options):
    """A model of this variant, always with the same weights."""
    import torch
    import transformers

    kind, sizes = VARIANTS[variant]
    config = getattr(transformers, f"{kind}Config")(**SIZE, **sizes, **options, attn_implementation=attention)
    made = getattr(transformers, CLASSES[kind])(config)
    if variant == "t5_gated":  # a head of its own
        made.lm_head.weight = torch.nn.Parameter(torch.empty_like(made.lm_head.weight))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(made.named_parameters()):
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + drawn / 4)
            elif "relative_attention_bias" in name or name.endswith("bias"):
                parameter.copy_(drawn)
            else:
                parameter.copy_(0.3 * drawn)
    return made.to(getattr(torch, dtype)).eval()


def copied(model):
    """A copy that may be spoilt."""
    return copy.deepcopy(model)
