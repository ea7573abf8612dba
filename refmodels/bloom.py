"""BLOOM: a pre-norm decoder with ALiBi in place of positions (BigScience 2022). The equations are in `spec/bloom.md`.

Read from the top: the layer, the stack, the head, the decode step. Every line is a call to an op; `p` is the part of the
parameter tree that the function uses, and `**p["query"]` passes its kernel and bias by name.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any

from refmodels.arguments import check_config, check_heads
from refmodels.backbone import Backbone, Generator
from refmodels.causal_lm import CausalLM
from refmodels.op import Array, Bool, Float, Int, Params, op
from refmodels.ops.attention import attention
from refmodels.ops.cache import cache_append, key_value_cache
from refmodels.ops.dense import dense, token_scores, token_vectors
from refmodels.ops.elementwise import add, dropout, gelu_approximate
from refmodels.ops.heads import merge_heads, split_heads
from refmodels.ops.linear import last_rows
from refmodels.ops.mask import causal_mask
from refmodels.ops.norm import layer_norm
from refmodels.ops.position import alibi_bias, alibi_slopes, token_positions
from refmodels.ops.precision import compute_dtype, wide_dtype
from refmodels.parameters import Parameter, ParameterTable, glorot_uniform, normal, numbered
from refmodels.preprocessors import BloomCausalLMPreprocessor


@dataclass(frozen=True)
class BloomConfig:
    """The constructor arguments of `BloomBackbone`; KerasHub's has none of the keyword-only ones."""

    vocabulary_size: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    intermediate_dim: int
    dropout: float = 0.0
    layer_norm_epsilon: float = 1e-5
    dtype: str = "float32"
    _: KW_ONLY
    tie_embedding_weights: bool = True

    def __post_init__(self) -> None:
        check_config(self)
        check_heads(self)

    @property
    def head_dim(self) -> int:
        """d: the size of one head."""
        return self.hidden_dim // self.num_heads


@op(composite=True, mutates=("cache",))
def bloom_attention(
    x: Float[Array, "b t n"],
    p: Params,
    mask: Bool[Array, "#b 1 #t s"],
    alibi: Float[Array, "#b h t s"],
    config: BloomConfig,
    *,
    cache: Params | None = None,
    start: Int[Array, "b"] | None = None,
    rng: Generator | None = None,
) -> Float[Array, "b t n"]:
    """Self-attention with biases; the scores are divided by sqrt(d) and then lowered by ALiBi."""
    query = split_heads(dense(x, **p["query"]), config.num_heads)
    key = split_heads(dense(x, **p["key"]), config.num_heads)
    value = split_heads(dense(x, **p["value"]), config.num_heads)
    if cache is not None:  # BLOOM-C9: the slot is the position
        key = cache_append(cache["key"], key, start)
        value = cache_append(cache["value"], value, start)
    scale = config.head_dim**-0.5  # BLOOM-C3: the scale does not touch the bias
    context = attention(query, key, value, mask, alibi, scale=scale, dropout_rate=config.dropout, rng=rng)
    return dense(merge_heads(context), **p["output"])


@op(composite=True, mutates=("cache",))
def bloom_decoder_layer(
    x: Float[Array, "b t n"],
    p: Params,
    mask: Bool[Array, "#b 1 #t s"],
    alibi: Float[Array, "#b h t s"],
    config: BloomConfig,
    *,
    cache: Params | None = None,
    start: Int[Array, "b"] | None = None,
    rng: Generator | None = None,
) -> Float[Array, "b t n"]:
    """x + attention(norm(x)), then x + W2 gelu(W1 norm(x)): the residual is taken before the norm (BLOOM-C4)."""
    h = layer_norm(x, **p["pre_attention_layernorm"], epsilon=config.layer_norm_epsilon)
    h = bloom_attention(h, p["self_attention"], mask, alibi, config, cache=cache, start=start, rng=rng)
    x = add(x, dropout(h, config.dropout, rng))
    h = layer_norm(x, **p["post_attention_layernorm"], epsilon=config.layer_norm_epsilon)
    h = gelu_approximate(dense(h, **p["mlp_intermediate_dense"]))  # BLOOM-C5
    h = dense(h, **p["mlp_output_dense"])
    return add(x, dropout(h, config.dropout, rng))  # BLOOM-C11: no dropout between the two products


