"""Faults in a copy of Transformers, and variants of it that are right.

Each is put in at run time: into the source of one of its functions (`source`), or into the modules of one model (`module`).
For each fault stand the step at which it must be reported, and the name that it should be given.
"""

import contextlib
import inspect
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np

LEFT, RIGHT, LONG = "padded on the left", "padded on the right", "long"
ALL = ("one row", LEFT, RIGHT, LONG)


@dataclass(frozen=True)
class Fault:
    """`name` says what is wrong with it; `variant` of the model; `step` at which it must be found; `signature`, what it should
    be called; `patch(model)` is a context that puts it in."""

    name: str
    variant: str
    step: str
    signature: str
    patch: Callable[[Any], Any]
    cases: tuple[str, ...] = (LEFT,)
    dtype: str = "float32"
    attention: str = "eager"
    prepare: Callable[[Any], None] = lambda model: None  # before our model is made of it
    cached: bool = False  # what is verified are the logits of a run in chunks


@dataclass(frozen=True)
class Right:
    """A variant that computes the same by another way, and must not be flagged."""

    name: str
    variant: str
    patch: Callable[[Any], Any] = lambda model: contextlib.nullcontext()
    dtype: str = "float32"
    attention: str = "eager"
    products: str = ""
    cached: str = ""  # the cache with which its logits are computed, in chunks
    cases: tuple[str, ...] = (LEFT,)


# -- ways to put it in --------------------------------------------------------------------------------------------------------


def source(place, *edits, first=False):
    """A context: `place` (`OPTAttention.forward`, or the name of a function) is compiled again with each `old` as `new`, each
    of which must be there once, or for `first` at least once."""

    def patch(model):
        module = inspect.getmodule(type(model))
        *owner, name = place.split(".")
        holder = getattr(module, owner[0]) if owner else module
        static = isinstance(inspect.getattr_static(holder, name), staticmethod)
        text = textwrap.dedent(inspect.getsource(getattr(holder, name)))
        for old, new in edits:
            assert text.count(old) == 1 or (first and old in text), f"{old!r} is {text.count(old)} times in {place}"
            text = text.replace(old, new, 1)
        namespace = {}
        exec(compile(text.removeprefix("@staticmethod\n"), f"<{place}, edited>", "exec"), vars(module), namespace)
        function = namespace[name]
        return mock.patch.object(holder, name, staticmethod(function) if static else function)

    return patch


def module(change):
    """A context: `change(model)`; the model is a copy that is thrown away."""

    def patch(model):
        change(model)
        return contextlib.nullcontext()

    return patch


def forward(find, function):
    """A context: the module `find(model)` computes `function(module, its input)`."""

    def change(model):
        found = find(model)
        found.forward = types.MethodType(function, found)

    return module(change)


def masks(function):
    """A context: the causal mask of one of its models is changed by `function(mask)`."""

    def patch(model):
        place = inspect.getmodule(type(model))
        original = place.create_causal_mask
        return mock.patch.object(place, "create_causal_mask", lambda **given: function(original, given))

    return patch


def assign(path, value):
    """A context: the attribute at `path` (`model.decoder.layers.0.fc1.bias`) is `value(model)`."""

    def change(model):
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, value(model))

    return module(change)


def exchange(one, other):
    """A context: two submodules in each other's place."""

    def change(model):
        first, second = model.get_submodule(one), model.get_submodule(other)
        for path, found in ((one, second), (other, first)):
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, found)

    return module(change)


def identity(model):
    import torch

    return torch.nn.Identity()


def gelu(model):
    import torch

    return torch.nn.GELU()


def relu(model):
    import torch

    return torch.nn.ReLU()


def transposed(path):
    def value(model):
        import torch

        return torch.nn.Parameter(model.get_parameter(path).detach().T.contiguous())

    return assign(path, value)


# -- other formulas -----------------------------------------------------------------------------------------------------------


def norm(*, mean=True, outside=False, unbiased=False):
    """A layer norm that is wrong."""

    def function(self, x):
        deviation = x - x.mean(-1, keepdim=True)
        variance = deviation.pow(2).mean(-1, keepdim=True) if mean else x.pow(2).mean(-1, keepdim=True)
        if unbiased:
            variance = variance * x.shape[-1] / (x.shape[-1] - 1)
        root = variance.sqrt() + self.eps if outside else (variance + self.eps).sqrt()
        return (deviation if mean else x) / root * self.weight + self.bias

    return function


