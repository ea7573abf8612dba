"""Tokenizers of the three families, with KerasHub's names and arguments.

sentencepiece does the work for T5, the `tokenizers` library does byte-level BPE for OPT and BLOOM. Both are imported
only when a tokenizer is built, so that `import refmodels` needs NumPy alone.
"""

from __future__ import annotations

import codecs
import inspect
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, overload

import numpy as np

from refmodels.arguments import is_integer
from refmodels.files import keras_object, keras_policy, parse_json, read_bytes, write_bytes, write_json

MAX_SEQUENCE_LENGTH = 10_000_000
"""Every result is padded to the sequence length: a larger one is a corrupt file."""

# sentencepiece replaces every byte of an incomplete character by its own U+FFFD, Python's "replace" all by one.
codecs.register_error("refmodels.bytewise", lambda e: ("\ufffd" * (e.end - e.start), e.end))  # type: ignore[attr-defined]


class Tokenizer:
    """What the three tokenizers share; build one of them, or call `tokenizer_files.load_tokenizer`.

    Attributes: `start_token_id`, `end_token_id`, `pad_token_id` (int), `special_tokens` (list of str) and
    `special_token_ids` (list of int, same order), `sequence_length` (int or None).

    Source: keras_hub.tokenizers.Tokenizer, whose method names this follows. Results are Python lists, not arrays.
    """

    start_token: ClassVar[str]
    end_token: ClassVar[str]
    pad_token: ClassVar[str]
    optional_special_tokens: ClassVar[tuple[str, ...]] = ()
    family: ClassVar[str]
    _invalid_bytes: ClassVar[str] = "replace"  # how the streaming decoder treats bytes that are not UTF-8

    def __init__(self, sequence_length: int | None, dtype: str, name: str | None, unknown: dict[str, Any]) -> None:
        if unknown:
            known = quoted(argument_names(type(self)))
            raise TypeError(f"{type(self).__name__} has no argument {quoted(unknown)}; it takes {known}")
        if sequence_length is not None and not (is_integer(sequence_length) and 1 <= sequence_length <= MAX_SEQUENCE_LENGTH):
            wanted = f"None or a positive integer up to {MAX_SEQUENCE_LENGTH}"
            raise ValueError(f"sequence_length must be {wanted}, not {sequence_length!r:.80}")
        if dtype not in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"):
            raise ValueError(f'dtype must name an integer type such as "int32", not {dtype!r}')
        self.sequence_length = sequence_length
        self.dtype = dtype
        self.name = name or f"{self.family}_tokenizer"

    def _set_special_tokens(self, vocabulary: dict[str, int], source: str) -> None:
        """Keep the vocabulary and look the special tokens up; `source` is what the error calls the file."""
        self._ids = vocabulary
        self._tokens = {i: token for token, i in vocabulary.items()}
        required = list(dict.fromkeys((self.start_token, self.end_token, self.pad_token)))
        if missing := [token for token in required if token not in vocabulary]:
            raise ValueError(f"{source} lacks the special token {quoted(missing)} that {type(self).__name__} needs")
        optional = [t for t in self.optional_special_tokens if t in vocabulary and t not in required]
        self.special_tokens = required + optional
        self.special_token_ids = [vocabulary[token] for token in self.special_tokens]
        self.start_token_id = vocabulary[self.start_token]
        self.end_token_id = vocabulary[self.end_token]
        self.pad_token_id = vocabulary[self.pad_token]

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        """The text of ids that all are in the vocabulary."""
        raise NotImplementedError

    def _piece(self, id: int, head: list[int]) -> str | bytes:
        """What one id adds to a text that so far is that of `head`: text, or bytes that may be part of a character."""
        raise NotImplementedError

    def _next_head(self, id: int, head: list[int], text_so_far: bool) -> list[int]:
        """The few ids that stand for everything streamed so far, as far as the next piece depends on it."""
        return head

    def _assets(self) -> dict[str, bytes]:
        raise NotImplementedError

    def hugging_face_files(self) -> dict[str, bytes]:
        """The files, by name, with which Transformers' AutoTokenizer gives the same ids; ValueError where it cannot."""
        raise NotImplementedError

    @overload
    def tokenize(self, inputs: str) -> list[int]: ...
    @overload
    def tokenize(self, inputs: list[str] | tuple[str, ...]) -> list[list[int]]: ...
    def tokenize(self, inputs: str | list[str] | tuple[str, ...]) -> list[int] | list[list[int]]:
        """Ids of a text (list of int), or of each text of a list (list of lists).

        With `sequence_length` set, every result is cut or padded on the right to that length. Raises TypeError for
        anything but text, ValueError for text with lone surrogates (it is not Unicode) or without ids.
        """
        if isinstance(inputs, (list, tuple)) and all(isinstance(text, str) for text in inputs):
            return [self.tokenize(text) for text in inputs]
        if not isinstance(inputs, str):
            raise TypeError(f"tokenize needs a str or a list of str, not {inputs!r:.80}")
        inputs.encode()  # the libraries' errors for a lone surrogate differ; this is Python's UnicodeEncodeError
        ids = self._encode(inputs)
        if self.sequence_length is None:
            return ids
        return (ids + [self.pad_token_id] * (self.sequence_length - len(ids)))[: self.sequence_length]

    __call__ = tokenize

    def detokenize(self, ids: Any, skip_special_tokens: bool = True) -> Any:
        """Text of a list (or array) of ids: str; of a nested list: a list of str.

        Models pad their vocabulary, so an id past its end is no error: it has no text. Raises ValueError for a
        negative id or one that is no integer.
        """
        rows = ids.tolist() if isinstance(ids, np.ndarray) else ids
        if not isinstance(rows, (list, tuple)):
            rows = [rows]
        if rows and isinstance(rows[0], (list, tuple, np.ndarray)):
            return [self.detokenize(row, skip_special_tokens) for row in rows]
        return self._decode([i for i in map(_check_id, rows) if self._has_text(i, skip_special_tokens)])

    def _has_text(self, id: int, skip_special_tokens: bool) -> bool:
        return id in self._tokens and not (skip_special_tokens and id in self.special_token_ids)

    def stream_decoder(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder to push ids into one at a time, as they are generated."""
        return StreamDecoder(self, skip_special_tokens)

    def vocabulary_size(self) -> int:
        """The number of pieces the tokenizer has; the model's embedding may have more rows."""
        return len(self._ids)

    def get_vocabulary(self) -> list[str]:
        """All pieces, in the order of their ids."""
        return [self._tokens[i] for i in sorted(self._tokens)]

    def id_to_token(self, id: int) -> str:
        """The piece with this id; ValueError if there is none."""
        token = self._tokens.get(_check_id(id))
        if token is None:
            raise ValueError(f"id {id} is not in the vocabulary of {self.vocabulary_size()} pieces")
        return token

    def token_to_id(self, token: str) -> int:
        """The id of this piece; ValueError if there is none."""
        if token not in self._ids:
            raise ValueError(f"{token!r} is not in the vocabulary of {self.vocabulary_size()} pieces")
        return self._ids[token]

    def get_config(self) -> dict[str, Any]:
        """What KerasHub keeps under "config" in tokenizer.json."""
        config = {"name": self.name, "trainable": True, "dtype": keras_policy(self.dtype)}
        return config | {"config_file": "tokenizer.json", "sequence_length": self.sequence_length}

    def keras_object(self) -> dict[str, Any]:
        """KerasHub's object in tokenizer.json, and inside preprocessor.json."""
        return keras_object(
            f"keras_hub.src.models.{self.family}.{self.family}_tokenizer", type(self).__name__, self.get_config()
        )

    @classmethod
    def from_preset(cls, preset: str | Path, **options: Any) -> Self:
        """The tokenizer of a preset: a built-in name, a directory or a handle. `options` replace the file's arguments.

        On `Tokenizer` itself the class comes from the preset; on a model's class another family is a ValueError.
        """
        from refmodels.loading import load_preset_tokenizer

        tokenizer: Self = load_preset_tokenizer(preset, cls, **options)
        return tokenizer

    def save_to_preset(self, preset_dir: str | Path) -> None:
        """Write tokenizer.json and assets/tokenizer/ as KerasHub does; `from_preset` reads them."""
        assets = Path(preset_dir) / "assets" / "tokenizer"
        assets.mkdir(parents=True, exist_ok=True)
        for file, content in self._assets().items():
            write_bytes(assets / file, content)
        write_json(Path(preset_dir) / "tokenizer.json", self.keras_object())


class StreamDecoder:
    """Turns ids into text one at a time; get one from `Tokenizer.stream_decoder`.

    `push` returns only text that no later id can change: bytes of an unfinished character are held back. All pieces
    joined, `finish` included, are `Tokenizer.detokenize` of all ids. The cost of an id does not grow with the text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(tokenizer._invalid_bytes)
        self._head: list[int] = []

    def push(self, id: int) -> str:
        """The text that is certain now and was not before; raises ValueError as `detokenize` does."""
        id = _check_id(id)
        if not self._tokenizer._has_text(id, self._skip):
            return ""
        piece = self._tokenizer._piece(id, self._head)
        if isinstance(piece, bytes):
            text = self._utf8.decode(piece)
        else:  # a piece of text ends the character that the bytes before it began
            text = self._utf8.decode(b"", final=True) + piece
        self._head = self._tokenizer._next_head(id, self._head, bool(text))
        return text

    def finish(self) -> str:
        """The rest of the text; the decoder then is ready for another one."""
        self._head = []
        return self._utf8.decode(b"", final=True)


class T5Tokenizer(Tokenizer):
    """T5's sentencepiece tokenizer.

    Args:
        proto: path of the .spm / spiece.model file, or its content as bytes.
        sequence_length: int or None, the length to cut and pad to.
        add_bos, add_eos: bool, whether `tokenize` adds the model's start (T5 has none) and end pieces.
        extra_ids: int, how many of Hugging Face's pieces <extra_id_0>, <extra_id_1>, ... to put behind the model's
            own, the last one first; KerasHub has none.

    The special tokens have no text: `detokenize` gives "" for them either way. In a text they are plain characters.
    Raises ImportError without sentencepiece, ValueError for a file that is not a sentencepiece model.

    Source: keras_hub.models.T5Tokenizer; extra ids as in transformers.T5Tokenizer.
    """

    start_token = end_token = "</s>"
    pad_token = "<pad>"
    family = "t5"
    _invalid_bytes = "refmodels.bytewise"

    def __init__(
        self,
        proto: str | Path | bytes,
        sequence_length: int | None = None,
        add_bos: bool = False,
        add_eos: bool = False,
        dtype: str = "int32",
        *,
        extra_ids: int = 0,
        name: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(sequence_length, dtype, name, unknown)
        if not is_integer(extra_ids) or not 0 <= extra_ids <= 10_000:
            raise ValueError(f"extra_ids must be an integer from 0 to 10000, not {extra_ids!r}")
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise ImportError("T5Tokenizer needs sentencepiece: pip install sentencepiece") from error
        source = "proto" if isinstance(proto, bytes) else str(proto)
        self._proto = proto if isinstance(proto, bytes) else _read(proto)
        _check(len(self._proto) > 0, f"{source} is empty, wanted a sentencepiece model")
        try:
            self._model: Any = SentencePieceProcessor(model_proto=self._proto + _extra_pieces(extra_ids))
        except RuntimeError as error:
            raise ValueError(f"{source} is not a sentencepiece model ({len(self._proto)} bytes read)") from error
        count = self._model.get_piece_size()
        self._set_special_tokens({self._model.id_to_piece(i): i for i in range(count)}, source)
        if add_bos and self._model.bos_id() < 0:
            raise ValueError(f"add_bos needs a sentencepiece model with a start piece, and {source} has none")
        self.add_bos = add_bos
        self.add_eos = add_eos
        self.extra_ids = extra_ids
        self._extra_pattern = re.compile("(" + "|".join(f"<extra_id_{n}>" for n in range(extra_ids)) + ")")

    def _encode(self, text: str) -> list[int]:
        # A piece <extra_id_n> stands for a span: as in Hugging Face, the text on either side of it is encoded on its
        # own, so that it takes no space of its neighbours.
        parts = self._extra_pattern.split(text) if self.extra_ids else [text]
        ids = [self._model.bos_id()] if self.add_bos else []
        for n, part in enumerate(parts):
            ids += [self._ids[part]] if n % 2 else self._model.encode(part)
        return [*ids, self.end_token_id] if self.add_eos else ids

    def _decode(self, ids: list[int]) -> str:
        return str(self._model.decode(ids))

    def _piece(self, id: int, head: list[int]) -> str | bytes:
        if self._model.is_byte(id):
            return bytes([int(self._tokens[id][3:5], 16)])  # "<0xE3>"
        return self._decode([*head, id])[len(self._decode(head)) :]

    def _next_head(self, id: int, head: list[int], text_so_far: bool) -> list[int]:
        # sentencepiece drops spaces while there is no text. Before the first text the last piece tells it where it is,
        # after it any piece with text of its own does. A byte is text, if only that of a broken character.
        if text_so_far or self._model.is_byte(id):
            return [self._model.unk_id()]
        return head if head or self._model.is_control(id) else [id]

    def get_config(self) -> dict[str, Any]:
        config = super().get_config() | {"proto": None, "add_bos": self.add_bos, "add_eos": self.add_eos}
        return config | {"extra_ids": self.extra_ids} if self.extra_ids else config

    def keras_object(self) -> dict[str, Any]:
        found = super().keras_object()
        extra_ids = found["config"].pop("extra_ids", 0)  # beside "config": KerasHub has no such argument
        return found | {"extra_ids": extra_ids} if extra_ids else found

    def _assets(self) -> dict[str, bytes]:
        return {"vocabulary.spm": self._proto}

    def hugging_face_files(self) -> dict[str, bytes]:
        named = {"eos_token": self.end_token, "unk_token": self._tokens[self._model.unk_id()], "pad_token": self.pad_token}
        settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": self.extra_ids, **named}
        return {"spiece.model": self._proto, **_json_files(tokenizer_config=settings, special_tokens_map=named)}


class _BytePairTokenizer(Tokenizer):
    """Byte-level BPE over a vocabulary (dict of str to int, or path of its JSON) and merges (list, or path)."""

    def __init__(
        self,
        vocabulary: dict[str, int] | str | Path,
        merges: Sequence[str | Sequence[str]] | str | Path,
        sequence_length: int | None = None,
        add_prefix_space: bool = False,
        unsplittable_tokens: Sequence[str] | None = None,
        dtype: str = "int32",
        *,
        name: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(sequence_length, dtype, name, unknown)
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(f"{type(self).__name__} needs tokenizers: pip install tokenizers") from error
        source = str(vocabulary) if isinstance(vocabulary, (str, Path)) else "vocabulary"
        table = parse_json(_read(vocabulary), source) if isinstance(vocabulary, (str, Path)) else vocabulary
        self._set_special_tokens(checked_vocabulary(table, source), source)
        self._merges = _checked_merges(merges, self._ids)
        self._library = tokenizers
        self.add_prefix_space = add_prefix_space
        if unsplittable_tokens is not None and not isinstance(unsplittable_tokens, (list, tuple)):
            raise ValueError(f"unsplittable_tokens must be a list of tokens, not {unsplittable_tokens!r:.80}")
        self.unsplittable_tokens = list(map(str, unsplittable_tokens or ()))
        if missing := [token for token in self.unsplittable_tokens if token not in self._ids]:
            raise ValueError(f"{source} lacks the unsplittable token {quoted(missing)}")
        # Without an unknown token the library would silently drop what it has no symbol for. No text can hold this
        # one: byte-level text has no NUL.
        unknown_token = "<unk>" if "<unk>" in self._ids else "\0"
        model = tokenizers.models.BPE(
            vocab={unknown_token: max(self._tokens) + 1} | self._ids, merges=self._merges, unk_token=unknown_token
        )
        self._bpe = tokenizers.Tokenizer(model)
        self._bpe.pre_tokenizer = self._splitting_rule(tokenizers)
        self._bpe.decoder = tokenizers.decoders.ByteLevel()
        self._bpe.add_special_tokens(self.special_tokens + self.unsplittable_tokens)
        # Byte-level BPE writes printable Latin-1 bytes as themselves and the others, in order, from U+0100 on.
        self._bytes = {c: ord(c) for c in tokenizers.pre_tokenizers.ByteLevel.alphabet() if ord(c) < 256}
        others = (byte for byte in range(256) if chr(byte) not in self._bytes)
        self._bytes |= {chr(256 + n): byte for n, byte in enumerate(list(others))}

    def _splitting_rule(self, tokenizers: Any) -> Any:
        raise NotImplementedError

    def _encode(self, text: str) -> list[int]:
        # Not left to the library: its ByteLevel would put a space before every piece that BLOOM's Split made.
        if self.add_prefix_space and text and not text[0].isspace():
            text = " " + text
        ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        if any(i not in self._tokens for i in ids):
            raise ValueError(f"the vocabulary has neither all symbols of the text nor <unk>: {text[:40]!r}")
        return ids

    def _decode(self, ids: list[int]) -> str:
        return self._bpe.decode(ids, skip_special_tokens=False)

    def _piece(self, id: int, head: list[int]) -> str | bytes:
        token = self._tokens[id]
        try:
            return bytes(self._bytes[c] for c in token)
        except KeyError:  # a special token need not be written in the byte alphabet
            return token.encode()

    def get_config(self) -> dict[str, Any]:
        options = {"add_prefix_space": self.add_prefix_space, "unsplittable_tokens": self.unsplittable_tokens}
        return super().get_config() | options

    def _assets(self) -> dict[str, bytes]:
        merges = "".join(f"{left} {right}\n" for left, right in self._merges)
        return {"vocabulary.json": json.dumps(self._ids, ensure_ascii=False).encode(), "merges.txt": merges.encode()}

    def hugging_face_files(self) -> dict[str, bytes]:
        unknown = "<unk>" if "<unk>" in self._ids else None
        model = self._library.models.BPE(vocab=self._ids, merges=self._merges, unk_token=unknown)
        content = self._library.Tokenizer(model)
        content.pre_tokenizer, content.decoder = self._bpe.pre_tokenizer, self._bpe.decoder
        content.add_special_tokens(self.special_tokens)
        content.add_tokens([self._library.AddedToken(token, normalized=False) for token in self.unsplittable_tokens])
        named = {"bos_token": self.start_token, "eos_token": self.end_token, "pad_token": self.pad_token}
        named["unk_token"] = unknown or self.end_token
        settings = {**self._hugging_face_settings(content), **named}
        texts = _json_files(tokenizer_config=settings, special_tokens_map=named)
        return {"tokenizer.json": content.to_str(pretty=True).encode(), **texts}

    def _hugging_face_settings(self, content: Any) -> dict[str, Any]:
        """What tokenizer_config.json says beside the special tokens; completes `content`, the library's tokenizer."""
        raise NotImplementedError


class OPTTokenizer(_BytePairTokenizer):
    """OPT's byte-level BPE tokenizer, which splits text as GPT-2 does.

    Args:
        vocabulary: dict of str to int, or path of vocabulary.json.
        merges: list of "left right" strings or of pairs, or path of merges.txt.
        sequence_length: int or None, the length to cut and pad to.
        add_prefix_space: bool, whether a text that does not begin with white space gets a space in front.
        unsplittable_tokens: list of str, pieces that are found in the text before it is split. The special tokens
            always are.

    Raises ImportError without the `tokenizers` library, ValueError for a malformed or incomplete vocabulary.

    Source: keras_hub.models.OPTTokenizer of keras-hub 0.17 (newer ones lost the splitting rule), transformers' OPT.
    """

    start_token = end_token = "</s>"
    pad_token = "<pad>"
    optional_special_tokens = ("<s>", "<unk>")
    family = "opt"

    def _splitting_rule(self, tokenizers: Any) -> Any:
        return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)

    def _hugging_face_settings(self, content: Any) -> dict[str, Any]:
        content.pre_tokenizer = self._library.pre_tokenizers.ByteLevel(add_prefix_space=self.add_prefix_space)
        start = (self.start_token, self.start_token_id)
        content.post_processor = self._library.processors.TemplateProcessing(
            single=f"{self.start_token} $A", pair=f"{self.start_token} $A {self.start_token} $B", special_tokens=[start]
        )
        return {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": self.add_prefix_space}

    def hugging_face_files(self) -> dict[str, bytes]:
        assets = self._assets()
        merges = b"#version: 0.2\n" + assets["merges.txt"]  # Transformers drops the first line, whatever it says
        return {**super().hugging_face_files(), "vocab.json": assets["vocabulary.json"], "merges.txt": merges}


class BloomTokenizer(_BytePairTokenizer):
    """BLOOM's byte-level BPE tokenizer; its arguments and errors are those of `OPTTokenizer`.

    The rule that splits text is BLOOM's own, from Hugging Face's tokenizer.json; KerasHub uses another one, so that
    the ids of "don't" and the like differ from KerasHub's and agree with the checkpoints' training.

    Source: keras_hub.models.BloomTokenizer, bigscience/bloom tokenizer.json.
    """

    start_token = "<s>"
    end_token = "</s>"
    pad_token = "<pad>"
    optional_special_tokens = ("<unk>",)
    family = "bloom"
    splitting_pattern: ClassVar[str] = " ?[^(\\s|[.,!?…。，、।۔،])]+"

    def _splitting_rule(self, tokenizers: Any) -> Any:
        rules = tokenizers.pre_tokenizers
        # Regex, not a plain string, which the library would look for literally.
        words = rules.Split(tokenizers.Regex(self.splitting_pattern), behavior="isolated")
        return rules.Sequence([words, rules.ByteLevel(add_prefix_space=False, use_regex=False)])

    def _hugging_face_settings(self, content: Any) -> dict[str, Any]:
        if self.add_prefix_space:
            raise ValueError("add_prefix_space=True: Transformers would put a space before every word of a BLOOM tokenizer")
        return {"tokenizer_class": "BloomTokenizerFast", "add_prefix_space": False}


FAMILIES: dict[str, type[Tokenizer]] = {c.family: c for c in (T5Tokenizer, OPTTokenizer, BloomTokenizer)}
"""The class of each family."""


def checked_vocabulary(table: Any, source: str) -> dict[str, int]:
    """The table if it gives every token an id of its own; ValueError that names `source` if not."""
    _check(isinstance(table, dict), f"{source} must hold a dict of str to int, found {type(table).__name__}")
    owners: dict[int, str] = {}
    for token, i in table.items():
        if not isinstance(token, str) or not is_integer(i) or not 0 <= i < 2**31:
            raise ValueError(f"{source} must give every token an integer id from 0 on, found {token!r}: {i!r}")
        if i in owners:
            raise ValueError(f"{source} must give every token its own id, found {i} for {owners[i]!r} and {token!r}")
        owners[i] = token
    return {token: int(i) for token, i in table.items()}


def _checked_merges(merges: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    source, first = "merges", 1
    if isinstance(merges, (str, Path)):
        source = str(merges)
        try:
            merges = _read(merges).decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} is not UTF-8 text: {error}") from error
        if merges[0].startswith("#version") or merges == [""]:
            merges, first = merges[1:], 2
    _check(isinstance(merges, (list, tuple)), f"{source} must be a list of pairs, found {type(merges).__name__}")
    pairs = []
    for number, merge in enumerate(merges, first):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, (list, tuple)) or len(parts) != 2 or not all(isinstance(p, str) and p for p in parts):
            raise ValueError(f"{source}, entry {number}: found {merge!r}, wanted two parts")
        left, right = parts
        for piece in (left, right, left + right):
            if piece not in vocabulary:
                raise ValueError(f"{source}, entry {number}: the vocabulary lacks {piece!r}")
        pairs.append((left, right))
    return pairs


