"""Transformers: its OPT, BLOOM and T5 in PyTorch, every layer and the steps inside.

    model = OPTForCausalLM.from_pretrained(place, attn_implementation="eager").eval()
    verify(TransformersCandidate(model), backbone_of(model))

What a module is given and what it makes is seen by hooks: a `Tap` says by which names of ours. What happens inside an attention
between its modules is seen by watching its products and its softmax, whatever the function that it calls them from. So the
scores are what the softmax is given, the weights are what the values are multiplied by, and the context is what is projected.
With fused attention (`sdpa`) there are no scores and weights to see; all else is there.

The model is left as it was: in training, if it was in training.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refmodels.backbone import Backbone
from refmodels.loading import huggingface_backbone
from refmodels.op import Array
from refmodels.ops.precision import numpy_dtype
from refmodels.verification.candidate import Candidate, CandidateError
from refmodels.weights import huggingface
from refmodels.weights.tensor import Tensor

FAMILIES = {"OPTForCausalLM": "opt", "BloomForCausalLM": "bloom", "T5ForConditionalGeneration": "t5"}
CACHES = ("dynamic", "static")

PRODUCTS = ("matmul", "bmm", "baddbmm", "__matmul__")
"""Functions of PyTorch, and methods of its tensors, that multiply their last two operands. Of an `einsum` we know no layout."""


def backbone_of(model: Any, dtype: str | None = None) -> Backbone:
    """Our backbone with the weights of this model of Transformers, in its type or in `dtype`.

    CheckpointError if ours cannot be what its configuration says.
    """
    import transformers

    config = model.config.to_dict() | {"transformers_version": transformers.__version__}
    place = Path(type(model).__name__) / "state_dict"
    tensors = {name: _stored(place, name, tensor) for name, tensor in model.state_dict().items()}
    return huggingface_backbone(config, tensors, place, dtype=dtype or _type_name(model))


def build(checkpoint: Path, model: Backbone) -> "TransformersCandidate":
    """What `refmodels verify transformers` runs: the class of Transformers for these files, with attention that can be seen.

    CandidateError if Transformers or PyTorch is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise CandidateError(f"{error}: pip install torch transformers") from None
    kind = getattr(transformers, next(name for name, family in FAMILIES.items() if family == model.family))
    dtype = getattr(torch, model.compute_dtype)
    return TransformersCandidate(kind.from_pretrained(checkpoint, dtype=dtype, attn_implementation="eager").eval())


def _stored(place: Path, name: str, tensor: Any) -> Tensor:
    return Tensor(place, name, tuple(tensor.shape), numpy_dtype(_type_name(tensor)), lambda: _array(tensor))