def without_causality(original, given):
    made = original(**given)
    return made.masked_fill(made[..., :1, :].expand_as(made) * 0 == 0, 0.0) + only_padding(given, made)


def only_padding(given, made):
    import torch

    forbidden = given["attention_mask"][:, None, None, :] == 0
    return torch.zeros_like(made).masked_fill(forbidden, torch.finfo(made.dtype).min)


def one_ahead(original, given):
    import torch

    made = original(**given)
    ones = torch.ones(made.shape[-2:], dtype=torch.bool).tril(1)
    return torch.zeros_like(made).masked_fill(~ones, torch.finfo(made.dtype).min) + only_padding(given, made)


def without_padding(original, given):
    return original(**given | {"attention_mask": given["attention_mask"] * 0 + 1})


def minus_infinity(original, given):
    made = original(**given)
    return made.masked_fill(made < 0, float("-inf"))


def layers(model):
    return model.model.decoder.layers if hasattr(model, "model") else model.transformer.h


def large_embeddings(model):
    """A residual stream whose squares float16 cannot hold."""
    import torch

    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1000)


def another_table(model):
    """The decoder's own table of biases for its cross-attention, or the like: a copy of the first layer's."""
    return model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias


def bias_in_cross_attention(model):
    cross = model.decoder.block[0].layer[1].EncDecAttention
    cross.relative_attention_bias, cross.has_relative_attention_bias = another_table(model), True


def bias_of_own(model):
    import torch

    attention = model.encoder.block[1].layer[0].SelfAttention
    attention.relative_attention_bias = torch.nn.Embedding(32, attention.n_heads)
    attention.has_relative_attention_bias = True


def own_bias_everywhere(model):
    bias_of_own(model)
    old = "if position_bias is None:"
    return source("T5Attention.forward", (old, "if position_bias is None or self.has_relative_attention_bias:"))(model)


def wrong_heads(model):
    for layer in layers(model):
        layer.self_attn.num_heads, layer.self_attn.head_dim = 8, 4


def swapped_parts(*order):
    """BLOOM's three parts, returned in another order."""
    names = [f"{part}_layer" for part in order]
    return source("BloomAttention._reshape", ("return query_layer, key_layer, value_layer", f"return {', '.join(names)}"))


def stale(model):
    """A cache whose newest keys are those of the call before."""
    import transformers

    original = transformers.DynamicCache.update

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = original(self, key_states, value_states, layer_idx, *args, **kwargs)
        if keys.shape[-2] > key_states.shape[-2]:
            start = keys.shape[-2] - key_states.shape[-2]
            keys = keys.clone()
            keys[..., start:, :] = keys[..., start - 1 : start, :]
        return keys, values

    return mock.patch.object(transformers.DynamicCache, "update", update)


def shifted_twice(model):
    original = type(model).forward

    def function(self, *args, **kwargs):
        return original(self, *args, **kwargs | {"decoder_input_ids": self._shift_right(kwargs["decoder_input_ids"])})

    return forward(lambda model: model, function)(model)


def unmasked(layer, args, kwargs):
    return args, kwargs | {"attention_mask": None}


def scaled_output(factor):
    def function(self, x):
        import torch

        return torch.nn.functional.linear(x * factor(x.shape[-1]), self.weight)

    return forward(lambda model: model.lm_head, function)


def scaled_embeddings(self, ids):
    import torch

    return torch.nn.functional.embedding(ids, self.weight) * self.embedding_dim**0.5


def rounded_products(self, x):
    """A dense layer whose product is one of bfloat16 numbers."""
    import torch

    return torch.nn.functional.linear(x.bfloat16(), self.weight.bfloat16()).float() + self.bias


def accumulated_in_half(self, x):
    """A dense layer that keeps its running sum in bfloat16."""
    total = self.bias.bfloat16()
    for i in range(x.shape[-1]):
        total = (total + x[..., i, None].bfloat16() * self.weight[:, i].bfloat16()).bfloat16()
    return total.to(x.dtype)


