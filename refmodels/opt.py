"""OPT: a decoder with learned positions (Zhang et al. 2022). The equations are in `spec/opt.md`.

Read from the top: the layer, the stack, the head, the decode step. Every line is a call to an op; `p` is the part of the
parameter tree that the function uses, and `**p["query"]` passes its kernel and bias by name.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from refmodels.arguments import check_config, check_heads, check_length
from refmodels.backbone import Backbone, Generator
from refmodels.causal_lm import CausalLM
from refmodels.op import Array, Bool, Float, Int, Params, op
from refmodels.ops.attention import attention
from refmodels.ops.cache import cache_append, key_value_cache
from refmodels.ops.dense import dense, token_scores, token_vectors
from refmodels.ops.elementwise import add, dropout, relu
from refmodels.ops.heads import merge_heads, split_heads
from refmodels.ops.linear import embedding, last_rows
from refmodels.ops.mask import causal_mask
from refmodels.ops.norm import layer_norm
from refmodels.ops.position import token_positions
from refmodels.ops.precision import compute_dtype
from refmodels.parameters import Parameter, ParameterTable, numbered, truncated_normal
from refmodels.preprocessors import OPTCausalLMPreprocessor

EPSILON = 1e-5  # OPT-C4: not a constructor argument


@dataclass(frozen=True)
class OPTConfig:
    """The constructor arguments of `OPTBackbone`; KerasHub's has none of the keyword-only ones."""

    vocabulary_size: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    intermediate_dim: int
    dropout: float = 0.1
    max_sequence_length: int | None = 2048
    dtype: str = "float32"
    _: KW_ONLY
    word_embed_proj_dim: int | None = None
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = False
    tie_embedding_weights: bool = True

    def __post_init__(self) -> None:
        check_config(self, optional=("max_sequence_length", "word_embed_proj_dim"))
        check_heads(self)

    @property
    def head_dim(self) -> int:
        """d: the size of one head."""
        return self.hidden_dim // self.num_heads

    @property
    def has_projections(self) -> bool:
        """Whether the token tables are of another width than the hidden state (OPT-C12)."""
        return self.word_embed_proj_dim not in (None, self.hidden_dim)

    @property
    def has_final_layer_norm(self) -> bool:
        """Whether a norm stands behind the last layer: never behind norms that come last (OPT-C2)."""
        return self.do_layer_norm_before and not self.remove_final_layer_norm


@op(composite=True, mutates=("cache",))
def opt_attention(
    x: Float[Array, "b t n"],
    p: Params,
    mask: Bool[Array, "#b 1 #t s"],
    config: OPTConfig,
    *,
    cache: Params | None = None,
    start: Int[Array, "b"] | None = None,
    rng: Generator | None = None,
) -> Float[Array, "b t n"]:
    """Self-attention with biases; the scores are divided by sqrt(d)."""
    query = split_heads(dense(x, **p["query"]), config.num_heads)
    key = split_heads(dense(x, **p["key"]), config.num_heads)
    value = split_heads(dense(x, **p["value"]), config.num_heads)
    if cache is not None:  # OPT-C9: the slot is the position
        key = cache_append(cache["key"], key, start)
        value = cache_append(cache["value"], value, start)
    scale = config.head_dim**-0.5  # OPT-C3
    context = attention(query, key, value, mask, scale=scale, dropout_rate=config.dropout, rng=rng)
    return dense(merge_heads(context), **p["output"])


@op(composite=True, mutates=("cache",))
def opt_decoder_layer(
    x: Float[Array, "b t n"],
    p: Params,
    mask: Bool[Array, "#b 1 #t s"],
    config: OPTConfig,
    *,
    cache: Params | None = None,
    start: Int[Array, "b"] | None = None,
    rng: Generator | None = None,
) -> Float[Array, "b t n"]:
    """x + attention(norm(x)), then x + W2 relu(W1 norm(x)); with norms that come last norm(x + attention(x)) and so on."""
    first, second = p["self_attention_layer_norm"], p["feedforward_layer_norm"]
    before = config.do_layer_norm_before  # OPT-C2
    h = layer_norm(x, **first, epsilon=EPSILON) if before else x
    h = opt_attention(h, p["self_attention"], mask, config, cache=cache, start=start, rng=rng)
    x = add(x, dropout(h, config.dropout, rng))
    x = x if before else layer_norm(x, **first, epsilon=EPSILON)
    h = layer_norm(x, **second, epsilon=EPSILON) if before else x
    h = relu(dense(h, **p["feedforward_intermediate_dense"]))
    h = dense(h, **p["feedforward_output_dense"])
    x = add(x, dropout(h, config.dropout, rng))  # OPT-C5: no dropout between the two products
    return x if before else layer_norm(x, **second, epsilon=EPSILON)


