"""What the three backbones share: checked inputs, parameters, counting, the run on an accelerator."""

import secrets
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from refmodels.accelerator import Accelerator, AcceleratorError, Room, find
from refmodels.arguments import is_integer, policy_name
from refmodels.op import Array, Op, Params, executing, executor_in_force
from refmodels.ops.dense import token_scores, token_vectors
from refmodels.ops.precision import compute_dtype, narrow, numpy_dtype, variable_dtype
from refmodels.parameters import Parameter, build_tree, check_leaves, count, draw, flatten, stored_bytes, unread_tree
from refmodels.placement import Form, Leaves, Placement
from refmodels.printing import byte_size
from refmodels.quantization import (
    Quantization,
    check_finite,
    dequantized_tree,
    is_matrix,
    keras_layers,
    of_keras_mode,
    policy_map,
    quantization,
    quantized_table,
    quantized_tree,
    read_policy,
)

Generator = np.random.Generator

OPTIONS = {"name": None, "trainable": True, "accelerator": None, "seed": None, "weight_only": False}
"""What every constructor takes beside the documented arguments: a label, a flag that is kept, where to run, the random seed,
and whether an int8 model leaves the inputs of its products as they are."""


class ClassPresets:
    """The class attribute `presets`: built-in presets of the class by name, each with `metadata` and `kaggle_handle`."""

    def __get__(self, instance: Any, owner: type) -> dict[str, Any]:
        from refmodels.presets import class_presets

        return class_presets(owner)