OPT, BLOOM, ENCODER, DECODER = "layers.0", "layers.0", "encoder.layers.0", "decoder.layers.0"
L0, H0 = "model.decoder.layers.0", "transformer.h.0"
FF = "encoder.block.0.layer.1.DenseReluDense"
RESIDUAL = "hidden_states = residual + hidden_states\n"
HEADS = ".view(bsz, -1, self.num_heads, self.head_dim).transpose(1, 2)"
WRONG_HEADS = ".view(bsz, -1, self.head_dim, self.num_heads).permute(0, 3, 1, 2)"
SLOPES = "closest_power_of_2 = 2 ** math.floor(math.log2(num_heads))"

FAULTS = [
    # -- OPT
    Fault(
        "scores not scaled", "opt", f"{OPT}.self_attention:attention_scores", "scores-not-scaled",
        source("OPTAttention.forward", ("self.q_proj(hidden_states) * self.scaling", "self.q_proj(hidden_states)")),
    ),
    Fault(
        "scores scaled twice", "opt", f"{OPT}.self_attention:attention_scores", "scale-applied-twice",
        source("OPTAttention.forward", ("scaling=1.0", "scaling=self.scaling")),
    ),
    Fault(
        "positions one too low", "opt", "position_embedding:embedding", "position-off-by-one",
        source("OPTLearnedPositionalEmbedding.forward", (
            "super().forward(position_ids + self.offset)",
            "nn.functional.embedding(position_ids + self.offset - 1, self.weight)",
        )),
    ),
    Fault(
        "positions one too high", "opt", "position_embedding:embedding", "position-off-by-one",
        source("OPTLearnedPositionalEmbedding.forward", (
            "super().forward(position_ids + self.offset)",
            "nn.functional.embedding(position_ids + self.offset + 1, self.weight)",
        )),
    ),
    Fault(
        "positions without the offset of 2", "opt", "position_embedding:embedding", "position-offset-missing",
        source("OPTLearnedPositionalEmbedding.forward", (
            "super().forward(position_ids + self.offset)", "nn.functional.embedding(position_ids, self.weight)",
        )),
    ),
    Fault("gelu for relu", "opt", f"{OPT}:relu", "gelu-for-relu", assign(f"{L0}.activation_fn", gelu)),
    Fault(
        "epsilon ten times too small", "opt", f"{OPT}.self_attention_layer_norm:layer_norm", "epsilon-wrong",
        assign(f"{L0}.self_attn_layer_norm.eps", lambda model: 1e-6),
    ),
    Fault(
        "epsilon outside the root", "opt", f"{OPT}.self_attention_layer_norm:layer_norm", "epsilon-outside-root",
        forward(lambda model: model.get_submodule(f"{L0}.self_attn_layer_norm"), norm(outside=True)),
    ),
    Fault(
        "unbiased variance", "opt", f"{OPT}.feedforward_layer_norm:layer_norm", "variance-unbiased",
        forward(lambda model: model.get_submodule(f"{L0}.final_layer_norm"), norm(unbiased=True)),
    ),
    Fault(
        "layer norm without mean", "opt", "layer_norm", "norm-without-mean",
        forward(lambda model: model.get_submodule("model.decoder.final_layer_norm"), norm(mean=False)),
    ),
    Fault(
        "residual missing", "opt", f"{OPT}:add", "residual-missing",
        source("OPTDecoderLayer.forward", (RESIDUAL, "\n")),
    ),
    Fault(
        "residual taken behind the norm", "opt", f"{OPT}:add", "residual-after-norm",
        source("OPTDecoderLayer.forward", (
            "hidden_states = self.self_attn_layer_norm(hidden_states)\n",
            "residual = hidden_states = self.self_attn_layer_norm(hidden_states)\n",
        ), first=True),
    ),
    Fault(
        "norm first in a model with norms last", "opt_350m", f"{OPT}.self_attention.query:linear", "norm-before-residual",
        assign(f"{L0}.do_layer_norm_before", lambda model: True),
    ),
    Fault(
        "square kernel transposed", "opt", f"{OPT}.feedforward_intermediate_dense:linear", "kernel-transposed",
        transposed(f"{L0}.fc1.weight"),
    ),
    Fault(
        "queries and keys swapped", "opt", f"{OPT}.self_attention.query:linear", "query-key-swapped",
        exchange(f"{L0}.self_attn.q_proj", f"{L0}.self_attn.k_proj"),
    ),
    Fault(
        "keys and values swapped", "opt", f"{OPT}.self_attention.key:linear", "key-value-swapped",
        exchange(f"{L0}.self_attn.k_proj", f"{L0}.self_attn.v_proj"),
    ),
    Fault(
        "bias of the output projection missing", "opt", f"{OPT}.self_attention.output:linear", "dense-bias-missing",
        assign(f"{L0}.self_attn.out_proj.bias", lambda model: None),
    ),
    Fault(
        "final norm missing", "opt", "opt_backbone", "final-norm-missing",
        assign("model.decoder.final_layer_norm", lambda model: None),
    ),
    Fault("causal mask missing", "opt", "opt_backbone:causal_mask", "causal-mask-missing", masks(without_causality)),
    Fault("causal mask off by one", "opt", "opt_backbone:causal_mask", "causal-mask-off-by-one", masks(one_ahead)),
    Fault("padding mask ignored", "opt", "opt_backbone:causal_mask", "padding-leaks", masks(without_padding)),
    Fault(
        "softmax over the queries", "opt", f"{OPT}.self_attention:masked_softmax", "softmax-wrong-axis",
        source("eager_attention_forward", ("softmax(attn_weights, dim=-1", "softmax(attn_weights, dim=-2")),
    ),
    Fault(
        "NaN in rows that permit no key, spreading", "opt", "layers.1.self_attention:masked_softmax",
        "nan-in-rows-without-keys", masks(minus_infinity),
    ),
    Fault(
        "mask too weak", "opt", f"{OPT}.self_attention:masked_softmax", "mask-additive-weak",
        source("eager_attention_forward", ("attn_weights + attention_mask", "attn_weights + attention_mask.clamp(min=-10.0)")),
    ),
    Fault(
        "mask added in bfloat16", "opt", f"{OPT}.self_attention:attention_scores", "kept-in-half-precision",
        source("eager_attention_forward", (
            "attn_weights + attention_mask", "(attn_weights.bfloat16() + attention_mask.bfloat16()).float()",
        )),
    ),
    Fault(
        "softmax in bfloat16", "opt", f"{OPT}.self_attention:masked_softmax", "softmax-in-half-precision",
        source("eager_attention_forward", ("dim=-1, dtype=torch.float32", "dim=-1, dtype=torch.bfloat16")),
    ),
    Fault(
        "mask behind the softmax", "opt", f"{OPT}.self_attention:masked_softmax", "mask-after-softmax",
        source("eager_attention_forward", (
            "attn_weights = attn_weights + attention_mask", "pass",
        ), (
            "attn_output = torch.matmul(attn_weights, value)",
            "attn_output = torch.matmul(attn_weights * (attention_mask == 0), value)",
        )),
    ),
    Fault(
        "dropout left on", "opt", f"{OPT}:add", "dropout-active", module(lambda model: model.train()),
    ),
    Fault("wrong number of heads", "opt", f"{OPT}.self_attention:split_heads.2", "head-count-wrong", module(wrong_heads)),
    Fault(
        "heads in the wrong order", "opt", f"{OPT}.self_attention:split_heads.2", "head-order",
        source("OPTAttention.forward", *[(f"{part}_states{HEADS}", f"{part}_states{WRONG_HEADS}")
               for part in ("query", "key", "value")]),
    ),
    Fault(
        "heads not moved back", "opt", f"{OPT}.self_attention:merge_heads", "heads-not-transposed",
        source("eager_attention_forward", ("attn_output.transpose(1, 2).contiguous()", "attn_output.contiguous()")),
    ),
    Fault(
        "products in bfloat16", "opt", f"{OPT}.feedforward_output_dense:linear", "half-precision-products",
        forward(lambda model: model.get_submodule(f"{L0}.fc2"), rounded_products),
    ),
    Fault(
        "sums in bfloat16", "opt", f"{OPT}.feedforward_output_dense:linear", "half-precision-accumulation",
        forward(lambda model: model.get_submodule(f"{L0}.fc2"), accumulated_in_half),
    ),
    Fault(
        "head of its own tied", "opt_untied", "opt_logits", "head-from-other-table",
        assign("lm_head.weight", lambda model: model.get_input_embeddings().weight),
    ),
    Fault("stale cache", "opt", "opt_logits", "", stale, cached=True, cases=("one row",)),
    # -- BLOOM
    Fault(
        "slopes reversed", "bloom", "bloom_backbone:alibi_bias", "slopes-reversed",
        source("_get_alibi_slopes", ("return slopes", "return slopes.flip(0)")),
    ),
    Fault(
        "slopes for 12 heads as for a power of two", "bloom_12_heads", "bloom_backbone:alibi_bias",
        "slopes-for-power-of-two-only", source("_get_alibi_slopes", (SLOPES, "closest_power_of_2 = num_heads")),
    ),
    Fault(
        "sign of ALiBi", "bloom", "bloom_backbone:alibi_bias", "alibi-sign",
        source("build_alibi_tensor", ("slopes[..., None] * arange_tensor", "-slopes[..., None] * arange_tensor")),
    ),
    Fault(
        "ALiBi in bfloat16", "bloom_12_heads", "bloom_backbone:alibi_bias", "alibi-in-half-precision",
        source("build_alibi_tensor", (".to(dtype)", ".to(torch.bfloat16).to(dtype)")),
    ),
    Fault(
        "ALiBi scaled with the scores", "bloom", f"{BLOOM}.self_attention:attention_scores", "bias-scaled-too",
        source("BloomAttention.forward", ("beta=self.beta", "beta=self.inv_norm_factor")),
    ),
    Fault(
        "scores not scaled", "bloom", f"{BLOOM}.self_attention:attention_scores", "scores-not-scaled",
        source("BloomAttention.forward", ("alpha=self.inv_norm_factor", "alpha=1.0")),
    ),
    Fault(
        "fused qkv taken as three blocks", "bloom", f"{BLOOM}.self_attention.query:linear", "qkv-interleaved",
        source(
            "BloomAttention._reshape",
            ("self.num_heads, 3, self.head_dim)", "3, self.num_heads, self.head_dim).transpose(2, 3)"),
        ),
    ),
    Fault(
        "keys and values swapped", "bloom", f"{BLOOM}.self_attention.key:linear", "key-value-swapped",
        swapped_parts("query", "value", "key"),
    ),
    Fault(
        "erf gelu for tanh", "bloom", f"{BLOOM}:gelu_approximate", "gelu-erf-for-tanh", assign(f"{H0}.mlp.gelu_impl", gelu),
    ),
    Fault(
        "embedding norm missing", "bloom", "embedding_layernorm:layer_norm", "embedding-norm-missing",
        assign("transformer.word_embeddings_layernorm", identity),
    ),
    Fault(
        "residual taken behind the norm", "bloom", f"{BLOOM}:add", "residual-after-norm",
        assign(f"{H0}.apply_residual_connection_post_layernorm", lambda model: True),
    ),
    Fault(
        "layer norm without mean", "bloom", "final_layernorm:layer_norm", "norm-without-mean",
        forward(lambda model: model.transformer.ln_f, norm(mean=False)),
    ),
    Fault(
        "bias of the feed-forward output missing", "bloom", f"{BLOOM}.mlp_output_dense:linear", "dense-bias-missing",
        assign(f"{H0}.mlp.dense_4h_to_h.bias", lambda model: None),
    ),
    Fault(
        "logits scaled", "bloom", "token_embedding:logits_from_embeddings", "logits-scaled",
        scaled_output(lambda n: n**-0.5),
    ),
    Fault(
        "embeddings scaled", "bloom", "token_embedding:embedding", "embeddings-scaled",
        forward(lambda model: model.transformer.word_embeddings, scaled_embeddings),
    ),
    # -- T5
    Fault(
        "scores scaled", "t5", f"{ENCODER}.self_attention:attention_scores", "scores-scaled",
        assign("encoder.block.0.layer.0.SelfAttention.scaling", lambda model: 8**-0.5),
    ),
    Fault(
        "causal buckets in the encoder", "t5", "t5_encoder:relative_position_buckets", "causal-buckets-in-encoder",
        source("T5Attention.compute_bias", ("bidirectional=(not self.is_decoder)", "bidirectional=False")),
    ),
    Fault(
        "bidirectional buckets in the decoder", "t5", "t5_decoder:relative_position_buckets",
        "bidirectional-buckets-in-decoder",
        source("T5Attention.compute_bias", ("bidirectional=(not self.is_decoder)", "bidirectional=True")),
    ),
    Fault(
        "largest distance wrong", "t5", "t5_encoder:relative_position_buckets", "bucket-distance-wrong",
        assign("encoder.block.0.layer.0.SelfAttention.relative_attention_max_distance", lambda model: 64), cases=(LONG,),
    ),
    Fault(
        "sign of the relative position", "t5", "t5_encoder:relative_position_buckets", "relative-position-sign",
        source("T5Attention.compute_bias", ("memory_position - context_position", "context_position - memory_position")),
    ),
    Fault(
        "position bias missing", "t5", f"{ENCODER}.self_attention:attention_scores", "bias-missing",
        source("eager_attention_forward", ("if position_bias is not None:", "if False:")),
    ),
    Fault(
        "position bias in cross-attention", "t5", f"{DECODER}.cross_attention:attention_scores", "bias-in-cross-attention",
        module(bias_in_cross_attention),
    ),
    Fault(
        "position bias of its own in the second layer", "t5", "encoder.layers.1.self_attention:attention_scores", "",
        own_bias_everywhere,
    ),
    Fault(
        "position bias in the first layer only", "t5", "encoder.layers.1.self_attention:attention_scores",
        "bias-in-first-layer-only",
        source("T5LayerSelfAttention.forward", ("position_bias=position_bias", "position_bias=None")),
    ),
    Fault(
        "rms norm with a mean", "t5", f"{ENCODER}.self_attention_layer_norm:rms_norm", "norm-with-mean",
        source("T5LayerNorm.forward", (
            "variance = ", "hidden_states = hidden_states - hidden_states.mean(-1, keepdim=True)\n    variance = ",
        )),
    ),
    Fault(
        "epsilon ten times too large", "t5_gated", f"{ENCODER}.self_attention_layer_norm:rms_norm", "epsilon-wrong",
        assign("encoder.block.0.layer.0.layer_norm.variance_epsilon", lambda model: 1e-5),
    ),
    Fault(
        "activation on the gate too", "t5_gated", f"{ENCODER}:multiply", "gate-activated",
        source("T5DenseGatedActDense.forward",
               ("hidden_linear = self.wi_1(hidden_states)", "hidden_linear = self.act(self.wi_1(hidden_states))")),
    ),
    Fault(
        "activation on the gate alone", "t5_gated", f"{ENCODER}:gelu_approximate", "gate-swapped",
        source("T5DenseGatedActDense.forward", ("self.act(self.wi_0(hidden_states))", "self.wi_0(hidden_states)"),
               ("hidden_linear = self.wi_1(hidden_states)", "hidden_linear = self.act(self.wi_1(hidden_states))")),
    ),
    Fault(
        "gate and activated part swapped", "t5_gated", f"{ENCODER}.input_projector:linear", "gate-swapped",
        exchange(f"{FF}.wi_0", f"{FF}.wi_1"),
    ),
    Fault(
        "gate missing", "t5_gated", f"{ENCODER}:multiply", "gate-missing",
        source("T5DenseGatedActDense.forward", ("hidden_gelu * hidden_linear", "hidden_gelu")),
    ),
    Fault(
        "erf gelu for tanh", "t5_gated", f"{ENCODER}:gelu_approximate", "gelu-erf-for-tanh", assign(f"{FF}.act", gelu),
    ),
    Fault("relu for gelu", "t5_gated", f"{ENCODER}:gelu_approximate", "relu-for-gelu", assign(f"{FF}.act", relu)),
    Fault(
        "logits not scaled", "t5", "token_embedding:logits_from_embeddings", "logits-not-scaled",
        module(lambda model: setattr(model.config, "scale_decoder_outputs", False)),
    ),
    Fault(
        "logits scaled twice", "t5", "token_embedding:logits_from_embeddings", "logits-scaled-twice",
        scaled_output(lambda n: n**-0.5),
    ),
    Fault(
        "decoder's tokens shifted twice", "t5", "token_embedding:embedding.2", "decoder-inputs-shifted", shifted_twice,
    ),
    Fault(
        "embeddings from the head", "t5_gated", "token_embedding:embedding", "embeddings-from-head-table",
        assign("encoder.embed_tokens.weight", lambda model: model.lm_head.weight),
    ),
    Fault(
        "encoder's final norm missing", "t5", "encoder.layer_norm:rms_norm", "final-norm-missing",
        assign("encoder.final_layer_norm", identity),
    ),
    Fault(
        "padding of the encoder seen by the decoder", "t5", f"{DECODER}.cross_attention:masked_softmax",
        "encoder-mask-ignored-in-cross-attention",
        module(lambda model: [block.layer[1].register_forward_pre_hook(unmasked, with_kwargs=True)
                              for block in model.decoder.block]),
    ),
    Fault(
        "residual of the feed-forward missing", "t5", f"{ENCODER}:add.2", "residual-missing",
        source("T5LayerFF.forward", ("hidden_states + self.dropout(forwarded_states)", "self.dropout(forwarded_states)")),
    ),
    Fault(
        "overflow in a float16 norm", "t5", f"{ENCODER}.self_attention_layer_norm:rms_norm", "norm-in-half-precision",
        source("T5LayerNorm.forward", ("hidden_states.to(torch.float32).pow(2)", "hidden_states.pow(2)")),
        dtype="float16", prepare=large_embeddings,
    ),
]  # fmt: skip