@op(composite=True, mutates=("cache",))
def opt_backbone(
    token_ids: Int[Array, "b t"],
    padding_mask: Bool[Array, "b t"],
    params: Params,
    config: OPTConfig,
    *,
    position_ids: Int[Array, "#b t"] | None = None,
    embeddings: Float[Array, "b t e"] | None = None,
    cache: Params | None = None,
    start: Int[Array, "b"] | None = None,
    rng: Generator | None = None,
) -> Float[Array, "b t e"]:
    """Token ids to hidden states. With a cache, row i's tokens stand at the positions start[i], start[i] + 1, ...

    `embeddings` (in the compute type) stand in place of the ids' rows of the table; the ids are then not looked at (OPT-C14).
    """
    positions = token_positions(token_ids, start)
    if position_ids is None:
        position_ids = positions  # OPT-C1: padding does not shift them
    dtype = compute_dtype(config.dtype)
    token = token_vectors(token_ids, params["token_embedding"], dtype=dtype) if embeddings is None else embeddings
    if config.has_projections:  # OPT-C12: the positions are of the hidden state's width and are not projected
        token = dense(token, **params["project_in"])
    x = add(token, embedding(position_ids, **params["position_embedding"], dtype=dtype))
    if cache is not None:
        padding_mask = cache_append(cache["padding_mask"], padding_mask, start)
    mask = causal_mask(positions, padding_mask)  # OPT-C10: padded queries are computed like others
    for i, layer in enumerate(params["layers"]):
        x = opt_decoder_layer(x, layer, mask, config, cache=cache and cache["layers"][i], start=start, rng=rng)
    if config.has_final_layer_norm:
        x = layer_norm(x, **params["layer_norm"], epsilon=EPSILON)
    return dense(x, **params["project_out"]) if config.has_projections else x


@op(composite=True)
def opt_logits(hidden: Float[Array, "*b e"], params: Params) -> Float[Array, "*b v"]:
    """Scores of the next token: the product with the token embeddings, or the table of an untied head, neither scaled nor
    shifted (OPT-C8)."""
    return token_scores(hidden, params["token_embedding"])


@op(composite=True, mutates=("cache",))
def opt_prefill(
    token_ids: Int[Array, "b t"],
    padding_mask: Bool[Array, "b t"],
    lengths: Int[Array, "b"],
    params: Params,
    cache: Params,
    config: OPTConfig,
    *,
    start: Int[Array, "b"] | None = None,
    embeddings: Float[Array, "b t e"] | None = None,
) -> Float[Array, "b v"]:
    """Take in prompts (row i holds lengths[i] tokens, then padding) and score the token after each."""
    hidden = opt_backbone(token_ids, padding_mask, params, config, embeddings=embeddings, cache=cache, start=start)
    return opt_logits(last_rows(hidden, lengths), params)


@op(composite=True, mutates=("cache",))
def opt_decode_step(
    token_ids: Int[Array, "b 1"],
    padding_mask: Bool[Array, "b 1"],
    positions: Int[Array, "b"],
    params: Params,
    cache: Params,
    config: OPTConfig,
) -> Float[Array, "b v"]:
    """Take in one token a row, row i's at positions[i], and score the next."""
    hidden = opt_backbone(token_ids, padding_mask, params, config, cache=cache, start=positions)
    return opt_logits(last_rows(hidden), params)


def opt_parameters(config: OPTConfig) -> list[Parameter]:
    """Every parameter of this model, in the order of the tree."""
    n, m, heads = (config.hidden_dim,), (config.intermediate_dim,), (config.num_heads, config.head_dim)
    if config.max_sequence_length is None:
        raise ValueError("max_sequence_length is None: it becomes the length of the first input; call the model first")
    std, tied = truncated_normal(0.02), config.tie_embedding_weights
    e = (config.word_embed_proj_dim,) if config.word_embed_proj_dim else n
    table = ParameterTable()
    embeddings = "token_and_position_embedding"
    keras, aliases = f"{embeddings}/token_embedding/vars", ("lm_head.weight",) * tied
    shape = (config.vocabulary_size, *e)
    table.add("token_embedding.embeddings", shape, f"{keras}/0", ("embed_tokens.weight", *aliases), std)
    if not tied:
        path = "token_embedding.reverse_embeddings"
        table.add(path, shape[::-1], f"{keras}/1", "lm_head.weight", std, layout="transposed")
    table.add(
        "position_embedding.embeddings",
        (config.max_sequence_length, *n),
        f"{embeddings}/position_embedding/vars/0",
        "embed_positions.weight",
        std,
        layout="offset_rows",  # OPT-C6
    )
    if config.has_projections:
        for name, rows, columns in (("project_in", e, n), ("project_out", n, e)):
            table.dense(name, rows, columns, name, name, std, bias=False)
    for i in range(config.num_layers):
        path, keras, hf = f"layers.{i}", numbered("transformer_decoder", i), f"layers.{i}"
        attention = f"{keras}/_self_attention_layer"
        table.layer_norm(
            f"{path}.self_attention_layer_norm", *n, f"{keras}/_self_attention_layer_norm", f"{hf}.self_attn_layer_norm"
        )
        for part in ("query", "key", "value"):
            hf_part = f"{hf}.self_attn.{part[0]}_proj"
            # OPT-C11: the columns go head by head.
            table.dense(f"{path}.self_attention.{part}", n, heads, f"{attention}/{part}_dense", hf_part, std)
        table.dense(f"{path}.self_attention.output", heads, n, f"{attention}/output_dense", f"{hf}.self_attn.out_proj", std)
        table.layer_norm(f"{path}.feedforward_layer_norm", *n, f"{keras}/_feedforward_layer_norm", f"{hf}.final_layer_norm")
        for part, rows, columns, hf_part in (("intermediate", n, m, "fc1"), ("output", m, n, "fc2")):
            name = f"feedforward_{part}_dense"
            table.dense(f"{path}.{name}", rows, columns, f"{keras}/_{name}", f"{hf}.{hf_part}", std)
    if config.has_final_layer_norm:
        table.layer_norm("layer_norm", *n, "layer_normalization", "final_layer_norm")
    return table