def _json_files(**contents: dict[str, Any]) -> dict[str, bytes]:
    """`name`.json with each content."""
    return {f"{name}.json": (json.dumps(content, indent=2) + "\n").encode() for name, content in contents.items()}


def _read(path: str | Path) -> bytes:
    """A file that the caller names: it may be a link."""
    real = Path(path).resolve()
    return read_bytes(real.parent, real.name)


def _extra_pieces(count: int) -> bytes:
    """<extra_id_count-1> ... <extra_id_0>, to append to a serialized sentencepiece model.

    Protobuf messages merge when they are concatenated, so these become further entries of the field `pieces` (1),
    each with the fields `piece` (1) and `type` (3) = USER_DEFINED (4).
    """
    pieces = (f"<extra_id_{n}>".encode() for n in reversed(range(count)))
    entries = (b"\x0a" + bytes([len(piece)]) + piece + b"\x18\x04" for piece in pieces)
    return b"".join(b"\x0a" + bytes([len(entry)]) + entry for entry in entries)


def _check(holds: bool, otherwise: str) -> None:
    """ValueError, not TypeError: it is the content of a file that is wrong."""
    if not holds:
        raise ValueError(otherwise)


def _check_id(id: Any) -> int:
    if not is_integer(id) or id < 0:
        raise ValueError(f"a token id must be an integer from 0 on, not {id!r}")
    return int(id)


def argument_names(kind: type[Tokenizer]) -> list[str]:
    """What the constructor takes."""
    return [name for name in inspect.signature(kind).parameters if name != "unknown"]


def quoted(names: Iterable[str]) -> str:
    """The names in quotes, for a message."""
    return ", ".join(repr(name) for name in names)