# -- variants that are right --------------------------------------------------------------------------------------------------


def in_two_parts(self, x):
    """A dense layer whose sum is taken in two halves."""
    import torch

    half = x.shape[-1] // 2
    first = torch.nn.functional.linear(x[..., :half], self.weight[:, :half])
    return first + torch.nn.functional.linear(x[..., half:], self.weight[:, half:]) + self.bias


def last_term_first(self, x):
    """A dense layer whose sum is taken from the last term to the first."""
    import torch

    return torch.nn.functional.linear(x.flip(-1), self.weight.flip(-1), self.bias)


def fused_product(model):
    """One product for queries, keys and values."""
    import torch

    for layer in layers(model):
        parts = [getattr(layer.self_attn, f"{part}_proj") for part in "qkv"]
        for i, part in enumerate(parts):

            def function(self, x, i=i, parts=parts):
                weight, bias = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "bias"))
                return torch.nn.functional.linear(x, weight, bias).chunk(3, -1)[i]

            part.forward = types.MethodType(function, part)


def folded_norm(self, x):
    """A layer norm as one product and one sum."""
    mean = x.mean(-1, keepdim=True)
    gain = (x.var(-1, unbiased=False, keepdim=True) + self.eps).rsqrt() * self.weight
    return x * gain + (self.bias - mean * gain)