class Backbone(ABC):
    """Base of `T5Backbone`, `OPTBackbone` and `BloomBackbone`: a config, a tree of parameters, and a forward pass.

    Parameters are drawn at random when first used (reproducibly, from `seed`) unless a preset or an assignment to `params`
    brought them; constructing, counting and summarising allocate nothing. Every constructor argument is an attribute.
    """

    family: ClassVar[str]
    config_class: ClassVar[type]
    inputs: ClassVar[dict[str, tuple[str, ...]]]
    """Token input -> names of the inputs that go with it: its mask, then others."""

    presets: ClassVar[ClassPresets] = ClassPresets()
    prefill_op: ClassVar[Op[..., Array]]
    decode_op: ClassVar[Op[..., Array]]
    config: Any

    def __init__(self, options: dict[str, Any], dtype: Any, **arguments: Any) -> None:
        unknown = [name for name in options if name not in OPTIONS]
        if unknown:
            known = ", ".join([*arguments, "dtype", *OPTIONS])
            raise TypeError(f"{type(self).__name__} has no argument {unknown[0]!r}; it has: {known}")
        options = {**OPTIONS, **options}
        plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in arguments.items()}
        policy, mode, layers = read_policy(dtype, policy_name)
        self.config = self.config_class(**plain, dtype=policy)
        if not isinstance(options["weight_only"], bool):
            raise ValueError(f"weight_only must be true or false, got {options['weight_only']!r}")
        self.quantization: Quantization | None = None if mode is None else of_keras_mode(mode, options["weight_only"])
        if layers is not None:
            self._check_layers(layers)
        self.name: str = options["name"] or f"{self.family}_backbone"
        self.trainable: bool = options["trainable"]
        self.accelerator: Accelerator | None = find(options["accelerator"])
        # Without a seed the weights are random, but the same for the life of this object.
        seed = options["seed"]
        if seed is not None and not (is_integer(seed) and seed >= 0):
            raise ValueError(f"seed must be None or an integer from 0 on, got {seed!r}")
        self.seed: int = secrets.randbits(63) if seed is None else int(seed)
        self.placement = Placement()

    def __getattr__(self, name: str) -> Any:
        config = self.__dict__.get("config")
        if config is not None and name in config.__dataclass_fields__:
            return getattr(config, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    # -- parameters -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def plain_parameters(self) -> list[Parameter]:
        """A record of every parameter of the model as it is before it is quantised. Allocates nothing."""

    def parameters(self) -> list[Parameter]:
        """A record of every parameter, in the order of the tree. Allocates nothing."""
        table = self.plain_parameters()
        return table if self.quantization is None else quantized_table(table, self.quantization)

    @property
    def params(self) -> Params:
        """The tree of parameters: `params["layers"][0]["self_attention"]["query"]["kernel"]`.

        Another tree can be assigned: ValueError names the leaf that is missing, surplus or of a wrong shape. Arrays that are
        assigned or read here are yours too: from then on the model keeps them as they are, and an accelerator that wants other
        forms works on a copy, made at the next call (`accel/README.md`, `take`). `leaves` and `paths` do without.
        """
        return self._placed().shown()

    @params.setter
    def params(self, tree: Params) -> None:
        self._put(tree, shared=True)

    def adopt(self, tree: Params) -> None:
        """As an assignment to `params`, of a tree whose arrays nobody else keeps."""
        self._put(tree, shared=False)

    def read(self, leaf: Callable[[Parameter], Array]) -> None:
        """Take the parameters that `leaf` reads, one after the other.

        If this model's accelerator takes parameters and has room for these, each goes there before the next is read, so that
        the host never holds them all.
        """
        accelerator, parameters = self.accelerator, self.parameters()
        if accelerator is None or not accelerator.takes or self._excess(accelerator.room()):
            self.adopt(build_tree(parameters, leaf))
            return
        forms = {each.path: Form(each.shape, numpy_dtype(each.dtype or self.variable_dtype)) for each in parameters}
        self.placement.stream(unread_tree(parameters, leaf), forms, accelerator)

    def _excess(self, room: Room | None) -> str:
        """What to say if the parameters do not fit into this room, and in which types they would be smaller."""
        held = stored_bytes(self.parameters(), self.variable_dtype)
        if room is None or held <= room.free:
            return ""
        kind = self.variable_dtype if self.quantization is None else self.quantization.keras_mode
        plain, ways = self.plain_parameters(), []
        if self.quantization is None:
            ways.append(("bfloat16", 'dtype="bfloat16"', stored_bytes(plain, "bfloat16")))
        for mode in ("int8", "int4"):
            size = stored_bytes(quantized_table(plain, quantization(mode)), self.variable_dtype)
            ways.append((mode, f'quantize("{mode}")', size))
        smaller = ", ".join(f"{byte_size(size)} in {name} ({how})" for name, how, size in ways if size < held)
        return (
            f"the weights of {self.name} are {byte_size(held)} in {kind}, and {room.device} has {byte_size(room.free)} of "
            f"{byte_size(room.total)} free" + (f"; they would be {smaller}" if smaller else "")
        )

    def _put(self, tree: Params, *, shared: bool) -> None:
        check_leaves(dict(flatten(tree)), self.parameters(), type(self).__name__)
        self.placement.put(tree, shared=shared)

    def leaves(self) -> AbstractContextManager[Leaves]:
        """`with model.leaves() as leaves`: the arrays of `params` by path, to read inside the block and not to keep.

        Those at an accelerator come to the host layer by layer, as they are asked for, and stay there as well.
        """
        return self._placed().leaves()

    def paths(self) -> list[str]:
        """The path of every array in `params`, in the order of the tree."""
        return self._placed().paths()

    def array(self, path: str) -> Array:
        """The array of this path in `params`. One that is at an accelerator comes alone, as a copy that is not writeable."""
        return self._placed().array(path)

    @property
    def device_params(self) -> Params:
        """The tree as the accelerator in force wants it, for a call: the model may give it up after any."""
        accelerator, placement = self._in_force(), self._placed()
        if accelerator is None:
            return placement.on_host()
        return placement.at(accelerator, own=accelerator is self.accelerator, check=lambda: self._check_room(accelerator))

    def _check_room(self, accelerator: Accelerator) -> None:
        if excess := self._excess(accelerator.room()):
            raise AcceleratorError(f"accelerator {accelerator.name!r}: {excess}")

    def _placed(self) -> Placement:
        """Where the parameters are, drawn now if there are none."""
        if self.placement.empty:
            self.placement.fill(self._drawn)
        return self.placement

    def _drawn(self) -> Params:
        tree = draw(self.plain_parameters(), seed=self.seed, dtype=self.variable_dtype)
        how = self.quantization
        return tree if how is None else quantized_tree(dict(flatten(tree)), how)

    @property
    def variable_dtype(self) -> str:
        """The type of the parameters."""
        return variable_dtype(self.config.dtype)

    @property
    def compute_dtype(self) -> str:
        """The type of activations and outputs."""
        return compute_dtype(self.config.dtype)

    @property
    def embedding_dim(self) -> int:
        """The size of a token's vector, and of the hidden states that the head takes."""
        return int(self.config.hidden_dim)

    @property
    def embedding_dtype(self) -> str:
        """The type of a token's vector when it enters the first layer."""
        return self.compute_dtype

    def quantize(self, mode: str, *, block_size: int | None = None, weight_only: bool | None = None) -> None:
        """Turn every kernel and token table into integers, one after the other, and run on them from now on.

        mode          `int8`, or `int4` in groups (spec/quantization.md)
        block_size    inputs in a group of int4; by default 128
        weight_only   False quantises the inputs of every product too, while the model runs: Keras' int8, and the default. int4
                      is always for weights alone

        ValueError for other arguments, a model that is quantised already, and a matrix with infinities or NaN.
        """
        how = quantization(mode, block_size, weight_only)
        if self.quantization is not None:
            raise ValueError(f"{self.name} is quantised to {self.quantization.mode} already: dequantize() it or load it again")
        with self.leaves() as leaves:
            check_finite(leaves)
        tree = quantized_tree(self._given_away("quantize"), how)  # each matrix is to go when it has been quantised
        self.quantization = how
        self.placement.put(tree, shared=False)

    def dequantize(self) -> None:
        """Turn a quantised model into a plain one with the numbers that its integers stand for. ValueError for a plain one."""
        how = self.quantization
        if how is None:
            raise ValueError(f"{self.name} is not quantised")
        tree = dequantized_tree(self._given_away("dequantize"), how, numpy_dtype(self.variable_dtype))
        self.quantization = None
        self.placement.put(tree, shared=False)

    def _given_away(self, purpose: str) -> dict[str, Array]:
        """Every leaf by path, kept nowhere else; those that will stay in the tree are not shared with anybody."""
        leaves, shared = self._placed().given_away(purpose)
        return {path: np.array(leaf) if shared and not is_matrix(path) else leaf for path, leaf in leaves.items()}

    def _check_layers(self, given: tuple[str, ...]) -> None:
        wanted = keras_layers(self.family, self.plain_parameters())
        if missing := set(wanted).difference(given):
            raise ValueError(f"dtype policy map lacks layer {min(missing)!r}: a model is quantised as a whole or not at all")
        if unknown := set(given).difference(wanted):
            raise ValueError(f"dtype policy map has layer {min(unknown)[:100]!r}, which is none that is quantised here")

    def count_params(self) -> int:
        """Number of stored values; in a quantised model scales count too, and two int4 numbers as one."""
        return count(self.parameters())

    # -- adapters ---------------------------------------------------------------------------------------------------------

    @property
    def has_lora(self) -> bool:
        """Whether there are low-rank adapters in the tree."""
        return not self.placement.empty and any(path.endswith(".lora_kernel_a") for path in self.placement.paths())

    def default_lora_layer_names(self) -> list[str]:
        """The names of the layers that `enable_lora` adapts: query and value of every attention, as KerasHub calls them."""
        return ["query_dense", "value_dense", "query", "value"]

    def enable_lora(self, rank: int, target_layer_names: Iterable[str] | None = None) -> None:
        """Put a low-rank adapter of this rank beside the kernel of every dense layer of these names (spec/lora.md).

        b is zero, so outputs stay as they are until adapters are loaded or assigned. The model becomes trainable, as KerasHub's
        does. ValueError for a rank below 1, names that no layer has, and a model that has adapters.
        """
        from refmodels import lora

        if self.has_lora:
            raise ValueError(f"{type(self).__name__} has adapters already: enable_lora can be called once, before loading any")
        names = self.default_lora_layer_names() if target_layer_names is None else target_layer_names
        self._attach(lora.drawn(self, rank, names))
        self.trainable = True

    def save_lora_weights(self, filepath: str | Path) -> None:
        """Write the adapters to a file that ends in `.lora.h5` (KerasHub's form) or `.safetensors` (by our paths).

        ValueError for another ending or a model without adapters.
        """
        from refmodels import lora_files

        lora_files.save(self, filepath)

    def load_lora_weights(self, filepath: str | Path) -> None:
        """Take the adapters of a file that ends in `.lora.h5` or `.safetensors` in place of any that are there.

        Everything is checked before anything changes: ValueError says what does not fit, such as a rank that is not the one of
        `enable_lora`, if that was called.
        """
        from refmodels import lora_files

        self._attach(lora_files.load(self, filepath))

    def load_peft_adapter(self, directory: str | Path) -> None:
        """Take the adapters of a directory that PEFT wrote (`adapter_config.json`) in place of any that are there.

        Everything is checked before anything changes: ValueError says what does not fit or is not supported.
        """
        from refmodels import lora_files

        self._attach(lora_files.load_peft(self, directory))

    def save_peft_adapter(self, directory: str | Path, base_model_name_or_path: str | None = None) -> None:
        """Write the adapters as PEFT takes them on the Hugging Face model with its head. ValueError for a model without any."""
        from refmodels import lora_files

        lora_files.save_peft(self, directory, base_model_name_or_path)

    def merge_lora(self) -> None:
        """Add every adapter to its kernel, and drop it. ValueError for a model without adapters or with quantised kernels."""
        from refmodels import lora

        if not self.has_lora:
            raise ValueError(f"{type(self).__name__} has no adapters to merge")
        self._placed().change(lora.merged)

    def trainable_parameters(self) -> list[str]:
        """The paths of the parameters that KerasHub would train: with adapters, these and the biases of their layers."""
        from refmodels import lora

        return lora.trainable(self) if self.trainable else []

    def _attach(self, adapters: Mapping[str, Any]) -> None:
        from refmodels import lora

        def attached(tree: Params) -> Params:
            new = lora.attached(tree, adapters, self.config.dtype)
            check_leaves(dict(flatten(new)), self.parameters(), type(self).__name__)
            return new

        self._placed().change(attached)

    def summary(self, print_fn: Callable[[str], Any] = print) -> None:
        """Print a table of the layers: name, shapes, parameters."""
        rows: dict[str, list[Parameter]] = {}
        for parameter in self.parameters():
            rows.setdefault(parameter.path.rsplit(".", 1)[0], []).append(parameter)
        width = max(len(name) for name in rows)
        print_fn(f'{type(self).__name__} "{self.name}" ({self.config.dtype})')
        for name, group in rows.items():
            shapes = " ".join(str(parameter.shape).replace(" ", "") for parameter in group)
            print_fn(f"  {name:<{width}}  {count(group):>15,}  {shapes}")
        megabytes = stored_bytes(self.parameters(), self.variable_dtype) / 1e6
        kind = self.variable_dtype if self.quantization is None else self.quantization.keras_mode
        print_fn(f"  {'total':<{width}}  {self.count_params():>15,}  {megabytes:,.1f} MB in {kind}")

    # -- configuration ----------------------------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments, as `from_config` and a preset's config.json take them.

        An argument that KerasHub's class does not have is there only where it is not at its default.
        """
        arguments = asdict(self.config)
        for field in fields(self.config):
            if field.kw_only and arguments[field.name] == field.default:
                del arguments[field.name]
        policy, how = arguments.pop("dtype"), self.quantization
        if how is not None:
            policy = policy_map(policy, how, keras_layers(self.family, self.plain_parameters()))
            arguments |= {"weight_only": True} if how.mode == "int8" and how.weight_only else {}
        return {"name": self.name, "trainable": self.trainable, "dtype": policy, **arguments}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A backbone from `get_config`'s dictionary."""
        return cls(**config)

    @classmethod
    def from_preset(cls, preset: str | Path, load_weights: bool = True, **kwargs: Any) -> Self:
        """A backbone from a built-in name, a directory, or a `kaggle://` or `hf://` handle.

        On `Backbone` itself the class comes from the preset; on a model class another family is a ValueError. `kwargs` override
        entries of its config. With `load_weights=False` no weight file is touched.
        """
        from refmodels.loading import load_backbone

        return load_backbone(cls, preset, load_weights=load_weights, **kwargs)

    def save_to_preset(self, preset_dir: str | Path, max_shard_size: float = 10) -> None:
        """Write this model as KerasHub's files; see `refmodels.saving.save_to_preset`."""
        from refmodels.saving import save_to_preset

        save_to_preset(self, preset_dir, max_shard_size)

    def save_to_hf(self, directory: str | Path, max_shard_size: float = 5, dtype: str | None = None) -> None:
        """Write this model as Transformers' files; see `refmodels.saving.save_to_hf`."""
        from refmodels.saving import save_to_hf

        save_to_hf(self, directory, max_shard_size, dtype)

    # -- calling ----------------------------------------------------------------------------------------------------------

    def __call__(self, inputs: Mapping[str, Any], training: bool = False, rng: Generator | None = None) -> Any:
        """Run the model. Dropout acts only with `training=True`, and draws from `rng`."""
        if training and rng is None and self.config.dropout > 0:
            raise ValueError(f"training with dropout {self.config.dropout} needs rng=numpy.random.default_rng(seed)")
        if not isinstance(inputs, Mapping):
            raise TypeError(f"inputs must be a dictionary with {', '.join(self.inputs)}, got {type(inputs).__name__}")
        self.warn_of_unknown(inputs)
        arrays = self.checked(inputs)
        with self.running():
            on_device = {name: self.on_device(array) for name, array in arrays.items()}
            return self.on_host(self.forward(on_device, rng if training else None))

    @abstractmethod
    def forward(self, inputs: dict[str, Array], rng: Generator | None) -> Any:
        """The composite of this model on checked inputs."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run ops on this model's accelerator; a model without one leaves the choice to the surrounding `use(...)`."""
        if self.accelerator is None:
            yield
        else:
            with executing(self.accelerator):
                yield

    def on_device(self, array: Array) -> Any:
        """A NumPy array as the kind of the accelerator in force."""
        accelerator = self._in_force()
        return array if accelerator is None else accelerator.asarray(array)

    def on_host(self, outputs: Any) -> Any:
        """An array of the kind of the accelerator in force, or a dictionary of them, as NumPy's."""
        if isinstance(outputs, dict):
            return {name: self.on_host(value) for name, value in outputs.items()}
        accelerator = self._in_force()
        return outputs if accelerator is None else accelerator.asnumpy(outputs)

    def _in_force(self) -> Accelerator | None:
        """This model's accelerator; for a model without one that of the surrounding `use(...)`."""
        surrounding = executor_in_force()
        return self.accelerator or (surrounding if isinstance(surrounding, Accelerator) else None)

    def checked(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        arrays: dict[str, Array] = {}
        for token, (mask, *others) in self.inputs.items():
            arrays[token], arrays[mask] = self.check_pair(inputs, token, mask)
            shape = arrays[token].shape
            given = [name for name in others if inputs.get(name) is not None]
            arrays |= {name: self.check_ids(name, inputs[name], shape=shape) for name in given}
            vectors = embeddings_name(token)
            if inputs.get(vectors) is not None:
                arrays[vectors] = self.check_embeddings(vectors, inputs[vectors], shape)
        check_batches(arrays)
        return arrays

    def warn_of_unknown(self, inputs: Mapping[str, Any]) -> None:
        """Warn of inputs that this model does not know: they are ignored. The line it shows is that which called the caller."""
        known = sorted(name for token, others in self.inputs.items() for name in (token, embeddings_name(token), *others))
        for name in inputs:
            if name not in known:
                warnings.warn(f"{type(self).__name__} ignores input {name!r}; it takes {', '.join(known)}", stacklevel=3)

    def check_pair(self, inputs: Mapping[str, Any], token: str, mask: str) -> tuple[Array, Array]:
        """The ids and the mask of these names, checked; a mask that is not there is all ones."""
        if token not in inputs:
            raise ValueError(f"missing input {token!r}; {type(self).__name__} takes it with {mask!r}")
        ids = self.check_ids(token, inputs[token])
        return ids, check_mask(mask, inputs.get(mask), ids.shape)

    def check_ids(self, name: str, value: Any, *, shape: tuple[int, ...] | None = None) -> Array:
        """`value` as an integer array (b, t) whose entries are inside the vocabulary (positions: inside their table)."""
        try:
            ids = np.asarray(value)
        except ValueError:  # rows of different lengths
            raise ValueError(f"{name} must have shape (batch, length), got rows of different lengths: pad them") from None
        if ids.dtype.kind not in "iu" and ids.size:
            raise ValueError(f"{name} must hold integers, got {ids.dtype}")
        if ids.ndim != 2:
            raise ValueError(f"{name} must have shape (batch, length), got {ids.shape}")
        if shape is not None and ids.shape != shape:
            raise ValueError(f"{name} has shape {ids.shape}, wanted {shape}")
        positions = name == "position_ids"
        limit = self.max_sequence_length if positions else self.config.vocabulary_size
        table = "max_sequence_length" if positions else "vocabulary_size"
        outside = (ids < 0) | (ids >= limit) if limit is not None else np.zeros(ids.shape, bool)
        if outside.any():
            place = tuple(int(i) for i in np.argwhere(outside)[0])
            raise ValueError(f"{name}{list(place)} is {ids[place]}, wanted 0 to {limit - 1} ({table} {limit})")
        return ids.astype(np.int64)

    def check_embeddings(self, name: str, value: Any, shape: tuple[int, ...]) -> Array:
        """`value` as vectors (b, t, embedding_dim) in `embedding_dtype` for token ids of this `shape`; finite floats alone."""
        vectors, wanted = np.asarray(value), (*shape, self.embedding_dim)
        if not np.can_cast(vectors.dtype, np.float64) or vectors.dtype.kind in "biu":
            raise ValueError(f"{name} must hold floats, got {vectors.dtype}")
        if vectors.shape != wanted:
            raise ValueError(f"{name} has shape {vectors.shape}, wanted {wanted}: a vector for each token id")
        outside = ~np.isfinite(vectors)
        if outside.any():
            place = tuple(int(i) for i in np.argwhere(outside)[0])
            raise ValueError(f"{name}{list(place)} is {vectors[place]}, wanted a finite number")
        return narrow(vectors, numpy_dtype(self.embedding_dtype))

    def given_embeddings(self, embeddings: Any, shape: tuple[int, ...]) -> Any:
        """Checked vectors on the device, in place of those of token ids of this `shape`; None if there are none."""
        return None if embeddings is None else self.on_device(self.check_embeddings("embeddings", embeddings, shape))

    @abstractmethod
    def logits(self, hidden: Array) -> Array:
        """Scores (*b, v) of the next token for the decoder's outputs (*b, n); both are of the accelerator's kind."""

    # -- generation -------------------------------------------------------------------------------------------------------

    def prefill(
        self,
        token_ids: Array,
        padding_mask: Array,
        lengths: Array,
        cache: Params,
        start: Array | None = None,
        embeddings: Array | None = None,
    ) -> Array:
        """Take prompts (b, t) into the cache from positions `start` (b,) on; scores (b, v) of the token after each.

        `embeddings` (b, t, embedding_dim), a NumPy array, stand in place of the tokens' vectors; the ids then only say how
        many there are. The result is an array of the accelerator's kind, and so is the next method's.
        """
        with self.running():
            ids, mask, counts = (self.on_device(array) for array in (token_ids, padding_mask, lengths))
            first = None if start is None else self.on_device(start)
            vectors = self.given_embeddings(embeddings, token_ids.shape)
            return self.prefill_op(ids, mask, counts, self.device_params, cache, self.config, start=first, embeddings=vectors)

    def decode_step(self, token_ids: Array, padding_mask: Array, positions: Array, cache: Params) -> Array:
        """Take one token a row (b, 1) into the cache at its position (b,); scores (b, v) of the next."""
        with self.running():
            ids, mask, places = (self.on_device(array) for array in (token_ids, padding_mask, positions))
            return self.decode_op(ids, mask, places, self.device_params, cache, self.config)

    @property
    def ahead(self) -> int:
        """How many tokens `decode_tokens` may be asked for at once; 1: none."""
        accelerator = self._in_force()
        return 1 if accelerator is None else accelerator.ahead

    def decode_tokens(
        self, token_ids: Array, positions: Array, remaining: Array, cache: Params, *, count: int, **choice: Array
    ) -> Array | None:
        """The next `count` tokens of every row (b, count), as `Accelerator.decode_tokens` has them; None if it does not."""
        accelerator = self._in_force()
        if accelerator is None:
            return None
        with self.running():
            ids, places, left = (self.on_device(array) for array in (token_ids, positions, remaining))
            how = {name: self.on_device(array) for name, array in choice.items()}
            found = accelerator.decode_tokens(
                self.decode_op, ids, places, left, self.device_params, cache, self.config, count=count, **how
            )
            return None if found is None else np.asarray(self.on_host(found))

    @cached_property
    def token_embedding(self) -> "TokenEmbedding":
        """The layer of token embeddings; `token_embedding(hidden, reverse=True)` gives logits."""
        return TokenEmbedding(self)


def embeddings_name(token: str) -> str:
    """The input that may stand in place of the vectors of this token input: `encoder_embeddings` for `encoder_token_ids`."""
    return token.replace("token_ids", "embeddings")


def check_batches(arrays: Mapping[str, Array]) -> None:
    """All arrays must have the same number of rows."""
    if len({array.shape[0] for array in arrays.values()}) > 1:
        found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"inputs have different batch sizes: {found}")


def check_mask(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    """A padding mask as booleans of this shape; None is all ones. Anything but 0 and 1 is refused."""
    if value is None:
        return np.ones(shape, bool)
    try:
        mask = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name} must have shape {shape} like its token ids, got rows of different lengths") from None
    if mask.shape != shape:
        raise ValueError(f"{name} has shape {mask.shape}, wanted {shape} like its token ids")
    wrong = (mask != 0) & (mask != 1)
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(f"{name}{list(place)} is {mask[place]}, wanted 0 (padding) or 1 (real)")
    return mask.astype(bool)


class TokenEmbedding:
    """KerasHub's ReversibleEmbedding: ids (b, t) to vectors (b, t, n), or with `reverse=True` vectors to logits (b, t, v)."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self.input_dim: int = backbone.config.vocabulary_size
        self.output_dim: int = backbone.embedding_dim
        self.tie_weights: bool = backbone.config.tie_embedding_weights

    @property
    def _table(self) -> Params:
        return self._backbone.device_params["token_embedding"]

    @property
    def embeddings(self) -> Array:
        """The table, (v, n)."""
        return self._backbone.array("token_embedding.embeddings")

    @property
    def reverse_embeddings(self) -> Array:
        """The untied output table, (n, v)."""
        if self.tie_weights:
            raise AttributeError("the embedding is tied: its reverse is embeddings.T")
        return self._backbone.array("token_embedding.reverse_embeddings")

    def __call__(self, inputs: Any, reverse: bool = False) -> Array:
        model = self._backbone
        with model.running():
            if not reverse:
                ids = model.on_device(model.check_ids("token_ids", inputs))
                vectors = token_vectors(ids, self._table, dtype=model.embedding_dtype)
                return np.asarray(model.on_host(vectors))
            hidden = np.asarray(inputs).astype(numpy_dtype(model.compute_dtype), copy=False)
            return np.asarray(model.on_host(token_scores(model.on_device(hidden), self._table)))
