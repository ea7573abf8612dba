"""KerasHub: its OPT, BLOOM and T5 on whichever backend Keras runs on, every layer and most steps inside.

    backbone = keras_hub.models.Backbone.from_preset(place)
    verify(KerasHubCandidate(backbone, model), model)

The model runs eagerly, and the methods of its layers are wrapped while it does: what a layer is given and what it makes is
seen, whatever the backend. Not to be seen are the scores of T5, and of OPT where Keras takes a fused attention.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from refmodels.backbone import Backbone
from refmodels.op import Array
from refmodels.verification.candidate import Candidate, CandidateError

FAMILIES = {"OPTBackbone": "opt", "BloomBackbone": "bloom", "T5Backbone": "t5"}

Seen = Callable[[tuple[Any, ...], dict[str, Any], Any], Any]
"""`seen(args, kwargs, output)` after a call; what it returns, if not None, is the output in its place."""


def build(model: Backbone) -> "KerasHubCandidate":
    """What `refmodels verify keras_hub` runs: KerasHub's class with the weights and the type of `model`.

    CandidateError if KerasHub is not installed.
    """
    try:
        import keras_hub
    except ImportError as error:
        raise CandidateError(f"{error}: pip install keras-hub, and PyTorch, JAX or TensorFlow") from None
    with tempfile.TemporaryDirectory(prefix="refmodels-") as place:
        model.save_to_preset(place)
        backbone = keras_hub.models.Backbone.from_preset(place, dtype=model.config.dtype)
    return KerasHubCandidate(backbone, model)


class KerasHubCandidate(Candidate):
    """A backbone of KerasHub under test, its head included: `OPTBackbone`, `BloomBackbone` or `T5Backbone`.

    `model` is what it is held to; T5's steps are named by its activation, whatever KerasHub's own may be.
    """

    def __init__(self, backbone: Any, model: Backbone, *, name: str = "", products: str = "") -> None:
        kind = next((base.__name__ for base in type(backbone).__mro__ if base.__name__ in FAMILIES), None)
        if kind is None or FAMILIES[kind] != model.family:
            wanted = next(name for name, family in FAMILIES.items() if family == model.family)
            raise CandidateError(f"a {type(backbone).__name__} is no candidate for {model.family}: wanted a {wanted}")
        self.backbone, self.family, self.products = backbone, model.family, products
        self.name = name or f"{kind} of KerasHub"
        self.dtype = str(backbone.dtype_policy.compute_dtype)
        self._activation = str(getattr(model.config, "activation", ""))
        self.injects = frozenset(name for _, name in self._layers())

    def run(self, inputs: Mapping[str, Array], inject: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        if "position_ids" in inputs or any("embeddings" in name for name in inputs):
            raise CandidateError(f"{self.name} takes token ids and masks alone, got {', '.join(inputs)}")
        given = {name: np.asarray(array).astype(np.int32) for name, array in inputs.items()}
        for name in [name for name in given if name.endswith("token_ids")]:
            given.setdefault(name.replace("token_ids", "padding_mask"), np.ones_like(given[name]))
        steps = _Steps(inject or {})
        try:
            with ExitStack() as stack:
                for owner, method, seen in self._taps(steps):
                    stack.enter_context(_tapped(owner, method, seen))
                output = self.backbone(given)
            hidden = output["decoder_sequence_output"] if isinstance(output, dict) else output
            steps.add(f"{self.family}_{'decoder' if self.family == 't5' else 'backbone'}", hidden)
            if isinstance(output, dict):
                steps.add("t5_encoder", output["encoder_sequence_output"])
            steps.add(f"{self.family}_logits", self._logits(hidden))
        except Exception as error:
            raise CandidateError(f"{self.name} failed: {type(error).__name__}: {error}") from error
        return steps.found

    def facts(self) -> dict[str, str]:
        import keras
        import keras_hub

        found = {"keras-hub": keras_hub.__version__, "keras": keras.__version__, "backend": keras.backend.backend()}
        return found | {"dtype policy": str(self.backbone.dtype_policy.name)}

    def _logits(self, hidden: Any) -> Any:
        """As its task does it."""
        if self.family == "t5" and self.backbone.tie_embedding_weights:
            import keras

            hidden = hidden * keras.ops.cast(self.backbone.hidden_dim**-0.5, hidden.dtype)
        return self.backbone.token_embedding(hidden, reverse=True)

    # -- where to look ------------------------------------------------------------------------------------------------------

    def _layers(self) -> Iterator[tuple[Any, str]]:
        """Its layers, and the steps that they are."""
        if self.family == "t5":
            for stack in ("encoder", "decoder"):
                for i, layer in enumerate(getattr(self.backbone, f"{stack}_transformer_layers")):
                    yield layer, f"{stack}.layers.{i}:t5_feedforward"
        else:
            for i, layer in enumerate(self.backbone.transformer_layers):
                yield layer, f"layers.{i}:{self.family}_decoder_layer"

    def _taps(self, steps: "_Steps") -> Iterator[tuple[Any, str, Seen]]:
        yield self.backbone.token_embedding, "call", steps.output("token_embedding:embedding")
        for layer, name in self._layers():
            yield layer, "call", steps.layer(name)
            inside = {"opt": _opt_layer, "bloom": _bloom_layer, "t5": _t5_layer}[self.family]
            yield from inside(layer, name.partition(":")[0], steps, self._activation)
        if self.family == "opt":
            embeddings = self.backbone.embeddings
            yield embeddings, "call", steps.output("opt_backbone:add")
            yield embeddings.position_embedding, "call", steps.output("position_embedding:embedding", first_row=True)
            yield self.backbone.layer_norm, "call", steps.output("layer_norm")
        if self.family == "bloom":
            yield self.backbone.embeddings_layer_norm, "call", steps.output("embedding_layernorm:layer_norm")
            yield self.backbone.layer_norm, "call", steps.output("final_layernorm:layer_norm")
            first = self.backbone.transformer_layers[0]._self_attention_layer
            yield first._alibi_layer, "_get_alibi_bias", steps.alibi("bloom_backbone:alibi_bias")
        if self.family == "t5":
            yield self.backbone.encoder_layer_norm, "call", steps.output("encoder.layer_norm:rms_norm")
            yield self.backbone.decoder_layer_norm, "call", steps.output("decoder.layer_norm:rms_norm")


def _opt_layer(layer: Any, place: str, steps: "_Steps", _: str) -> Iterator[tuple[Any, str, Seen]]:
    attention, at = layer._self_attention_layer, f"{place}.self_attention"
    yield layer._self_attention_layer_norm, "call", steps.output(f"{at}_layer_norm:layer_norm")
    for part in ("query", "key", "value"):
        yield getattr(attention, f"_{part}_dense"), "call", steps.output(f"{at}.{part}:linear", merged=True)
    yield attention, "_masked_softmax", steps.softmax(at)
    yield attention._output_dense, "call", steps.given(f"{at}:attention_context")
    yield attention._output_dense, "call", steps.output(f"{at}.output:linear")
    yield layer._feedforward_layer_norm, "call", steps.given(f"{place}:add")
    yield layer._feedforward_layer_norm, "call", steps.output(f"{place}.feedforward_layer_norm:layer_norm")
    inner = layer._feedforward_intermediate_dense
    yield inner, "activation", steps.given(f"{place}.feedforward_intermediate_dense:linear")
    yield inner, "activation", steps.output(f"{place}:relu")
    yield layer._feedforward_output_dense, "call", steps.output(f"{place}.feedforward_output_dense:linear")


def _bloom_layer(layer: Any, place: str, steps: "_Steps", _: str) -> Iterator[tuple[Any, str, Seen]]:
    attention, at = layer._self_attention_layer, f"{place}.self_attention"
    yield layer._pre_attention_layernorm, "call", steps.output(f"{place}.pre_attention_layernorm:layer_norm")
    for part in ("query", "key", "value"):
        yield getattr(attention, f"_{part}_dense"), "call", steps.output(f"{at}.{part}:linear", merged=True)
    yield attention._alibi_layer, "call", steps.output(f"{at}:attention_scores")
    yield attention._softmax, "call", steps.output(f"{at}:masked_softmax")
    yield attention._output_dense, "call", steps.given(f"{at}:attention_context", heads=attention.num_heads)
    yield attention._output_dense, "call", steps.output(f"{at}.output:linear")
    yield layer._post_attention_layernorm, "call", steps.given(f"{place}:add")
    yield layer._post_attention_layernorm, "call", steps.output(f"{place}.post_attention_layernorm:layer_norm")
    yield layer._mlp_intermediate_dense, "call", steps.output(f"{place}.mlp_intermediate_dense:linear")
    yield layer._mlp_output_dense, "call", steps.given(f"{place}:gelu_approximate")
    yield layer._mlp_output_dense, "call", steps.output(f"{place}.mlp_output_dense:linear")


def _t5_layer(layer: Any, place: str, steps: "_Steps", activation: str) -> Iterator[tuple[Any, str, Seen]]:
    kinds = ("self_attention", "cross_attention") if layer.is_decoder else ("self_attention",)
    for kind in kinds:
        attention, at = getattr(layer, kind), f"{place}.{kind}"
        yield getattr(layer, f"{kind}_layer_norm"), "call", steps.output(f"{at}_layer_norm:rms_norm")
        for part in ("query", "key", "value"):
            yield getattr(attention, f"{part}_projector"), "call", steps.output(f"{at}.{part}:linear")
        yield attention.dropout_layer, "call", steps.given(f"{at}:masked_softmax")
        yield attention.output_projector, "call", steps.given(f"{at}:attention_context", heads=attention.num_heads)
        yield attention.output_projector, "call", steps.output(f"{at}.output:linear")
    if layer.is_decoder:
        yield layer.cross_attention_layer_norm, "call", steps.given(f"{place}:add")
    yield layer.layer_norm, "call", steps.given(f"{place}:add.2" if layer.is_decoder else f"{place}:add")
    yield layer.layer_norm, "call", steps.output(f"{place}.layer_norm:rms_norm")
    yield layer.input_projector, "activation", steps.given(f"{place}.input_projector:linear")
    yield layer.input_projector, "activation", steps.output(f"{place}:{activation}")
    if layer.use_gated_activation:
        yield layer.gate_projector, "call", steps.output(f"{place}.gate_projector:linear")
        yield layer.output_projector, "call", steps.given(f"{place}:multiply")
    yield layer.output_projector, "call", steps.output(f"{place}.output_projector:linear")


class _Steps:
    """What was seen: `found`, by our names and in our layout. The methods make what is called with each call of a layer."""

    def __init__(self, inject: Mapping[str, Array]) -> None:
        self.found: dict[str, Array] = {}
        self._inject = inject

    def add(self, name: str, value: Any) -> None:
        """A value that came; one that has the name of one before is the second of that name."""
        count = 1 + sum(known == name or known.startswith(f"{name}.") for known in self.found)
        self.found[name if count == 1 else f"{name}.{count}"] = _array(value)

    def output(self, name: str, *, merged: bool = False, first_row: bool = False) -> Seen:
        """Its output; `merged` if its last two axes are one of ours, `first_row` if all rows of ours are one."""

        def seen(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            shape = tuple(output.shape)
            self.add(name, _array(output).reshape(*shape[:-2], -1) if merged else output[:1] if first_row else output)

        return seen

    def given(self, name: str, *, heads: int | None = None) -> Seen:
        """Its first argument; `heads` if ours has an axis of them."""

        def seen(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            value = _array(args[0] if args else next(iter(kwargs.values())))
            self.add(name, value.reshape(*value.shape[:-1], heads, -1) if heads else value)

        return seen

    def softmax(self, at: str) -> Seen:
        """The scores that a softmax is given, and the weights that it makes of them."""

        def seen(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.add(f"{at}:attention_scores", args[0])
            self.add(f"{at}:masked_softmax", output)

        return seen

    def alibi(self, name: str) -> Seen:
        """A bias (1, h, 1, s) that counts from the last key: ours counts from the query, and the softmax sees no difference."""

        def seen(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            row = _array(output).astype(np.float64)[:, :, 0]
            self.add(name, row[:, :, None, :] - row[:, :, :, None])

        return seen

    def layer(self, name: str) -> Seen:
        """The output of a layer, in whose place it may be given another. T5's have more than one."""

        def seen(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            own = output[0] if isinstance(output, tuple) else output
            self.add(name, own)
            if name not in self._inject:
                return None
            import keras

            new = keras.ops.convert_to_tensor(np.asarray(self._inject[name], np.float32))
            new = keras.ops.cast(new, keras.backend.standardize_dtype(own.dtype))
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return seen


@contextmanager
def _tapped(owner: Any, name: str, seen: Seen) -> Iterator[None]:
    """Inside, `seen` is called after every call of this attribute. Keras, which watches its layers' attributes, is not told."""
    original, own = getattr(owner, name), name in vars(owner)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        instead = seen(args, kwargs, output)
        return output if instead is None else instead

    object.__setattr__(owner, name, wrapped)
    try:
        yield
    finally:
        if own:
            object.__setattr__(owner, name, original)
        else:
            object.__delattr__(owner, name)


def _array(value: Any) -> Array:
    """As NumPy has it; bfloat16, which not every backend gives to NumPy, in float32."""
    if isinstance(value, np.ndarray):
        return value
    import keras

    if keras.backend.standardize_dtype(value.dtype) == "bfloat16":
        value = keras.ops.cast(value, "float32")
    return np.array(keras.ops.convert_to_numpy(value))