def one_pass_norm(self, x):
    """A layer norm whose variance is the mean of the squares less the square of the mean, in float64."""
    wide = x.double()
    variance = (wide * wide).mean(-1, keepdim=True) - wide.mean(-1, keepdim=True) ** 2
    return ((wide - wide.mean(-1, keepdim=True)) / (variance + self.eps).sqrt()).to(x.dtype) * self.weight + self.bias


def wide_head(self, x):
    import torch

    return torch.nn.functional.linear(x.float(), self.weight.float())


def norms(function):
    def change(model):
        import torch

        for found in model.modules():
            if isinstance(found, torch.nn.LayerNorm):
                found.forward = types.MethodType(function, found)

    return module(change)


def relative_alibi(model):
    """ALiBi counted from the query."""
    place = inspect.getmodule(type(model))

    def function(attention_mask, num_heads, dtype):
        import torch

        batch, length = attention_mask.shape
        places = torch.arange(length)
        bias = place._get_alibi_slopes(num_heads, None)[:, None, None] * (places - places[:, None])
        return bias.repeat(batch, 1, 1).to(dtype)

    return mock.patch.object(place, "build_alibi_tensor", function)


@contextlib.contextmanager
def tf32(model):
    """Every product takes its inputs with 11 bits, as the GPU's TF32 does."""
    import torch
    from torch.overrides import TorchFunctionMode

    def rounded(value):
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        bits = value.detach().numpy().view(np.uint32).astype(np.uint64)
        bits = (bits + 0x0FFF + ((bits >> 13) & 1)) & 0xFFFFE000
        return torch.from_numpy(bits.astype(np.uint32).view(np.float32))

    class TF32(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func.__name__ in ("linear", "matmul", "bmm"):
                args = (*map(rounded, args[:2]), *args[2:])
            return func(*args, **(kwargs or {}))

    with TF32():
        yield


SOFTMAX = "nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)"
SUM = (
    "attn_weights = torch.einsum('bhtd,bhsd->bhts', query, key) * scaling",
    "torch.exp(attn_weights - attn_weights.amax(-1, keepdim=True)); attn_weights = attn_weights / attn_weights.sum(-1, True)",
)
PRODUCT = "attn_weights = torch.matmul(query, key.transpose(-1, -2)) * scaling"
DENSE = f"{L0}.fc1"

RIGHT_ONES = [
    Right("as it is", "opt", cases=ALL),
    Right("as it is, with norms last", "opt_350m", cases=ALL),
    Right("as it is", "bloom", cases=ALL),
    Right("as it is, with 12 heads", "bloom_12_heads", cases=ALL),
    Right("as it is", "t5", cases=ALL),
    Right("as it is, with a gate", "t5_gated", cases=ALL),
    Right("fused attention", "opt", attention="sdpa"),
    Right("fused attention", "t5_gated", attention="sdpa"),
    Right("sums in two parts", "opt", forward(lambda model: model.get_submodule(DENSE), in_two_parts)),
    Right("sums from the other end", "opt", forward(lambda model: model.get_submodule(DENSE), last_term_first)),
    Right("one product for queries, keys and values", "opt", module(fused_product)),
    Right("norm as one product and one sum", "opt", norms(folded_norm)),
    Right("norm with its variance in one pass, in float64", "bloom", norms(one_pass_norm)),
    Right(
        "scores scaled behind the product", "opt",
        source("OPTAttention.forward", ("self.q_proj(hidden_states) * self.scaling", "self.q_proj(hidden_states)"),
               ("scaling=1.0", "scaling=self.scaling")),
    ),
    Right("attention written out", "opt", source("eager_attention_forward", (PRODUCT, SUM[0]), (SOFTMAX, SUM[1]))),
    Right(
        "mask of -1e9", "opt",
        source("eager_attention_forward", ("attn_weights + attention_mask", "attn_weights + attention_mask.clamp(min=-1e9)")),
    ),
    Right("ALiBi from the query", "bloom_12_heads", relative_alibi),
    Right("TF32, declared", "opt", tf32, products="tf32"),
    Right("TF32, declared", "t5", tf32, products="tf32"),
    Right("bfloat16", "opt", dtype="bfloat16", cases=(LEFT, LONG)),
    Right("bfloat16, as far as its ALiBi can count", "bloom", dtype="bfloat16", cases=(LEFT, RIGHT)),
    Right("bfloat16", "t5_gated", dtype="bfloat16", cases=(LEFT, LONG)),
    Right("bfloat16, logits in float32", "opt", forward(lambda model: model.lm_head, wide_head), dtype="bfloat16"),
    Right("float16", "opt_350m", dtype="float16", cases=(LEFT, LONG)),
    Right("float16", "t5", dtype="float16", cases=(LEFT, LONG)),
    Right("float64, fused attention", "opt", dtype="float64", attention="sdpa"),
    Right(
        "float64, softmax in float64", "opt", source("eager_attention_forward", ("dtype=torch.float32", "dtype=query.dtype")),
        dtype="float64",
    ),
    Right(
        "float64, norm in float64", "t5", source("T5LayerNorm.forward", ("hidden_states.to(torch.float32)", "hidden_states")),
        dtype="float64",
    ),
    Right("dynamic cache", "opt", cached="dynamic"),
    Right("static cache", "opt", cached="static"),
    Right("static cache", "bloom", cached="static"),
    Right("dynamic cache", "t5_gated", cached="dynamic"),
    Right("static cache", "t5_gated", cached="static"),
]  # fmt: skip