class OPTBackbone(Backbone):
    """KerasHub's OPTBackbone: `{"token_ids", "padding_mask"}` to hidden states (b, t, hidden_dim).

    Also takes `position_ids` and `embeddings`. `max_sequence_length=None` becomes the length of the first input. Beyond
    KerasHub's, by keyword (spec/opt.md, OPT-C2, OPT-C8, OPT-C12, OPT-C13): `word_embed_proj_dim`, the width of the token
    tables, and then of the output, if it is not `hidden_dim`; `do_layer_norm_before=False`; `remove_final_layer_norm=True`;
    `tie_embedding_weights=False`.
    """

    family = "opt"
    config_class = OPTConfig
    inputs = {"token_ids": ("padding_mask", "position_ids")}
    prefill_op = opt_prefill
    decode_op = opt_decode_step
    config: OPTConfig

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        intermediate_dim: int,
        dropout: float = 0.1,
        max_sequence_length: int | None = 2048,
        dtype: Any = None,
        *,
        word_embed_proj_dim: int | None = None,
        do_layer_norm_before: bool = True,
        remove_final_layer_norm: bool = False,
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
            max_sequence_length=max_sequence_length,
            word_embed_proj_dim=None if word_embed_proj_dim == hidden_dim else word_embed_proj_dim,
            do_layer_norm_before=do_layer_norm_before,
            remove_final_layer_norm=remove_final_layer_norm,
            tie_embedding_weights=tie_embedding_weights,
        )

    @property
    def embedding_dim(self) -> int:
        return self.config.word_embed_proj_dim or self.config.hidden_dim

    def plain_parameters(self) -> list[Parameter]:
        return opt_parameters(self.config)

    def checked(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        unsettled = self.config
        if unsettled.max_sequence_length is None and "token_ids" in inputs:
            length = self.check_ids("token_ids", inputs["token_ids"]).shape[1]
            self.config = replace(unsettled, max_sequence_length=length)
        try:
            return super().checked(inputs)
        except (TypeError, ValueError):
            self.config = unsettled  # a refused input settles nothing
            raise

    def forward(self, inputs: dict[str, Array], rng: Generator | None) -> Array:
        token_ids = inputs["token_ids"]
        check_length(token_ids.shape[1], self.config.max_sequence_length)
        return opt_backbone(
            token_ids,
            inputs["padding_mask"],
            self.device_params,
            self.config,
            position_ids=inputs.get("position_ids"),
            embeddings=inputs.get("embeddings"),
            rng=rng,
        )

    def logits(self, hidden: Array) -> Array:
        return opt_logits(hidden, self.device_params)

    def new_cache(self, batch: int, capacity: int) -> Params:
        check_length(capacity, self.config.max_sequence_length)
        config, dtype = self.config, self.compute_dtype
        return key_value_cache(
            batch, capacity, layers=config.num_layers, heads=config.num_heads, head_dim=config.head_dim, dtype=dtype
        )

    def hidden_states(
        self, token_ids: Array, padding_mask: Array, start: Array | None, cache: Params, embeddings: Array | None = None
    ) -> Array:
        """Take tokens (b, t) into the cache, row i's from start[i] on, or from 0; their hidden states, for `logits`."""
        params, config, vectors = self.device_params, self.config, self.given_embeddings(embeddings, token_ids.shape)
        return opt_backbone(token_ids, padding_mask, params, config, embeddings=vectors, cache=cache, start=start)


class OPTCausalLM(CausalLM):
    """OPT with its head: text to text."""

    backbone_class = OPTBackbone
    preprocessor_class = OPTCausalLMPreprocessor
