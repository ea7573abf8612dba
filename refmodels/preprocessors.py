"""Preprocessors: text to padded arrays of token ids and back, with KerasHub's names, arguments and defaults.

What each gives is tabulated in `spec/tasks.md`. Ids are int32 and masks boolean, True for real tokens, as KerasHub's. One text
gives arrays of shape (length,), a list of texts (batch, length).
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from refmodels.arguments import is_integer
from refmodels.files import keras_object, keras_policy, write_json
from refmodels.op import Array
from refmodels.tokenizers import MAX_SEQUENCE_LENGTH, Tokenizer

LOG = logging.getLogger("refmodels")

TextOrTexts = Any  # str | list[str] | tuple[str, ...]


class Preprocessor(ABC):
    """What all preprocessors share: a tokenizer, settings, and how they are saved.

    Source: keras_hub.models.Preprocessor.
    """

    family: ClassVar[str]
    kind: ClassVar[str]
    """The end of the name of KerasHub's module, and but for a 2 of the object's name: opt_`causal_lm_preprocessor`."""

    settings: ClassVar[dict[str, str]]
    """Constructor argument -> the kind of its value in a file (a key of `refmodels.files.KINDS`)."""

    tokenizer: Tokenizer

    def __init__(self, tokenizer: Tokenizer, name: str | None) -> None:
        if not hasattr(self, "family"):
            raise TypeError(f"{type(self).__name__} is a base class: use a model's, or from_preset")
        if not isinstance(tokenizer, Tokenizer):
            raise TypeError(f"{type(self).__name__} takes a tokenizer, got {type(tokenizer).__name__}")
        if tokenizer.family != self.family:
            raise TypeError(f"{type(self).__name__} takes a tokenizer of {self.family}, got {type(tokenizer).__name__}")
        self.tokenizer = tokenizer
        self.name = name or f"{self.family}_{self.kind}".replace("seq_2_seq", "seq2_seq")

    @abstractmethod
    def __call__(self, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Inputs for training: x, or x with labels and their weights."""

    @classmethod
    def from_preset(cls, preset: str | Path, **kwargs: Any) -> Self:
        """The preprocessor of a preset: its preprocessor.json if that is of this class, else the tokenizer's with defaults.

        On `CausalLMPreprocessor` and `Seq2SeqLMPreprocessor` the class comes from the preset. `kwargs` override settings.
        """
        from refmodels.loading import load_preprocessor

        preprocessor: Self = load_preprocessor(cls, preset, **kwargs)
        return preprocessor

    def save_to_preset(self, preset_dir: str | Path) -> None:
        """Write preprocessor.json, tokenizer.json and assets/tokenizer/ as KerasHub does."""
        self.tokenizer.save_to_preset(preset_dir)
        write_json(Path(preset_dir) / "preprocessor.json", self.keras_object())

    def get_config(self) -> dict[str, Any]:
        """What KerasHub keeps under "config" in preprocessor.json; the constructor's arguments are among it."""
        tokenizer = self.tokenizer.keras_object()
        config = {"name": self.name, "trainable": True, "dtype": keras_policy("float32"), "tokenizer": tokenizer}
        return config | {"config_file": "preprocessor.json"} | {name: getattr(self, name) for name in self.settings}

    def keras_object(self) -> dict[str, Any]:
        """KerasHub's object in preprocessor.json, and inside task.json."""
        module = f"keras_hub.src.models.{self.family}.{self.family}_{self.kind}"
        return keras_object(module, type(self).__name__, self.get_config())

    def _packed(self, texts: TextOrTexts, length: int, *, start: int | None, end: int | None) -> tuple[Array, Array]:
        """Ids and mask of texts: [start] tokens [end] padding, `length` in all; tokens are cut on the right to make room."""
        room = length - (start is not None) - (end is not None)
        if room < 0:
            raise ValueError(f"a sequence length of {length} has no room for a start and an end token")
        head, tail = [] if start is None else [start], [] if end is None else [end]
        several = isinstance(texts, Iterable) and not isinstance(texts, str | bytes)
        rows = [head + tokens[:room] + tail for tokens in self.tokenizer.tokenize(list(texts) if several else [texts])]
        mask = np.arange(length) < np.array([len(row) for row in rows], int).reshape(-1, 1)
        ids = np.full(mask.shape, self.tokenizer.pad_token_id, np.int32)
        ids[mask] = [token for row in rows for token in row]
        return (ids, mask) if several else (ids[0], mask[0])

    def _text(self, x: Mapping[str, Any], *names: str) -> Any:
        """The text of ids (length,) or the texts of (batch, length), without padding and special tokens: the two entries of
        these names."""
        token_ids, padding_mask = _entries(x, *names)
        ids, mask = np.asarray(token_ids), np.asarray(padding_mask).astype(bool)
        if ids.shape != mask.shape or ids.ndim not in (1, 2):
            raise ValueError(f"token ids have shape {ids.shape} and their mask {mask.shape}, wanted (batch, length) twice")
        if ids.ndim == 1:
            return self.tokenizer.detokenize(ids[mask].tolist())
        return [self.tokenizer.detokenize(row[real].tolist()) for row, real in zip(ids, mask, strict=True)]