@op(composite=True, mutates=("cache",))
def bloom_backbone(
    token_ids: Int[Array, "b t"],
    padding_mask: Bool[Array, "b t"],
    params: Params,
    config: BloomConfig,
    *,
    embeddings: Float[Array, "b t n"] | None = None,
    cache: Params | None = None,
    start: Int[Array, "b"] | None = None,
    rng: Generator | None = None,
) -> Float[Array, "b t n"]:
    """Token ids to hidden states. With a cache, row i's tokens stand at the positions start[i], start[i] + 1, ...

    `embeddings` (in the compute type) stand in place of the ids' rows of the table; the ids are then not looked at (BLOOM-C13).
    """
    positions = token_positions(token_ids, start)
    dtype = compute_dtype(config.dtype)
    x = token_vectors(token_ids, params["token_embedding"], dtype=dtype) if embeddings is None else embeddings
    x = layer_norm(x, **params["embedding_layernorm"], epsilon=config.layer_norm_epsilon)  # BLOOM-C1
    if cache is not None:
        padding_mask = cache_append(cache["padding_mask"], padding_mask, start)
    mask = causal_mask(positions, padding_mask)
    slopes = alibi_slopes(config.num_heads)
    alibi = alibi_bias(slopes, positions, keys=mask.shape[-1], dtype=wide_dtype(config.dtype))  # BLOOM-C2
    for i, layer in enumerate(params["layers"]):
        x = bloom_decoder_layer(x, layer, mask, alibi, config, cache=cache and cache["layers"][i], start=start, rng=rng)
    return layer_norm(x, **params["final_layernorm"], epsilon=config.layer_norm_epsilon)


@op(composite=True)
def bloom_logits(hidden: Float[Array, "*b n"], params: Params) -> Float[Array, "*b v"]:
    """Scores of the next token: the product with the token embeddings, or the table of an untied head, neither scaled nor
    shifted (BLOOM-C10)."""
    return token_scores(hidden, params["token_embedding"])


@op(composite=True, mutates=("cache",))
def bloom_prefill(
    token_ids: Int[Array, "b t"],
    padding_mask: Bool[Array, "b t"],
    lengths: Int[Array, "b"],
    params: Params,
    cache: Params,
    config: BloomConfig,
    *,
    start: Int[Array, "b"] | None = None,
    embeddings: Float[Array, "b t n"] | None = None,
) -> Float[Array, "b v"]:
    """Take in prompts (row i holds lengths[i] tokens, then padding) and score the token after each."""
    hidden = bloom_backbone(token_ids, padding_mask, params, config, embeddings=embeddings, cache=cache, start=start)
    return bloom_logits(last_rows(hidden, lengths), params)


@op(composite=True, mutates=("cache",))
def bloom_decode_step(
    token_ids: Int[Array, "b 1"],
    padding_mask: Bool[Array, "b 1"],
    positions: Int[Array, "b"],
    params: Params,
    cache: Params,
    config: BloomConfig,
) -> Float[Array, "b v"]:
    """Take in one token a row, row i's at positions[i], and score the next."""
    hidden = bloom_backbone(token_ids, padding_mask, params, config, cache=cache, start=positions)
    return bloom_logits(last_rows(hidden), params)


