"""T5: an encoder and a decoder with relative position biases (Raffel et al. 2020). The equations are in `spec/t5.md`.

Read from the top: attention, feed-forward, the two kinds of layer, the two stacks, the head, the decode step. Every line is a
call to an op; `p` is the part of the parameter tree that the function uses, and `**p["query"]` passes its kernel by name.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from refmodels.arguments import check_config, check_heads
from refmodels.backbone import Backbone, Generator
from refmodels.op import Array, Bool, Float, Int, Op, Params, op
from refmodels.ops.attention import attention
from refmodels.ops.cache import cache_append, key_value_cache
from refmodels.ops.dense import dense, token_scores, token_vectors
from refmodels.ops.elementwise import add, dropout, gelu, gelu_approximate, linear_activation, multiply, relu, silu
from refmodels.ops.heads import merge_heads, split_heads
from refmodels.ops.linear import last_rows
from refmodels.ops.mask import causal_mask, key_mask
from refmodels.ops.norm import rms_norm
from refmodels.ops.position import relative_position_bias, relative_position_buckets, token_positions
from refmodels.ops.precision import compute_dtype
from refmodels.parameters import ONES, Parameter, ParameterTable, normal, numbered
from refmodels.preprocessors import T5Seq2SeqLMPreprocessor
from refmodels.seq_2_seq_lm import Seq2SeqLM

NUM_BUCKETS = 32  # T5-C3: neither this nor the largest distance, 128, is a constructor argument

ACTIVATIONS: dict[str, Op[[Array], Array]] = {
    "relu": relu,
    "gelu": gelu,  # T5-C5: by this name the erf form, as in Keras
    "gelu_approximate": gelu_approximate,
    "silu": silu,
    "linear": linear_activation,
}


def activation_name(activation: Any) -> str:
    """The name in `ACTIVATIONS` of any form that a config holds: a name, None, or Keras' serialised function."""
    if isinstance(activation, Mapping):
        activation = str(activation.get("config")).rsplit(">", 1)[-1]
    name = {None: "linear", "swish": "silu"}.get(activation, activation)
    if name not in ACTIVATIONS:
        raise ValueError(f"T5 activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return str(name)


@dataclass(frozen=True)
class T5Config:
    """The constructor arguments of `T5Backbone`, in the order of KerasHub's config files, which have no keyword-only ones."""

    vocabulary_size: int
    hidden_dim: int
    intermediate_dim: int
    num_layers: int
    num_heads: int
    activation: str = "relu"
    key_value_dim: int | None = None
    dropout: float = 0.1
    use_gated_activation: bool = True
    layer_norm_epsilon: float = 1e-6
    tie_embedding_weights: bool = True
    dtype: str = "float32"
    _: KW_ONLY
    scale_logits: bool | None = None

    def __post_init__(self) -> None:
        check_config(self, optional=("key_value_dim", "scale_logits"))
        if self.key_value_dim is None:
            check_heads(self)

    @property
    def head_dim(self) -> int:
        """d: the size of one head. T5-C18: h * d need not be hidden_dim."""
        return self.key_value_dim or self.hidden_dim // self.num_heads

    @property
    def logits_scale(self) -> float:
        """What the head multiplies the hidden state by (T5-C6)."""
        scaled = self.tie_embedding_weights if self.scale_logits is None else self.scale_logits
        return self.hidden_dim**-0.5 if scaled else 1.0

    @property
    def residual_dtype(self) -> str:
        """The type of the residual stream. T5-C8: never float16, whose range the published weights leave."""
        dtype = compute_dtype(self.dtype)
        return "float32" if dtype == "float16" else dtype


@op(composite=True)
def t5_keys_values(x: Float[Array, "b s n"], p: Params, config: T5Config) -> Params:
    """Keys and values (b, s, h, d) of one attention layer."""
    return {name: split_heads(dense(x, **p[name]), config.num_heads) for name in ("key", "value")}


@op(composite=True)
def t5_attention(
    x: Float[Array, "b t n"],
    p: Params,
    keys_values: Params,
    mask: Bool[Array, "#b 1 #t s"],
    bias: Float[Array, "#b h t s"] | None,
    config: T5Config,
    *,
    rng: Generator | None = None,
) -> Float[Array, "b t n"]:
    """Attention of x to the given keys and values. T5-C1: the scores are not divided by sqrt(d)."""
    query = split_heads(dense(x, **p["query"]), config.num_heads)
    context = attention(query, **keys_values, mask=mask, bias=bias, scale=1.0, dropout_rate=config.dropout, rng=rng)
    return dense(merge_heads(context), **p["output"], dtype=config.residual_dtype)


@op(composite=True, mutates=("cache",))
def t5_self_attention(
    x: Float[Array, "b t n"],
    p: Params,
    mask: Bool[Array, "#b 1 #t s"],
    bias: Float[Array, "#b h t s"],
    config: T5Config,
    *,
    cache: Params | None = None,
    start: Int[Array, "b"] | None = None,
    rng: Generator | None = None,
) -> Float[Array, "b t n"]:
    """x + attention(norm(x)) to the layer's own keys and values, those in the cache included."""
    h = rms_norm(x, **p["self_attention_layer_norm"], epsilon=config.layer_norm_epsilon, dtype=compute_dtype(config.dtype))
    keys_values = t5_keys_values(h, p["self_attention"], config)
    if cache is not None:  # T5-C16: the slot is the position
        keys_values = {name: cache_append(cache[name], new, start) for name, new in keys_values.items()}
    h = t5_attention(h, p["self_attention"], keys_values, mask, bias, config, rng=rng)
    return add(x, dropout(h, config.dropout, rng))


@op(composite=True)
def t5_cross_attention(
    x: Float[Array, "b t n"],
    p: Params,
    encoded: Params,
    mask: Bool[Array, "#b 1 #t s"],
    config: T5Config,
    *,
    rng: Generator | None = None,
) -> Float[Array, "b t n"]:
    """x + attention(norm(x)) to the keys and values of the encoder's output. T5-C4: no position bias here."""
    h = rms_norm(x, **p["cross_attention_layer_norm"], epsilon=config.layer_norm_epsilon, dtype=compute_dtype(config.dtype))
    h = t5_attention(h, p["cross_attention"], encoded, mask, None, config, rng=rng)
    return add(x, dropout(h, config.dropout, rng))


@op(composite=True)
def t5_feedforward(
    x: Float[Array, "b t n"], p: Params, config: T5Config, *, rng: Generator | None = None
) -> Float[Array, "b t n"]:
    """x + Wo f(norm(x)), where f(y) is act(Wi y), or with a gate act(Wi y) * (Wg y)."""
    h = rms_norm(x, **p["layer_norm"], epsilon=config.layer_norm_epsilon, dtype=compute_dtype(config.dtype))
    inner = ACTIVATIONS[config.activation](dense(h, **p["input_projector"]))  # T5-C13: the gate is not activated
    if config.use_gated_activation:
        inner = multiply(inner, dense(h, **p["gate_projector"]))
    # T5-C20: dropout here too, between the two products.
    h = dense(dropout(inner, config.dropout, rng), **p["output_projector"], dtype=config.residual_dtype)
    return add(x, dropout(h, config.dropout, rng))


@op(composite=True)
def t5_encoder(
    token_ids: Int[Array, "b t"],
    padding_mask: Bool[Array, "b t"],
    params: Params,
    config: T5Config,
    *,
    embeddings: Float[Array, "b t n"] | None = None,
    rng: Generator | None = None,
) -> Float[Array, "b t n"]:
    """Token ids to the encoder's output, its final norm included (T5-C14).

    `embeddings` (in `config.residual_dtype`) stand in place of the ids' rows of the table; the ids are then not looked at
    (T5-C21).
    """
    p, dtype = params["encoder"], config.residual_dtype
    # T5-C17: not multiplied by sqrt(n).
    x = token_vectors(token_ids, params["token_embedding"], dtype=dtype) if embeddings is None else embeddings
    x = dropout(x, config.dropout, rng)
    mask = key_mask(padding_mask)
    buckets = relative_position_buckets(token_positions(token_ids), token_ids.shape[1], bidirectional=True)
    # T5-C2: the table is layer 0's and serves every layer of the stack.
    bias = relative_position_bias(buckets, **p["layers"][0]["self_attention"]["relative_attention_bias"])
    for layer in p["layers"]:
        x = t5_self_attention(x, layer, mask, bias, config, rng=rng)
        x = t5_feedforward(x, layer, config, rng=rng)
    x = rms_norm(x, **p["layer_norm"], epsilon=config.layer_norm_epsilon, dtype=compute_dtype(config.dtype))
    return dropout(x, config.dropout, rng)


@op(composite=True)
def t5_cross_keys_values(encoder_output: Float[Array, "b s n"], params: Params, config: T5Config) -> list[Params]:
    """For each decoder layer the keys and values of the encoder's output: computed once for each input."""
    return [t5_keys_values(encoder_output, layer["cross_attention"], config) for layer in params["decoder"]["layers"]]


@op(composite=True, mutates=("cache",))
def t5_decoder(
    token_ids: Int[Array, "b t"],
    padding_mask: Bool[Array, "b t"],
    encoded: list[Params],
    encoder_padding_mask: Bool[Array, "b s"],
    params: Params,
    config: T5Config,
    *,
    embeddings: Float[Array, "b t n"] | None = None,
    cache: Params | None = None,
    start: Int[Array, "b"] | None = None,
    rng: Generator | None = None,
) -> Float[Array, "b t n"]:
    """Token ids to the decoder's output. With a cache, row i's tokens stand at start[i], start[i] + 1, ...

    `embeddings` as for `t5_encoder`.
    """
    p, dtype = params["decoder"], config.residual_dtype
    positions = token_positions(token_ids, start)
    x = token_vectors(token_ids, params["token_embedding"], dtype=dtype) if embeddings is None else embeddings
    x = dropout(x, config.dropout, rng)
    if cache is not None:
        padding_mask = cache_append(cache["padding_mask"], padding_mask, start)
    mask, cross_mask = causal_mask(positions, padding_mask), key_mask(encoder_padding_mask)
    buckets = relative_position_buckets(positions, mask.shape[-1], bidirectional=False)
    bias = relative_position_bias(buckets, **p["layers"][0]["self_attention"]["relative_attention_bias"])
    for i, layer in enumerate(p["layers"]):
        x = t5_self_attention(x, layer, mask, bias, config, cache=cache and cache["layers"][i], start=start, rng=rng)
        x = t5_cross_attention(x, layer, encoded[i], cross_mask, config, rng=rng)
        x = t5_feedforward(x, layer, config, rng=rng)
    x = rms_norm(x, **p["layer_norm"], epsilon=config.layer_norm_epsilon, dtype=compute_dtype(config.dtype))
    return dropout(x, config.dropout, rng)


@op(composite=True)
def t5_backbone(
    encoder_token_ids: Int[Array, "b s"],
    encoder_padding_mask: Bool[Array, "b s"],
    decoder_token_ids: Int[Array, "b t"],
    decoder_padding_mask: Bool[Array, "b t"],
    params: Params,
    config: T5Config,
    *,
    encoder_embeddings: Float[Array, "b s n"] | None = None,
    decoder_embeddings: Float[Array, "b t n"] | None = None,
    rng: Generator | None = None,
) -> dict[str, Array]:
    """Both stacks on whole sequences. T5-C15: the decoder's ids are used as given, the caller shifts them right."""
    encoder_output = t5_encoder(encoder_token_ids, encoder_padding_mask, params, config, embeddings=encoder_embeddings, rng=rng)
    encoded = t5_cross_keys_values(encoder_output, params, config)
    decoder_output = t5_decoder(
        decoder_token_ids,
        decoder_padding_mask,
        encoded,
        encoder_padding_mask,
        params,
        config,
        embeddings=decoder_embeddings,
        rng=rng,
    )
    return {"encoder_sequence_output": encoder_output, "decoder_sequence_output": decoder_output}


@op(composite=True)
def t5_logits(hidden: Float[Array, "*b n"], params: Params, config: T5Config) -> Float[Array, "*b v"]:
    """Scores of the next token: the product with the token embeddings or the table of an untied head, scaled or not (T5-C6)."""
    return token_scores(hidden, params["token_embedding"], scale=config.logits_scale)


@op(composite=True)
def t5_cache(
    encoder_token_ids: Int[Array, "b s"],
    encoder_padding_mask: Bool[Array, "b s"],
    capacity: int,
    params: Params,
    config: T5Config,
    *,
    embeddings: Float[Array, "b s n"] | None = None,
) -> Params:
    """Encode the inputs and make a cache for decoding up to `capacity` positions: T5-C7, cross-attention is ready in it."""
    batch, dtype = encoder_token_ids.shape[0], compute_dtype(config.dtype)
    cache = key_value_cache(
        batch, capacity, layers=config.num_layers, heads=config.num_heads, head_dim=config.head_dim, dtype=dtype
    )
    encoder_output = t5_encoder(encoder_token_ids, encoder_padding_mask, params, config, embeddings=embeddings)
    encoded = t5_cross_keys_values(encoder_output, params, config)
    return {**cache, "encoder_padding_mask": encoder_padding_mask, "encoded": encoded}


@op(composite=True, mutates=("cache",))
def t5_prefill(
    token_ids: Int[Array, "b t"],
    padding_mask: Bool[Array, "b t"],
    lengths: Int[Array, "b"],
    params: Params,
    cache: Params,
    config: T5Config,
    *,
    start: Int[Array, "b"] | None = None,
    embeddings: Float[Array, "b t n"] | None = None,
) -> Float[Array, "b v"]:
    """Take in the decoder's first tokens (row i holds lengths[i], then padding) and score the token after each."""
    encoded, mask = cache["encoded"], cache["encoder_padding_mask"]
    hidden = t5_decoder(token_ids, padding_mask, encoded, mask, params, config, embeddings=embeddings, cache=cache, start=start)
    return t5_logits(last_rows(hidden, lengths), params, config)


@op(composite=True, mutates=("cache",))
def t5_decode_step(
    token_ids: Int[Array, "b 1"],
    padding_mask: Bool[Array, "b 1"],
    positions: Int[Array, "b"],
    params: Params,
    cache: Params,
    config: T5Config,
) -> Float[Array, "b v"]:
    """Take in one token a row, row i's at positions[i], and score the next."""
    encoded, mask = cache["encoded"], cache["encoder_padding_mask"]
    hidden = t5_decoder(token_ids, padding_mask, encoded, mask, params, config, cache=cache, start=positions)
    return t5_logits(last_rows(hidden), params, config)


def t5_parameters(config: T5Config) -> list[Parameter]:
    """Every parameter of this model, in the order of the tree."""
    n, m, inner = (config.hidden_dim,), (config.intermediate_dim,), (config.num_heads * config.head_dim,)
    # T5-C9: the original draws embeddings with deviation 1; KerasHub passes that 1.0 as the mean by mistake.
    embedding_init, inner_init, narrow_init = normal(1.0), normal(inner[0] ** -0.5), normal(n[0] ** -0.5)
    query_init, output_init = normal((inner[0] * config.head_dim) ** -0.5), normal(m[0] ** -0.5)
    table = ParameterTable()  # T5-C19: no dense layer below has a bias
    shape = (config.vocabulary_size, *n)
    hf_names = ("shared.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight")
    keras = "reversible_embedding/vars"
    table.add("token_embedding.embeddings", shape, f"{keras}/0", hf_names, embedding_init)
    if not config.tie_embedding_weights:
        path = "token_embedding.reverse_embeddings"
        table.add(path, shape[::-1], f"{keras}/1", "lm_head.weight", embedding_init, layout="transposed")

    def attention(path: str, keras: str, hf: str) -> None:
        for part in ("query", "key", "value", "output"):
            rows, columns = (inner, n) if part == "output" else (n, inner)
            init = query_init if part == "query" else inner_init
            table.dense(f"{path}.{part}", rows, columns, f"{keras}/{part}_projector", f"{hf}.{part[0]}", init, bias=False)

    def norm(path: str, keras: str, hf: str) -> None:
        table.add(f"{path}.weight", n, f"{keras}/vars/0", f"{hf}.weight", ONES)

    for stack in ("encoder", "decoder"):
        for i in range(config.num_layers):
            path, hf = f"{stack}.layers.{i}", f"{stack}.block.{i}.layer"
            keras = numbered("t5_transformer_layer", i + config.num_layers * (stack == "decoder"))
            norm(f"{path}.self_attention_layer_norm", f"{keras}/self_attention_layer_norm", f"{hf}.0.layer_norm")
            attention(f"{path}.self_attention", f"{keras}/self_attention", f"{hf}.0.SelfAttention")
            if i == 0:
                table.add(
                    f"{path}.self_attention.relative_attention_bias.embeddings",
                    (NUM_BUCKETS, config.num_heads),
                    f"{keras}/self_attention/vars/0",
                    f"{hf}.0.SelfAttention.relative_attention_bias.weight",
                    inner_init,
                )
            if stack == "decoder":
                norm(f"{path}.cross_attention_layer_norm", f"{keras}/cross_attention_layer_norm", f"{hf}.1.layer_norm")
                attention(f"{path}.cross_attention", f"{keras}/cross_attention", f"{hf}.1.EncDecAttention")
            hf_last = f"{hf}.{1 if stack == 'encoder' else 2}"
            norm(f"{path}.layer_norm", f"{keras}/layer_norm", f"{hf_last}.layer_norm")
            gated = config.use_gated_activation
            projectors = [("input_projector", n, m, "wi_0" if gated else "wi", narrow_init)]
            projectors += [("gate_projector", n, m, "wi_1", narrow_init)] if gated else []
            projectors += [("output_projector", m, n, "wo", output_init)]
            for name, rows, columns, hf_name, init in projectors:
                hf_path = f"{hf_last}.DenseReluDense.{hf_name}"
                table.dense(f"{path}.{name}", rows, columns, f"{keras}/{name}", hf_path, init, bias=False)
        norm(f"{stack}.layer_norm", numbered("t5_layer_norm", int(stack == "decoder")), f"{stack}.final_layer_norm")
    return table


class T5Backbone(Backbone):
    """KerasHub's T5Backbone: encoder and decoder ids and masks to the two outputs, each (b, length, hidden_dim).

    Also takes `encoder_embeddings` and `decoder_embeddings`. Beyond KerasHub's, by keyword: `scale_logits`, for a head that is
    tied but not scaled or the reverse (None: scaled if tied; spec/t5.md, T5-C6).
    """

    family = "t5"
    config_class = T5Config
    inputs = {"encoder_token_ids": ("encoder_padding_mask",), "decoder_token_ids": ("decoder_padding_mask",)}
    prefill_op = t5_prefill
    decode_op = t5_decode_step
    config: T5Config

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        intermediate_dim: int,
        key_value_dim: int | None = None,
        dropout: float = 0.1,
        activation: Any = "relu",
        use_gated_activation: bool = True,
        layer_norm_epsilon: float = 1e-6,
        tie_embedding_weights: bool = True,
        dtype: Any = None,
        *,
        scale_logits: bool | None = None,
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
            key_value_dim=key_value_dim,
            dropout=dropout,
            activation=activation_name(activation),
            use_gated_activation=use_gated_activation,
            layer_norm_epsilon=layer_norm_epsilon,
            tie_embedding_weights=tie_embedding_weights,
            scale_logits=None if scale_logits is tie_embedding_weights else scale_logits,
        )

    @property
    def embedding_dtype(self) -> str:
        return self.config.residual_dtype

    def plain_parameters(self) -> list[Parameter]:
        return t5_parameters(self.config)

    def forward(self, inputs: dict[str, Array], rng: Generator | None) -> dict[str, Array]:
        return t5_backbone(**inputs, params=self.device_params, config=self.config, rng=rng)

    def logits(self, hidden: Array) -> Array:
        return t5_logits(hidden, self.device_params, self.config)

    def new_cache(
        self, encoder_token_ids: Array, encoder_padding_mask: Array, capacity: int, embeddings: Array | None = None
    ) -> Params:
        """A cache for `capacity` positions of the decoder with the encoder's work in it; `embeddings` (b, s, hidden_dim), if
        given, stand in place of the vectors of the encoder's tokens."""
        vectors = self.given_embeddings(embeddings, encoder_token_ids.shape)
        ids, mask = encoder_token_ids, encoder_padding_mask
        return t5_cache(ids, mask, capacity, self.device_params, self.config, embeddings=vectors)

    def hidden_states(self, token_ids: Array, padding_mask: Array, start: Array | None, cache: Params) -> Array:
        """Take the decoder's tokens (b, t) into the cache, row i's from start[i] on, or from 0; the decoder's output."""
        encoded, mask, params = cache["encoded"], cache["encoder_padding_mask"], self.device_params
        return t5_decoder(token_ids, padding_mask, encoded, mask, params, self.config, cache=cache, start=start)


class T5Seq2SeqLM(Seq2SeqLM):
    """T5 with its head: text in, text out."""

    backbone_class = T5Backbone
    preprocessor_class = T5Seq2SeqLMPreprocessor