class CausalLMPreprocessor(Preprocessor):
    """Text for a model that continues it.

    Args:
        tokenizer: the model's tokenizer.
        sequence_length: int, the length that every result has, and the default of `generate`'s max_length.
        add_start_token: bool, whether the tokenizer's start token goes before every text. `generate` and
            `generate_preprocess` keep to it; KerasHub's add the start token there in any case.
        add_end_token: bool, whether the end token goes after every text in training.

    Source: keras_hub.models.CausalLMPreprocessor.
    """

    kind = "causal_lm_preprocessor"
    settings = {"sequence_length": "size", "add_start_token": "flag", "add_end_token": "flag"}

    def __init__(
        self,
        tokenizer: Tokenizer,
        sequence_length: int = 1024,
        add_start_token: bool = True,
        add_end_token: bool = True,
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(tokenizer, name)
        self.sequence_length = _length("sequence_length", sequence_length)
        self.add_start_token = _flag("add_start_token", add_start_token)
        self.add_end_token = _flag("add_end_token", add_end_token)

    def __call__(
        self, x: TextOrTexts, y: Any = None, sample_weight: Any = None, sequence_length: int | None = None
    ) -> tuple[dict[str, Array], Array, Array]:
        """(x, y, sample_weight) for training: ids and mask, the next token at each position, whether that is real.

        `y` and `sample_weight` given here are replaced, as in KerasHub.
        """
        length = _length("sequence_length", self.sequence_length if sequence_length is None else sequence_length)
        end = self.tokenizer.end_token_id if self.add_end_token else None
        ids, mask = self._packed(x, length + 1, start=self._start, end=end)
        return {"token_ids": ids[..., :-1], "padding_mask": mask[..., :-1]}, ids[..., 1:], mask[..., 1:]

    def generate_preprocess(self, x: TextOrTexts, sequence_length: int | None = None) -> dict[str, Array]:
        """`token_ids` and `padding_mask` to go on from: no end token; a text that is too long is cut on the right."""
        length = _length("sequence_length", self.sequence_length if sequence_length is None else sequence_length)
        ids, mask = self._packed(x, length, start=self._start, end=None)
        return {"token_ids": ids, "padding_mask": mask}

    def generate_postprocess(self, x: Mapping[str, Any]) -> Any:
        """The text of `token_ids` where `padding_mask` is set: a str, or a list of them for two axes."""
        return self._text(x, "token_ids", "padding_mask")

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids that `generate` goes on from, for each text, neither padded nor cut."""
        head = [] if self._start is None else [self._start]
        return [head + tokens for tokens in self.tokenizer.tokenize(list(texts))]

    @property
    def _start(self) -> int | None:
        return self.tokenizer.start_token_id if self.add_start_token else None


class OPTCausalLMPreprocessor(CausalLMPreprocessor):
    """`CausalLMPreprocessor` for OPT, whose start and end token are the same, </s>."""

    family = "opt"


class BloomCausalLMPreprocessor(CausalLMPreprocessor):
    """`CausalLMPreprocessor` for BLOOM: <s> text </s>. KerasHub adds <s> by default; the checkpoints were trained without."""

    family = "bloom"


class T5Preprocessor(Preprocessor):
    """Text for T5's encoder.

    Args:
        tokenizer: the model's tokenizer.
        sequence_length: int, the length that every result has.
        add_start_token: bool, whether T5's start token, which is its end token </s>, goes before every text.
        add_end_token: bool, whether the end token goes after every text.

    Source: keras_hub.models.T5Preprocessor.
    """

    family = "t5"
    kind = "preprocessor"
    settings = CausalLMPreprocessor.settings

    def __init__(
        self,
        tokenizer: Tokenizer,
        sequence_length: int = 256,
        add_start_token: bool = False,
        add_end_token: bool = True,
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(tokenizer, name)
        self.sequence_length = _length("sequence_length", sequence_length)
        self.add_start_token = _flag("add_start_token", add_start_token)
        self.add_end_token = _flag("add_end_token", add_end_token)

    def __call__(self, x: TextOrTexts, y: Any = None, sample_weight: Any = None, sequence_length: int | None = None) -> Any:
        """`token_ids` and `padding_mask`; with `y` the pair of both, with `sample_weight` too all three."""
        length = _length("sequence_length", self.sequence_length if sequence_length is None else sequence_length)
        start = self.tokenizer.start_token_id if self.add_start_token else None
        end = self.tokenizer.end_token_id if self.add_end_token else None
        ids, mask = self._packed(x, length, start=start, end=end)
        features = {"token_ids": ids, "padding_mask": mask}
        if y is None:
            return features
        return (features, y) if sample_weight is None else (features, y, sample_weight)


class Seq2SeqLMPreprocessor(Preprocessor):
    """A pair of texts for a model that answers the one with the other.

    Inputs are `{"encoder_text", "decoder_text"}`, each a str or a list of str.

    Args:
        tokenizer: the model's tokenizer.
        encoder_sequence_length: int, the length that the encoder's arrays have.
        decoder_sequence_length: int, the length that the decoder's arrays have, and the default of `generate`'s max_length.

    Source: keras_hub.models.Seq2SeqLMPreprocessor.
    """

    kind = "seq_2_seq_lm_preprocessor"
    settings = {"encoder_sequence_length": "size", "decoder_sequence_length": "size"}

    def __init__(
        self,
        tokenizer: Tokenizer,
        encoder_sequence_length: int = 1024,
        decoder_sequence_length: int = 1024,
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(tokenizer, name)
        self.encoder_sequence_length = _length("encoder_sequence_length", encoder_sequence_length)
        self.decoder_sequence_length = _length("decoder_sequence_length", decoder_sequence_length)

    @property
    def sequence_length(self) -> int:
        """Another name of `decoder_sequence_length`."""
        return self.decoder_sequence_length

    @sequence_length.setter
    def sequence_length(self, value: int) -> None:
        self.decoder_sequence_length = _length("sequence_length", value)

    def get_config(self) -> dict[str, Any]:
        # KerasHub saves no lengths, though it reads them: so they are written where they say something.
        config = super().get_config()
        return {name: value for name, value in config.items() if name not in self.settings or value != 1024}


class T5Seq2SeqLMPreprocessor(Seq2SeqLMPreprocessor):
    """`Seq2SeqLMPreprocessor` for T5: the encoder reads text </s>, the decoder <pad> text </s>.

    Source: keras_hub.models.T5Seq2SeqLMPreprocessor of keras-hub 0.32.
    """

    family = "t5"

    def __call__(
        self,
        x: Mapping[str, TextOrTexts],
        y: Any = None,
        sample_weight: Any = None,
        *,
        encoder_sequence_length: int | None = None,
        decoder_sequence_length: int | None = None,
        sequence_length: int | None = None,
    ) -> tuple[dict[str, Array], Array, Array]:
        """(x, y, sample_weight) for training: both sides' ids and masks, the decoder's next tokens, whether these are real.

        `y` and `sample_weight` given here are replaced, as in KerasHub.
        """
        width, length = self._lengths(encoder_sequence_length, decoder_sequence_length, sequence_length)
        source, target = _pair(x)
        end = self.tokenizer.end_token_id
        ids, mask = self._packed(source, width, start=None, end=end)
        new, real = self._packed(target, length + 1, start=self.tokenizer.pad_token_id, end=end)
        return _arrays(ids, mask, new[..., :-1], real[..., :-1]), new[..., 1:], real[..., 1:]

    def generate_preprocess(
        self,
        x: Any,
        *,
        encoder_sequence_length: int | None = None,
        decoder_sequence_length: int | None = None,
        sequence_length: int | None = None,
    ) -> dict[str, Array]:
        """Both sides' ids and masks: the decoder's have no end token. `x` may be the encoder's text alone."""
        width, length = self._lengths(encoder_sequence_length, decoder_sequence_length, sequence_length)
        source, target = _pair(x) if isinstance(x, Mapping) else (x, "" if isinstance(x, str) else [""] * len(x))
        ids, mask = self._packed(source, width, start=None, end=self.tokenizer.end_token_id)
        new, real = self._packed(target, length, start=self.tokenizer.pad_token_id, end=None)
        return _arrays(ids, mask, new, real)

    def generate_postprocess(self, x: Mapping[str, Any]) -> Any:
        """The text of `decoder_token_ids` where `decoder_padding_mask` is set: a str, or a list of them for two axes."""
        return self._text(x, "decoder_token_ids", "decoder_padding_mask")

    def encoder_rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids that the encoder reads, for each text, cut to `encoder_sequence_length` but not padded."""
        room, rows = self.encoder_sequence_length - 1, self.tokenizer.tokenize(list(texts))
        if (longest := max(map(len, rows), default=0)) > room:
            limit = self.encoder_sequence_length
            LOG.warning("the encoder reads the first %d of %d tokens: encoder_sequence_length is %d", room, longest, limit)
        return [[*tokens[:room], self.tokenizer.end_token_id] for tokens in rows]

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids that `generate` starts the decoder with, for each of its texts, neither padded nor cut."""
        return [[self.tokenizer.pad_token_id, *tokens] for tokens in self.tokenizer.tokenize(list(texts))]

    def _lengths(self, encoder: int | None, decoder: int | None, both_names: int | None) -> tuple[int, int]:
        decoder = both_names if decoder is None else decoder
        return (
            _length("encoder_sequence_length", self.encoder_sequence_length if encoder is None else encoder),
            _length("decoder_sequence_length", self.decoder_sequence_length if decoder is None else decoder),
        )


PREPROCESSORS: tuple[type[Preprocessor], ...] = (
    T5Seq2SeqLMPreprocessor,
    T5Preprocessor,
    OPTCausalLMPreprocessor,
    BloomCausalLMPreprocessor,
)
"""Every class that a file may name."""


def _entries(x: Any, *names: str) -> list[Any]:
    """What a dictionary has under these names; TypeError without one of them."""
    if not isinstance(x, Mapping) or not set(names) <= x.keys():
        found = ", ".join(map(str, x)) if isinstance(x, Mapping) else type(x).__name__
        wanted = " and ".join(f'"{name}"' for name in names)
        raise TypeError(f"x must be a dictionary with {wanted}, got {found}")
    return [x[name] for name in names]


def _pair(x: Any) -> tuple[TextOrTexts, TextOrTexts]:
    """The two texts of a dictionary; both single or as many of the one as of the other."""
    source, target = _entries(x, "encoder_text", "decoder_text")
    counts = [None if isinstance(texts, str) else len(texts) for texts in (source, target)]
    if counts[0] != counts[1]:
        shown = ["one text" if count is None else f"a list of {count}" for count in counts]
        raise ValueError(f"encoder_text is {shown[0]} and decoder_text {shown[1]}, wanted as many of the one as of the other")
    return source, target


def _arrays(ids: Array, mask: Array, new: Array, real: Array) -> dict[str, Array]:
    return {
        "encoder_token_ids": ids,
        "encoder_padding_mask": mask,
        "decoder_token_ids": new,
        "decoder_padding_mask": real,
    }


def _length(name: str, value: Any) -> int:
    if not (is_integer(value) and 1 <= value <= MAX_SEQUENCE_LENGTH):
        raise ValueError(f"{name} must be an integer from 1 to {MAX_SEQUENCE_LENGTH}, got {value!r:.80}")
    return int(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be true or false, got {value!r:.80}")
    return bool(value)