def bloom_parameters(config: BloomConfig) -> list[Parameter]:
    """Every parameter of this model, in the order of the tree."""
    n, m, heads = (config.hidden_dim,), (config.intermediate_dim,), (config.num_heads, config.head_dim)
    wide, square = glorot_uniform(*n, *m), glorot_uniform(*n, *n)  # BLOOM-C12
    table = ParameterTable()
    shape, keras, tied = (config.vocabulary_size, *n), "reversible_embedding/vars", config.tie_embedding_weights
    names = ("word_embeddings.weight", *("lm_head.weight",) * tied)
    table.add("token_embedding.embeddings", shape, f"{keras}/0", names, normal(0.02))
    if not tied:
        path = "token_embedding.reverse_embeddings"
        table.add(path, shape[::-1], f"{keras}/1", "lm_head.weight", normal(0.02), layout="transposed")
    table.layer_norm("embedding_layernorm", *n, "layer_normalization", "word_embeddings_layernorm")
    for i in range(config.num_layers):
        path, keras, hf = f"layers.{i}", numbered("bloom_decoder", i), f"h.{i}"
        attention = f"{keras}/_self_attention_layer"
        for norm, hf_norm in (("pre", "input_layernorm"), ("post", "post_attention_layernorm")):
            name = f"{norm}_attention_layernorm"
            table.layer_norm(f"{path}.{name}", *n, f"{keras}/_{name}", f"{hf}.{hf_norm}")
        for part in ("query", "key", "value"):
            table.dense(
                f"{path}.self_attention.{part}",
                n,
                heads,
                f"{attention}/_{part}_dense",
                f"{hf}.self_attention.query_key_value",
                square,
                layout=part,  # BLOOM-C6: interleaved in published files
            )
        hf_output = f"{hf}.self_attention.dense"
        table.dense(f"{path}.self_attention.output", n, n, f"{attention}/_output_dense", hf_output, square)
        for part, rows, columns, hf_part in (("intermediate", n, m, "dense_h_to_4h"), ("output", m, n, "dense_4h_to_h")):
            name = f"mlp_{part}_dense"
            table.dense(f"{path}.{name}", rows, columns, f"{keras}/_{name}", f"{hf}.mlp.{hf_part}", wide)
    table.layer_norm("final_layernorm", *n, "layer_normalization_1", "ln_f")
    return table


class BloomBackbone(Backbone):
    """KerasHub's BloomBackbone: `{"token_ids", "padding_mask"}` to hidden states (b, t, hidden_dim).

    Also takes `embeddings`. Beyond KerasHub's, by keyword: `tie_embedding_weights=False` (spec/bloom.md, BLOOM-C10).
    """

    family = "bloom"
    config_class = BloomConfig
    inputs = {"token_ids": ("padding_mask",)}
    prefill_op = bloom_prefill
    decode_op = bloom_decode_step
    config: BloomConfig

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        intermediate_dim: int,
        dropout: float = 0.0,
        layer_norm_epsilon: float = 1e-5,
        dtype: Any = None,
        *,
        tie_embedding_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            kwargs,
            dtype,
            vocabulary_size=vocabulary_size,
            num_layers=num_layers,
            num_heads=num_heads,
            hidden_dim=hidden_dim,
            intermediate_dim=intermediate_dim,
            dropout=dropout,
            layer_norm_epsilon=layer_norm_epsilon,
            tie_embedding_weights=tie_embedding_weights,
        )

    def plain_parameters(self) -> list[Parameter]:
        return bloom_parameters(self.config)

    def forward(self, inputs: dict[str, Array], rng: Generator | None) -> Array:
        ids, mask, embeddings = inputs["token_ids"], inputs["padding_mask"], inputs.get("embeddings")
        return bloom_backbone(ids, mask, self.device_params, self.config, embeddings=embeddings, rng=rng)

    def logits(self, hidden: Array) -> Array:
        return bloom_logits(hidden, self.device_params)

    def new_cache(self, batch: int, capacity: int) -> Params:
        config, dtype = self.config, self.compute_dtype
        return key_value_cache(
            batch, capacity, layers=config.num_layers, heads=config.num_heads, head_dim=config.head_dim, dtype=dtype
        )

    def hidden_states(
        self, token_ids: Array, padding_mask: Array, start: Array | None, cache: Params, embeddings: Array | None = None
    ) -> Array:
        """Take tokens (b, t) into the cache, row i's from start[i] on, or from 0; their hidden states, for `logits`."""
        params, config, vectors = self.device_params, self.config, self.given_embeddings(embeddings, token_ids.shape)
        return bloom_backbone(token_ids, padding_mask, params, config, embeddings=vectors, cache=cache, start=start)


class BloomCausalLM(CausalLM):
    """BLOOM with its head: text to text."""

    backbone_class = BloomBackbone
    preprocessor_class = BloomCausalLMPreprocessor