class TransformersCandidate(Candidate):
    """A model of Transformers under test: `OPTForCausalLM`, `BloomForCausalLM` or `T5ForConditionalGeneration`.

    `products` is what a candidate declares of its matrix products; `cache`, dynamic or static, is what `chunked` keeps keys and
    values in; `only` says which steps to keep, as those of a large model take much memory.

    OPT's positions: KerasHub's and ours count the padding on the left of a row too, Transformers' do not (OPT-C1). The inputs
    decide: they may have `position_ids`, and where the model's own rule gives other positions than the inputs mean, it is told
    theirs.
    """

    def __init__(
        self,
        model: Any,
        *,
        name: str = "",
        products: str = "",
        cache: str = "dynamic",
        only: Callable[[str], bool] = lambda name: True,
    ) -> None:
        kind = next((base.__name__ for base in type(model).__mro__ if base.__name__ in FAMILIES), None)
        if kind is None:
            raise CandidateError(f"a {type(model).__name__} is no candidate: wanted one of {', '.join(FAMILIES)}")
        if cache not in CACHES:
            raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {cache!r}")
        self.model, self.family, self.products, self.cache = model, FAMILIES[kind], products, cache
        self.name = name or f"{kind} of Transformers"
        self.only = only
        self.dtype = _type_name(model)
        self.layers = dict(_layers(model, self.family))
        self.injects = frozenset(self.layers.values())

    def run(self, inputs: Mapping[str, Array], inject: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        import torch

        found = _Steps(inputs, self.family, self.model, self.only)
        with _failing(self.name), torch.no_grad(), found.recording(), self._injecting(inject or {}, inputs):
            output = self.model(**self._arguments(inputs), use_cache=False)
            found.add(f"{self.family}_logits", _array(output.logits))
        return found.steps

    @contextmanager
    def _injecting(self, inject: Mapping[str, Array], inputs: Mapping[str, Array]) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, name in self.layers.items():
                if name in inject:
                    side = f"{name.partition('.')[0]}_" if self.family == "t5" else ""
                    hook = _replacing(inject[name], inputs.get(f"{side}padding_mask"))
                    stack.callback(layer.register_forward_hook(hook).remove)
            yield

    # -- inputs -------------------------------------------------------------------------------------------------------------

    def _arguments(self, inputs: Mapping[str, Array]) -> dict[str, Any]:
        import torch

        names = {"token_ids": "input_ids", "padding_mask": "attention_mask"}
        if self.family == "t5":
            names = {f"encoder_{ours}": theirs for ours, theirs in names.items()}
            names |= {"decoder_token_ids": "decoder_input_ids", "decoder_padding_mask": "decoder_attention_mask"}
        found = {theirs: torch.from_numpy(np.array(inputs[ours], np.int64)) for ours, theirs in names.items() if ours in inputs}
        if self.family == "opt":
            positions = self._told_positions(inputs)
            found |= {} if positions is None else {"position_ids": torch.from_numpy(positions)}
        return {name: tensor.to(self.model.device) for name, tensor in found.items()}

    def _told_positions(self, inputs: Mapping[str, Array]) -> Array | None:
        """Positions (b, t) for OPT, unless they are what it makes of the mask by itself."""
        ids, wanted = np.asarray(inputs["token_ids"]), inputs.get("position_ids")
        mask = np.asarray(inputs.get("padding_mask", np.ones(ids.shape)), np.int64)
        positions: Array = np.broadcast_to(np.arange(ids.shape[1]) if wanted is None else wanted, ids.shape).astype(np.int64)
        own = mask.cumsum(1) - 1
        return None if np.array_equal(own[mask > 0], positions[mask > 0]) else positions

    # -- cache and generation -----------------------------------------------------------------------------------------------

    def chunked(self, inputs: Mapping[str, Array], sizes: Sequence[int]) -> Array | None:
        import torch

        prefix = "decoder_" if self.family == "t5" else ""
        arguments = self._arguments(inputs)
        ids, mask = arguments[f"{prefix}input_ids"], arguments.get(f"{prefix}attention_mask")
        if sum(sizes) != ids.shape[1]:
            raise ValueError(f"chunks of {list(sizes)} tokens, but there are {ids.shape[1]}")
        mask = torch.ones_like(ids) if mask is None else mask
        positions = arguments.get("position_ids")
        found, start = [], 0
        with _failing(self.name), torch.no_grad():
            given = self._encoded(arguments) if self.family == "t5" else {}
            cache = self._new_cache(ids.shape[1], arguments["input_ids"].shape[1])
            for size in sizes:
                stop = start + size
                seen = mask[:, :stop]
                if self.cache == "static":  # all of its slots have keys
                    seen = torch.nn.functional.pad(seen, (0, mask.shape[1] - stop))
                if positions is not None or (self.cache == "static" and self.family == "opt"):
                    rows = mask.cumsum(1) - 1 if positions is None else positions
                    given["position_ids"] = rows[:, start:stop]
                names = {f"{prefix}input_ids": ids[:, start:stop], f"{prefix}attention_mask": seen}
                output = self.model(**names, **given, past_key_values=cache, use_cache=True)
                found.append(_array(output.logits))
                start = stop
        return np.concatenate(found, axis=1)

    def _encoded(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        ids, mask = arguments["input_ids"], arguments.get("attention_mask")
        outputs = self.model.get_encoder()(input_ids=ids, attention_mask=mask)
        return {"encoder_outputs": outputs, "attention_mask": mask}

    def _new_cache(self, length: int, encoder_length: int) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache, StaticCache

        def made(length: int) -> Any:
            return DynamicCache() if self.cache == "dynamic" else StaticCache(config=self.model.config, max_cache_len=length)

        return EncoderDecoderCache(made(length), made(encoder_length)) if self.family == "t5" else made(length)

    def generate(self, inputs: Mapping[str, Array], count: int) -> Array | None:
        """As for any candidate. A row's padding on the right is moved to its left, as Transformers wants it."""
        import copy

        import torch

        if self.family != "t5":
            inputs = _padded_on_the_left(inputs)
        arguments = self._arguments(inputs)
        arguments.pop("position_ids", None)  # generation makes its own
        settings = copy.deepcopy(self.model.generation_config)
        never = self.model.config.vocab_size  # None would be filled in with the model's own end
        settings.update(do_sample=False, num_beams=1, eos_token_id=never, max_length=None, max_new_tokens=count)
        settings.pad_token_id = settings.pad_token_id or 0
        if self.family == "t5":  # else it puts its own start in front
            settings.decoder_start_token_id = arguments["decoder_input_ids"][:, 0].tolist()
        with _failing(self.name), torch.no_grad():
            tokens = self.model.generate(**arguments, generation_config=settings)
        return np.asarray(tokens[:, -count:].cpu().numpy())

    def facts(self) -> dict[str, str]:
        import torch
        import transformers

        return {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "class": type(self.model).__name__,
            "attention": str(getattr(self.model.config, "_attn_implementation", "")),
            "dtype": self.dtype,
            "device": str(self.model.device),
            "mode": "training" if self.model.training else "evaluation",
        }


@contextmanager
def _failing(name: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        raise CandidateError(f"{name} fails: {type(error).__name__}: {error}") from error


def _padded_on_the_left(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The same rows, each with its padding in front."""
    found = dict(inputs)
    if "padding_mask" in found:
        order = np.argsort(np.asarray(found["padding_mask"], bool), axis=1, kind="stable")
        moved = ("token_ids", "padding_mask")
        found |= {name: np.take_along_axis(np.asarray(found[name]), order, 1) for name in moved}
    return found


# -- arrays -----------------------------------------------------------------------------------------------------------------


def _type_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _array(tensor: Any) -> Array:
    """A copy, which later steps in place do not change."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(numpy_dtype("bfloat16")).copy()
    return np.array(tensor.numpy())


def _first(values: Any) -> Any:
    """What a module gives: some give it alone, some at the head of a tuple or a record."""
    import torch

    return values if isinstance(values, torch.Tensor) else values[0]


def _replacing(array: Array, real: Array | None) -> Callable[..., Any]:
    """A hook that puts this array in place of what a module gives, where tokens are real: what theirs makes of padding goes on
    its way, as it may spread."""

    def hook(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        import torch

        own = _first(output)
        wide = array if array.dtype == np.float64 else array.astype(np.float32)
        new = torch.from_numpy(np.array(wide)).to(own.device, own.dtype).reshape(own.shape)
        if real is not None:
            counts = torch.from_numpy(np.array(real, bool)).to(own.device)
            new = torch.where(counts.reshape(*array.shape[:2], 1).expand(array.shape).reshape(own.shape), new, own)
        return new if own is output else (new, *output[1:])

    return hook


# -- which module is which step ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tap:
    """A module, and which steps of ours what it is `given` and what it `made` are, in the `turn`-th call of it."""

    module: Any
    given: tuple[str, ...] = ()
    made: tuple[str, ...] = ()
    turn: int = 1


@dataclass(frozen=True)
class Attention:
    """An attention: where it is in our model, and its parts there in the order in which ours splits them into heads.
    `scaled`: its queries are scaled before they are multiplied, so that what is multiplied is no step of ours."""

    module: Any
    place: str
    order: tuple[str, str, str]
    scaled: bool = False
    fused: Any = None


def _taps(model: Any, family: str) -> list[Tap]:
    tied = _is_tied(model)
    taps = list({"opt": _opt, "bloom": _bloom, "t5": _t5}[family](model))
    product = "token_embedding:logits_from_embeddings" if tied else "token_embedding:linear"
    given = {"opt": ("opt_backbone",), "bloom": ("bloom_backbone",), "t5": () if tied else ("token_embedding:scaled",)}
    return [*taps, Tap(model.lm_head, given[family], (product,))]


def _is_tied(model: Any) -> bool:
    import torch

    head, table = model.lm_head.weight, model.get_input_embeddings().weight
    return head is table or (head.shape == table.shape and bool(torch.equal(head, table)))


def _layers(model: Any, family: str) -> Iterator[tuple[Any, str]]:
    """Every layer and its name."""
    if family == "opt":
        yield from ((layer, f"layers.{i}:opt_decoder_layer") for i, layer in enumerate(model.model.decoder.layers))
    elif family == "bloom":
        yield from ((layer, f"layers.{i}:bloom_decoder_layer") for i, layer in enumerate(model.transformer.h))
    else:
        for stack in ("encoder", "decoder"):
            for i, block in enumerate(getattr(model, stack).block):
                kinds = ("t5_self_attention", *(("t5_cross_attention",) if stack == "decoder" else ()), "t5_feedforward")
                yield from ((part, f"{stack}.layers.{i}:{kind}") for part, kind in zip(block.layer, kinds, strict=True))


def _attentions(model: Any, family: str) -> Iterator[Attention]:
    if family == "opt":
        for i, layer in enumerate(model.model.decoder.layers):
            yield Attention(layer.self_attn, f"layers.{i}.self_attention", ("query", "key", "value"), scaled=True)
    elif family == "bloom":
        for i, block in enumerate(model.transformer.h):
            attention = block.self_attention
            fused = attention.query_key_value
            yield Attention(attention, f"layers.{i}.self_attention", ("query", "key", "value"), fused=fused)
    else:
        for stack in ("encoder", "decoder"):
            for i, block in enumerate(getattr(model, stack).block):
                at, order = f"{stack}.layers.{i}", ("key", "value", "query")
                yield Attention(block.layer[0].SelfAttention, f"{at}.self_attention", order)
                if stack == "decoder":
                    yield Attention(block.layer[1].EncDecAttention, f"{at}.cross_attention", order)


def _opt(model: Any) -> Iterator[Tap]:
    decoder = model.model.decoder
    yield Tap(decoder.embed_tokens, made=("token_embedding:embedding",))
    yield Tap(decoder.embed_positions, made=("position_embedding:embedding",))
    yield Tap(decoder.layers[0], given=("opt_backbone:add",))
    for name in ("project_in", "project_out"):
        if getattr(decoder, name) is not None:
            yield Tap(getattr(decoder, name), made=(f"{name}:linear",))
    for i, layer in enumerate(decoder.layers):
        at, before = f"layers.{i}", layer.do_layer_norm_before
        first, second = (f"{at}:add",), (f"{at}:add.2",)
        yield Tap(layer.self_attn_layer_norm, () if before else first, (f"{at}.self_attention_layer_norm:layer_norm",))
        for part in ("query", "key", "value"):
            yield Tap(getattr(layer.self_attn, f"{part[0]}_proj"), made=(f"{at}.self_attention.{part}:linear",))
        output = (f"{at}.self_attention.output:linear",)
        yield Tap(layer.self_attn.out_proj, (f"{at}.self_attention:merge_heads",), output)
        yield Tap(layer.final_layer_norm, first if before else second, (f"{at}.feedforward_layer_norm:layer_norm",))
        yield Tap(layer.fc1, made=(f"{at}.feedforward_intermediate_dense:linear",))
        yield Tap(layer.fc2, (f"{at}:relu",), (f"{at}.feedforward_output_dense:linear",))
        yield Tap(layer, made=(*(second if before else ()), f"{at}:opt_decoder_layer"))
    if decoder.final_layer_norm is not None:
        yield Tap(decoder.final_layer_norm, made=("layer_norm",))


def _bloom(model: Any) -> Iterator[Tap]:
    stack = model.transformer
    yield Tap(stack.word_embeddings, made=("token_embedding:embedding",))
    yield Tap(stack.word_embeddings_layernorm, made=("embedding_layernorm:layer_norm",))
    for i, block in enumerate(stack.h):
        at, attention, inner = f"layers.{i}", block.self_attention, block.mlp
        yield Tap(block.input_layernorm, made=(f"{at}.pre_attention_layernorm:layer_norm",))
        output = (f"{at}.self_attention.output:linear",)
        yield Tap(attention.dense, (f"{at}.self_attention:merge_heads",), output)
        yield Tap(attention, made=(f"{at}:add",))
        yield Tap(block.post_attention_layernorm, made=(f"{at}.post_attention_layernorm:layer_norm",))
        yield Tap(inner.dense_h_to_4h, made=(f"{at}.mlp_intermediate_dense:linear",))
        yield Tap(inner.dense_4h_to_h, (f"{at}:gelu_approximate",), (f"{at}.mlp_output_dense:linear",))
        yield Tap(inner, made=(f"{at}:add.2",))
        yield Tap(block, made=(f"{at}:bloom_decoder_layer",))
    yield Tap(stack.ln_f, made=("final_layernorm:layer_norm",))


def _t5(model: Any) -> Iterator[Tap]:
    function = str(huggingface.arguments(model.config.to_dict(), type(model).__name__)["activation"])
    yield Tap(model.encoder.embed_tokens, made=("token_embedding:embedding",))
    shared = model.decoder.embed_tokens is model.encoder.embed_tokens  # in older versions
    yield Tap(model.decoder.embed_tokens, made=("token_embedding:embedding.2",), turn=1 + shared)
    for stack in ("encoder", "decoder"):
        for i, block in enumerate(getattr(model, stack).block):
            at = f"{stack}.layers.{i}"
            yield from _t5_attention(block.layer[0], block.layer[0].SelfAttention, at, "self_attention", "add")
            if stack == "decoder":
                yield from _t5_attention(block.layer[1], block.layer[1].EncDecAttention, at, "cross_attention", "add.2")
            last, inner = block.layer[-1], block.layer[-1].DenseReluDense
            yield Tap(last.layer_norm, made=(f"{at}.layer_norm:rms_norm",))
            gated = hasattr(inner, "wi_1")
            yield Tap(inner.wi_0 if gated else inner.wi, made=(f"{at}.input_projector:linear",))
            if gated:
                yield Tap(inner.act, made=(f"{at}:{function}",))
                yield Tap(inner.wi_1, made=(f"{at}.gate_projector:linear",))
            middle = f"{at}:multiply" if gated else f"{at}:{function}"
            yield Tap(inner.wo, (middle,), (f"{at}.output_projector:linear",))
            added = "add.2" if stack == "encoder" else "add.3"
            yield Tap(last, made=(f"{at}:{added}", f"{at}:t5_feedforward"))
        yield Tap(getattr(model, stack).final_layer_norm, made=(f"{stack}.layer_norm:rms_norm",))
        yield Tap(getattr(model, stack), made=(f"t5_{stack}",))


def _t5_attention(layer: Any, attention: Any, at: str, name: str, added: str) -> Iterator[Tap]:
    yield Tap(layer.layer_norm, made=(f"{at}.{name}_layer_norm:rms_norm",))
    for part in ("query", "key", "value"):
        yield Tap(getattr(attention, part[0]), made=(f"{at}.{name}.{part}:linear",))
    yield Tap(attention.o, (f"{at}.{name}:merge_heads",), (f"{at}.{name}.output:linear",))
    yield Tap(layer, made=(f"{at}:{added}", f"{at}:t5_{name}"))


# -- recording --------------------------------------------------------------------------------------------------------------


class _Steps:
    """The steps of one run, in our layout."""

    def __init__(self, inputs: Mapping[str, Array], family: str, model: Any, only: Callable[[str], bool]) -> None:
        self.steps: dict[str, Array] = {}
        self._only = only
        self._inputs, self._family, self._model = inputs, family, model
        ids = inputs["encoder_token_ids" if family == "t5" else "token_ids"]
        self._batch = len(np.asarray(ids))
        self._inside: list[_Inner | None] = [None]

    def add(self, name: str, array: Array) -> None:
        """One step: rows of a batch that lie one after the other are set apart again."""
        if self._only(name):
            self.steps[name] = array.reshape(self._batch, -1, array.shape[-1]) if array.ndim == 2 else array

    def add_first(self, name: str, array: Array) -> None:
        """One step that several calls show: as the first does."""
        if name not in self.steps:
            self.add(name, array)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Watch the model inside the block."""
        with ExitStack() as stack:
            for tap in _taps(self._model, self._family):
                self._tap(stack, tap)
            for attention in _attentions(self._model, self._family):
                self._watch(stack, attention)
            stack.enter_context(_calls(self._called))
            yield

    def _tap(self, stack: ExitStack, tap: Tap) -> None:
        calls = 0

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal calls
            calls += 1
            if calls == tap.turn and any(map(self._only, tap.given)):
                value = _array(_given(args, kwargs))
                for name in tap.given:
                    self.add(name, value)

        def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
            if calls == tap.turn and any(map(self._only, tap.made)):
                value = _array(_first(output))
                for name in tap.made:
                    self.add(name, self._shared_rows(value) if name == "position_embedding:embedding" else value)

        stack.callback(tap.module.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(tap.module.register_forward_hook(after).remove)

    def _watch(self, stack: ExitStack, attention: Attention) -> None:
        inner = _Inner(attention, self)

        def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inside.append(inner)
            inner.calls = 0
            inner.past_softmax = False
            self._mask(attention, kwargs.get("mask", kwargs.get("attention_mask")))

        def leave(module: Any, args: tuple[Any, ...], output: Any) -> None:
            self._inside.pop()

        def enter_part(module: Any, args: tuple[Any, ...]) -> None:
            self._inside.append(None)  # what a dense layer does inside is its own affair

        stack.callback(attention.module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(attention.module.register_forward_hook(leave).remove)
        for part in attention.module.modules():
            if part is not attention.module:
                stack.callback(part.register_forward_pre_hook(enter_part).remove)
                stack.callback(part.register_forward_hook(leave).remove)
        if attention.fused is not None:
            stack.callback(attention.fused.register_forward_hook(inner.fused).remove)
        table = getattr(attention.module, "relative_attention_bias", None)
        if table is not None:
            stack.callback(table.register_forward_hook(inner.relative_bias).remove)

    def _called(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        inner = self._inside[-1]
        if inner is not None:
            inner.called(name, args, kwargs, result)

    # -- what needs a second look -------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Rows."""
        return self._batch

    @property
    def real(self) -> Array:
        """Which tokens of an only stack are real."""
        ids = np.asarray(self._inputs["token_ids"])
        return np.asarray(self._inputs.get("padding_mask", np.ones(ids.shape)), bool)

    def _shared_rows(self, vectors: Array) -> Array:
        """Vectors of positions (b, t, n) as one row for all, as ours are unless the inputs say which positions: those of the
        first row in which a place has a real token."""
        if "position_ids" in self._inputs:
            wanted = np.asarray(self._inputs["position_ids"]).shape[0]
            return vectors if wanted > 1 or vectors.shape[0] == 1 else vectors[:1]
        if vectors.shape[0] == 1:
            return vectors
        return vectors[self.real.argmax(0), np.arange(vectors.shape[1])][None]

    def _mask(self, attention: Attention, mask: Any) -> None:
        """The mask that an attention is given, as which keys it permits. There is none where the function itself is causal."""
        stack, own = attention.place.partition(".")[0], attention.place.endswith("self_attention")
        name = f"{self._family}_backbone:causal_mask"
        if self._family == "t5":
            name = "t5_decoder:causal_mask" if stack == "decoder" and own else f"t5_{stack}:key_mask"
        if mask is None or mask.ndim != 4 or name in self.steps or not self._only(name):
            return
        array = _array(mask)
        permitted = array if array.dtype == bool else array.astype(np.float64) == 0
        permitted = np.broadcast_to(permitted, (self._batch, *permitted.shape[1:]))
        if name.endswith("key_mask") and permitted.shape[2] > 1:  # ours is one for all queries
            real = np.asarray(self._inputs.get(f"{stack}_padding_mask", np.ones(permitted.shape[::2])), bool)
            permitted = np.asarray((permitted | ~real[:, None, :, None]).all(2, keepdims=True))
        self.add(name, permitted)


class _Inner:
    """What is seen of the inside of one attention."""

    def __init__(self, attention: Attention, steps: _Steps) -> None:
        self._attention, self._steps = attention, steps
        self.calls = 0
        self.past_softmax = False

    def called(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """A function of PyTorch was called from the attention itself."""
        if name == "softmax" and not self.past_softmax:
            self.past_softmax = True
            self._add("attention_scores", self._heads(_given(args, kwargs)))
        elif name == "scaled_dot_product_attention":
            self._split(*(self._heads(operand) for operand in args[:3]))
            self._add("attention_context", self._heads(result).transpose(0, 2, 1, 3))
        elif name in PRODUCTS or name == "einsum":
            operands = [value for value in (*args, *kwargs.values()) if hasattr(value, "detach")]
            if any(operand.ndim < 3 for operand in operands[-2:]):
                return  # a dense layer, written out
            self.calls += 1
            if name != "einsum":
                self._product([self._heads(operand) for operand in operands], self._heads(result))

    def _product(self, operands: list[Array], result: Array) -> None:
        *added, left, right = operands
        if self.past_softmax or self.calls == 2:
            self._add("masked_softmax", left)
            self._split(None, None, right)
            self._add("attention_context", result.transpose(0, 2, 1, 3))
        elif self.calls == 1:
            self._split(left, right.transpose(0, 1, 3, 2), None)
            if added and self._attention.place == "layers.0.self_attention":
                self._alibi(added[0])

    def _add(self, name: str, array: Array) -> None:
        self._steps.add(f"{self._attention.place}:{name}", array)

    def _heads(self, tensor: Any) -> Array:
        """(b, h, ...), if it is (b h, ...)."""
        array = _array(tensor)
        return array if array.ndim == 4 else array.reshape(self._steps.batch, -1, *array.shape[1:])

    def _split(self, query: Array | None, key: Array | None, value: Array | None) -> None:
        """The operands (b, h, t, d) of the products. Where one module makes all three, they are its parts as they are used."""
        parts = {"query": None if self._attention.scaled else query, "key": key, "value": value}
        for part, array in parts.items():
            if array is None:
                continue
            array = array.transpose(0, 2, 1, 3)
            number = self._attention.order.index(part) + 1
            if self._attention.fused is None:
                self._add("split_heads" if number == 1 else f"split_heads.{number}", array)
            else:
                merged = array.reshape(*array.shape[:2], -1)
                self._steps.add(f"{self._attention.place}.{part}:linear", merged)

    def fused(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """A hook: BLOOM's module that makes queries, keys and values, interleaved head by head (BLOOM-C6)."""
        array = _array(output)
        heads = self._attention.module.num_heads
        apart = array.reshape(*array.shape[:2], heads, 3, -1)
        for i, part in enumerate(("query", "key", "value")):
            self._steps.add(f"{self._attention.place}.{part}:linear", apart[..., i, :].reshape(*array.shape[:2], -1))

    def relative_bias(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """A hook: T5's table of biases, looked up by buckets (t, s)."""
        stack = self._attention.place.partition(".")[0]
        buckets = _array(args[0]).reshape(1, *args[0].shape[-2:])
        self._steps.add_first(f"t5_{stack}:relative_position_buckets", buckets)
        name = f"{self._attention.place}.relative_attention_bias:relative_position_bias"
        self._steps.add(name, np.moveaxis(_array(output).reshape(1, *output.shape[-3:]), -1, 1))

    def _alibi(self, bias: Array) -> None:
        """Their bias (b, h, 1, s) counts from the start of the row, ours from the query: BLOOM-C2. The softmax sees no
        difference. Ours is one for all rows: theirs of the first row in which both tokens are real."""
        real = self._steps.real
        wide = bias.astype(np.float64)
        length = real.shape[1]
        if wide.shape[-1] != length:
            return
        own = np.diagonal(wide, axis1=2, axis2=3) if wide.shape[2] == length and length > 1 else wide[:, :, 0]
        relative = wide - own[..., None]  # (b, h, t, s)
        row = (real[:, :, None] & real[:, None, :]).argmax(0)
        chosen = relative[row, :, np.arange(length)[:, None], np.arange(length)[None, :]]
        self._steps.add("bloom_backbone:alibi_bias", np.moveaxis(chosen, -1, 0)[None])


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first tensor of a call."""
    return next(value for value in (*args, *kwargs.values()) if hasattr(value, "detach"))


@contextmanager
def _calls(seen: Callable[[str, tuple[Any, ...], Mapping[str, Any], Any], None]) -> Iterator[None]:
    """Tell `seen` of every call of a function of PyTorch inside the block, once it is done."""
    from torch.overrides import TorchFunctionMode

    class Watch(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            seen(getattr(func, "__name__", ""), args, kwargs or {}, result)
            return result

    with Watch():
        yield
